"""Plans on hardware: what fits, how fast it can be, which mesh is best; compiled for a TPU that isn't there."""

import dataclasses
import importlib.util
import json
import pathlib
import runpy

import pytest

from walt_jax.config import build
from walt_jax.data.shapes import ShapeConfig
from walt_jax.errors import UserError
from walt_jax.main import main
from walt_jax.parallel.mesh import MeshConfig, make_mesh
from walt_jax.parallel.topology import Topology, topology
from walt_jax.training import plan_hardware as plan_hardware_module
from walt_jax.training import plan_search
from walt_jax.training.loop import PackConfig
from walt_jax.training.optimizer import OptimizerConfig
from walt_jax.training.plan_hardware import (
    analysed,
    compiled,
    devices_of,
    duration,
    hosts_of,
    mesh_of,
    plan_hardware,
    priced,
    sentences,
    too_large,
    trace_shard,
)
from walt_jax.training.plan_picture import picture
from walt_jax.training.plan_search import KEPT, best_mesh, meshes, ranked, ranking_lines
from walt_jax.training.programs import train_step
from walt_jax.training.run_config import RunConfig

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)


def config_of(name, changed=()):
    """A published config, with the knobs that `changed` sets by their dotted names."""
    knobs = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    knobs.update_from_flattened_dict(dict(changed))
    return build(RunConfig, json.loads(json.dumps(knobs.to_dict())), "config")


TINY = config_of("walt_tiny")
GPUS = topology("h100:2")


def with_denoiser(config, stage=None, mesh=None, **changed):
    denoiser = dataclasses.replace(config.denoiser, **changed)
    stages = config.stages | {"denoiser": dataclasses.replace(config.stages["denoiser"], **(stage or {}))}
    return dataclasses.replace(config, denoiser=denoiser, stages=stages, mesh=mesh or config.mesh)


@pytest.fixture(scope="module", autouse=True)
def analysis_only():
    """Plans for GPUs are not compiled here, whether or not JAX's plugin for CUDA is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Topology, "compiles", property(lambda self: self.platform == "tpu"))
        yield


@pytest.fixture(scope="module")
def planned():
    return plan_hardware(TINY, GPUS, 2.0)


def test_a_plan_has_the_keys_that_scripts_rely_on(planned):
    keys = {
        "chips", "devices", "mesh", "hbm_bytes_per_device", "hbm_limit_bytes", "fits", "collective_bytes_per_step",
        "estimated_step_seconds", "estimated_mfu", "bound_by", "tokens_per_second", "compile_seconds",
    }  # fmt: skip
    assert keys <= set(planned)
    assert (planned["chips"], planned["devices"], planned["mesh"]["data"], planned["fits"]) == (2, 2, 2, True)
    assert [entry["name"] for entry in planned["programs"]] == [
        "train_step", "sampler_step", "tokenizer_train_step", "decode",
    ]  # fmt: skip
    json.dumps(planned)


def test_its_figures_agree_with_each_other(planned):
    for entry in planned["programs"]:
        assert entry["hbm_bytes_per_device"] == sum(entry["memory_bytes"].values())
        seconds = entry["estimated_step_seconds"]
        assert seconds == pytest.approx(sum(entry["seconds_by_bound"].values()))
        assert seconds == pytest.approx(sum(sum(part.values()) for part in entry["seconds_by_part"].values()))
        mfu = entry["model_flops"] / 2 / GPUS.hardware.peak_flops / seconds
        assert entry["estimated_mfu"] == pytest.approx(mfu)
        assert entry["hbm_limit_bytes"] == GPUS.hardware.hbm_limit_bytes


def test_copies_sum_their_gradients_once(planned):
    step = planned["programs"][0]
    assert step["collective_bytes_per_step"] == {"all-reduce": step["memory_bytes"]["parameters"]}


def test_the_tokens_that_a_step_needs_are_those_of_its_clips(planned, monkeypatch):
    """Clips of 2 × 2 × 2 tokens in the time of a step; of several hosts each reads an equal part."""
    only = {"train_step": lambda: train_step(TINY, "denoiser", mesh_of(TINY, topology("h100:1x2")))}
    monkeypatch.setattr(plan_hardware_module, "programs", lambda config, mesh: only)
    for plan, hosts in ((planned, 1), (plan_hardware(TINY, topology("h100:1x2")), 2)):
        step, needed = plan["programs"][0], plan["tokens_needed_per_second"]
        assert plan["hosts"] == hosts
        assert needed["total"] == pytest.approx(step["clips"] * 8 / step["estimated_step_seconds"])
        assert needed["per_host"] == pytest.approx(needed["total"] / hosts)
        line = sentences(plan)[-1]
        assert f"deliver {needed['total']:,.0f} tokens a second" in line
        assert (f"{needed['per_host']:,.0f} from each of 2 hosts" in line) == (hosts == 2)


@needs_libtpu
@pytest.mark.parametrize(("name", "hosts"), [("v5e:4x4", 4), ("v5p:2x2x2", 2), ("2x v5e:4x4", 8)])
def test_hosts_of_tpus_are_those_that_libtpu_names(name, hosts):
    slices = topology(name)
    assert hosts_of(make_mesh(MeshConfig(), slices.devices()), slices) == hosts


def test_a_price_is_chips_times_hours(planned):
    step = planned["programs"][0]
    hours = 2 * step["estimated_step_seconds"] / 3600 * 1e6 / step["clips"]
    assert step["price_per_million_clips"] == pytest.approx(2.0 * hours)
    assert "price_per_million_clips" not in priced({"estimated_step_seconds": None}, GPUS, 2.0)


def test_a_line_for_each_program_says_the_peak_that_it_is_a_fraction_of(planned):
    lines = sentences(planned)
    assert lines[0].startswith("on h100:2: 2 chips, mesh data 2, analysed; ")
    assert "989 TFLOP/s" in lines[0]
    assert [line.split()[0] for line in lines[1:-1]] == [entry["name"] for entry in planned["programs"]]
    unfit = {**planned["programs"][0], "estimated_step_seconds": None, "fits": False}
    assert sentences({**planned, "programs": [unfit]})[1].endswith("does not fit")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.724, "1.72 s"), (0.38, "380 ms"), (0.0123, "12.3 ms"), (4.5e-5, "45.0 µs"), (3e-7, "0.300 µs")],
)
def test_short_times_have_their_unit(seconds, text):
    assert duration(seconds) == text


def test_a_picture_of_what_fits_and_of_what_does_not(planned, tmp_path):
    picture(planned, tmp_path / "fits.png")
    unfit = [{**planned["programs"][0], "estimated_step_seconds": None}, *planned["programs"][1:]]
    picture({**planned, "programs": unfit}, tmp_path / "unfit.png")
    assert (tmp_path / "fits.png").read_bytes() != (tmp_path / "unfit.png").read_bytes()


def test_the_ranking_begins_with_what_fits_and_is_fastest(monkeypatch):
    tried = [MeshConfig(data=-1), MeshConfig(data=-1, fsdp=2), MeshConfig(data=-1, fsdp=3)]
    monkeypatch.setattr(plan_search, "meshes", lambda topology: tried)
    rows = ranked(TINY, GPUS, ("block",))
    assert [row["mesh"]["fsdp"] for row in rows] in ([1, 2], [2, 1])
    assert [row["estimated_step_seconds"] for row in rows] == sorted(row["estimated_step_seconds"] for row in rows)
    assert len(ranking_lines(rows)) == 3
    monkeypatch.setattr(plan_search, "ranked", lambda *arguments: rows)
    assert best_mesh(TINY, GPUS) == MeshConfig(**rows[0]["mesh"])
    monkeypatch.setattr(plan_search, "ranked", lambda *arguments: [{**row, "fits": False} for row in rows])
    with pytest.raises(UserError, match=r"--auto_mesh finds no mesh of h100:2"):
        best_mesh(TINY, GPUS)


def test_rows_that_share_a_trace_are_as_analysed_one_by_one(monkeypatch):
    """With as many data shards, traced once; with another number, again."""
    tried = [MeshConfig(data=-1, fsdp=2), MeshConfig(data=-1), MeshConfig(data=1, tensor=2)]
    monkeypatch.setattr(plan_search, "meshes", lambda topology: tried)
    traced = []
    monkeypatch.setattr(plan_search, "trace_shard", lambda *given: traced.append(given) or trace_shard(*given))
    rows = ranked(TINY, GPUS, ("block", "none"))
    assert (len(rows), len(traced)) == (6, 4)
    for row in rows:
        config = with_denoiser(TINY, mesh=MeshConfig(**row["mesh"]), remat=row["remat"])
        mesh = make_mesh(config.mesh, devices_of(GPUS))
        entry = analysed(train_step(config, "denoiser", mesh), config, mesh, GPUS)
        assert {name: row[name] for name in KEPT} == {name: entry[name] for name in KEPT}


def test_packs_are_planned_as_they_are():
    """Two clips of eight tokens fill a pack of sixteen; with images, packs hold more clips, and padding."""
    stage = {"shapes": {"clip": ShapeConfig()}, "pack": PackConfig(16, 2), "batch_size": 2}
    mesh = make_mesh(TINY.mesh, devices_of(GPUS))
    config = with_denoiser(TINY, stage)
    program = train_step(config, "denoiser", mesh)
    assert (program.clips, program.tokens) == (4, 32)
    batch = program.arguments[2]
    assert (batch["tokens"].shape, batch["text"].shape) == ((2, 16, 48), (2, 2, 16))
    assert all(groups.slots.shape == (2, 16) for groups in batch["pack"].groups.values())
    costs = [
        analysed(each, config, mesh, GPUS)["model_flops"] for each in (program, train_step(TINY, "denoiser", mesh))
    ]
    assert costs[0] == pytest.approx(costs[1], rel=0.1)
    mixed = with_denoiser(
        TINY, stage | {"shapes": {"clip": ShapeConfig(), "image": ShapeConfig(frames=1)}, "pack": PackConfig(16, 4)}
    )
    program = train_step(mixed, "denoiser", mesh)
    assert 4 < program.clips <= 8 and 24 < program.tokens <= 32
    with pytest.raises(UserError, match="A micro-batch of stage denoiser has 1 rows"):
        train_step(with_denoiser(TINY, stage | {"accumulate": 2}), "denoiser", mesh)


def test_where_a_step_does_not_fit_micro_batches_are_tried(monkeypatch):
    monkeypatch.setattr(plan_search, "meshes", lambda topology: [])
    (whole,) = ranked(TINY, GPUS, ("none",))
    assert whole["accumulate"] == 1 and whole["fits"]

    def with_limit(limit):
        small = dataclasses.replace(GPUS, hardware=dataclasses.replace(GPUS.hardware, hbm_limit_bytes=limit))
        return ranked(TINY, small, ("none",))

    rows = with_limit(whole["hbm_bytes_per_device"] - 1)
    assert sorted(row["accumulate"] for row in rows) == [1, 2]
    assert rows[0]["hbm_bytes_per_device"] != rows[1]["hbm_bytes_per_device"]
    # Of four clips on two devices: no four micro-batches.
    assert [row["accumulate"] for row in with_limit(whole["hbm_bytes_per_device"] // 3)] == [1]


def test_a_tokenizers_remat_is_tried_too(monkeypatch):
    monkeypatch.setattr(plan_search, "meshes", lambda topology: [])
    nothing = dict.fromkeys(("denoiser", "diffusion", "sampling", "text"))
    config = dataclasses.replace(TINY, **nothing, stages={"tokenizer": TINY.stages["tokenizer"]})
    rows = ranked(config, GPUS)
    assert sorted(row["remat"] for row in rows) == ["block", "convolutions", "none"]
    needed = {row["remat"]: row["hbm_bytes_per_device"] for row in rows}
    assert needed["block"] < needed["none"]


def test_meshes_use_all_devices():
    for name in ("v5e:4x4", "2x v5e:16x16", "h200:8x4"):
        found = list(meshes(topology(name)))
        assert len(found) == len(set(found)) >= 5
        inside = topology(name).device_count // topology(name).slices
        assert all(inside % (mesh.fsdp * mesh.tensor) == 0 for mesh in found)


def test_messages_of_compilers_without_memory():
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded by 4.75G."
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (136.94G) "
        "exceeds available HBM (15.75G)."
    )
    assert too_large(used) == round(20.5 * 2**30)
    assert too_large(temporaries) == round(136.94 * 2**30)
    assert too_large("RESOURCE_EXHAUSTED: of something") == 0
    assert too_large("INTERNAL: a bug") is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--topology=v5x:4x4"], "--topology=v5x:4x4 is not known; choose one like v4:4x4x4, v5e:4x4"),
        (["--price_per_chip_hour=1.2"], "--price_per_chip_hour is of the chips of a --topology"),
        (["--topology=h100:8", "--config.mesh.fsdp=3"], "config.mesh needs a multiple of 3 devices"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, sentence):
    command = [f"--config={CONFIGS}/walt_tiny.py", f"--workdir={tmp_path}/plan", "--mode=plan", *arguments]
    assert main(command) == 1
    assert sentence in capsys.readouterr().err


def test_auto_mesh_refuses_devices_that_it_does_not_know(tmp_path, capsys):
    command = [f"--config={CONFIGS}/walt_tiny.py", f"--workdir={tmp_path}/run", "--auto_mesh"]
    assert main(command) == 1
    assert "--auto_mesh knows v4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("v5e:2x2", marks=needs_libtpu),
        pytest.param("h100:4", marks=pytest.mark.skipif(not GPUS.compiles, reason="needs JAX's plugin for CUDA")),
    ],
)
def test_a_train_step_is_compiled_for_devices_that_are_not_there(name, monkeypatch):
    """One cycle of blocks in a scan, divided over four chips."""
    monkeypatch.setattr(Topology, "compiles", True)
    denoiser = dataclasses.replace(
        TINY.denoiser, scan=True, remat="dots", self_conditioning=False, cross_attention=False, classes=3
    )
    stage = dataclasses.replace(
        TINY.stages["denoiser"], optimizer=OptimizerConfig("adamw", learning_rate=1e-3)
    )  # no products
    config = dataclasses.replace(
        TINY,
        text=None,
        stages={**TINY.stages, "denoiser": stage},
        mesh=MeshConfig(data=1, fsdp=-1),
        diffusion=dataclasses.replace(TINY.diffusion, self_conditioning=0.0),
        denoiser=denoiser,
    )
    found = topology(name)
    mesh = mesh_of(config, found)
    entry = compiled(train_step(config, "denoiser", mesh), config, mesh, found)
    assert (entry["how"], entry["fits"]) == ("compiled", True)
    assert entry["collective_bytes_per_step"]["all-gather"] > 0
    if found.platform == "tpu":
        assert entry["memory_bytes"]["program"] > 0 and entry["compiler_step_seconds"] > entry["estimated_step_seconds"]
    # All devices together do the model's operations, and little more.
    done = 4 * entry["executed_flops_per_device"] / entry["model_flops"]
    assert 0.95 < done < 1.6


NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in ("prepare", "demo_siblings"))
QUICK = ("walt_demo", "walt_l")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_every_config_has_a_plan_on_gpus(name):
    config = config_of(name)
    plan = plan_hardware(config, topology("h100:1"))
    assert all(entry["model_flops"] > 0 and entry["hbm_bytes_per_device"] > 0 for entry in plan["programs"])
    assert 0 < plan["estimated_mfu"] < 1


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hardware", "knobs", "mfu"),
    [
        ("walt_l", "v5e:4x4", {}, 0.5),
        ("walt_xl", "v6e:4x4", {}, 0.5),
        ("walt_3b", "v5p:4x4x8", {}, 0.6),
        ("walt_3b", "v5e:16x16", {"denoiser.remat": "block"}, 0.0),
        ("magvit2_video", "v5e:4x4", {"tokenizer.remat": "block", "stages.video.accumulate": 16}, 0.0),
        ("magvit2_video_256x448", "v5p:2x2x2", {"tokenizer.remat": "block", "stages.finetune.accumulate": 32}, 0.0),
    ],
)
def test_the_published_models_fit_the_hardware_that_they_are_meant_for(name, hardware, knobs, mfu):
    """And reach their goals by the roofline. The tokenizers take 25 and 11 minutes to compile."""
    config = config_of(name, knobs)
    found = topology(hardware)
    mesh = mesh_of(config, found)
    stage = config.denoiser_stages[-1] if config.denoiser else config.trained_stages[-1]
    entry = compiled(train_step(config, stage, mesh), config, mesh, found)
    assert entry["fits"] and entry["estimated_mfu"] > mfu


@pytest.mark.parametrize("name", ["h100:1", "h100:2", "h100:8", "h200:8x4"])
def test_meshes_of_the_ranking_divide_the_devices(name):
    found = list(meshes(topology(name)))
    assert found == list(dict.fromkeys(found))
    assert all(topology(name).device_count % (mesh.fsdp * mesh.tensor) == 0 for mesh in found)
