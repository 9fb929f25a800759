"""A plan's counts are those of models that are really made, of sums by hand and of the papers; nothing else is left."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import pathlib
import re
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from walt_jax.config import build
from walt_jax.data.shapes import ShapeConfig
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.main import main
from walt_jax.parallel.mesh import AXES
from walt_jax.parallel.rules import shardings
from walt_jax.tokenizer.autoencoder import Tokenizer
from walt_jax.training.loop import PackConfig
from walt_jax.training.plan import denoiser_flops, plan
from walt_jax.training.run_config import RunConfig, make_model
from walt_jax.workdir import check_empty

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config_of(name):
    knobs = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    return build(RunConfig, json.loads(json.dumps(knobs.to_dict())), "config")


@functools.cache
def denoiser_of(name):
    """The shapes of a config's denoiser."""
    config = config_of(name)
    model = make_model(config, config.text.vocab_size if config.text else 0)
    return jax.eval_shape(model.init, jax.random.key(0))["denoiser"]


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(tree)))


TINY = config_of("walt_tiny")
BATCH = TINY.stages["denoiser"].batch_size


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The workdir and what was printed, of data that aren't there."""
    workdir, out = tmp_path_factory.mktemp("plan") / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([f"--config={CONFIGS}/walt_tiny.py", f"--workdir={workdir}", "--mode=plan",
                     "--config.data.source=/nowhere"])  # fmt: skip
    assert code == 0
    return workdir, out.getvalue()


@pytest.fixture(scope="module")
def counts(planned):
    return json.loads((planned[0] / "plan.json").read_text())


def test_the_command_leaves_a_plan_and_says_so(planned, counts):
    workdir, out = planned
    assert [path.name for path in workdir.iterdir()] == ["plan.json"]
    assert f"wrote {workdir / 'plan.json'}" in out.splitlines()[-1]
    for name in ("tokenizer", "denoiser", "text_encoder"):
        assert f"{counts['params'][name]:,} parameters" in out


def test_the_workdir_can_still_be_trained_in(planned):
    check_empty(planned[0])


def test_the_keys_of_a_plan(counts):
    for group in ("params", "forward_flops_per_clip", "modules"):
        assert set(counts[group]) == {"tokenizer", "denoiser", "text_encoder"}
    assert list(counts["stages"]) == ["tokenizer", "denoiser"]
    assert counts["train_flops_per_step"] == counts["stages"]["denoiser"]["train_flops_per_step"]
    assert "counted as two" in counts["protocol"]
    assert "5 frames of 16 × 16 pixels" in counts["protocol"]


def test_without_a_config_or_a_run_there_is_nothing_to_plan(tmp_path, capsys):
    assert main([f"--workdir={tmp_path}", "--mode=plan"]) == 1
    assert "--config is missing" in capsys.readouterr().err


def test_parameters_are_those_of_models_that_are_made(counts):
    data, key = TINY.data, jax.random.key(0, impl="unsafe_rbg")  # which compiles in a tenth of the time
    quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    params = quickly(make_model(TINY, TINY.text.vocab_size).init)(key)
    video = jnp.zeros((1, data.frames, data.height, data.width, 3))
    tokenizer = quickly(Tokenizer(TINY.tokenizer).init)(key, video)
    made = {"tokenizer": size(tokenizer), "denoiser": size(params["denoiser"]), "text_encoder": size(params["text"])}
    assert counts["params"] == made
    assert counts["stages"]["tokenizer"]["params"] == made["tokenizer"]
    assert counts["stages"]["denoiser"]["params"] == made["denoiser"] + made["text_encoder"]


def test_modules_add_up(counts):
    for name in counts["params"]:
        for column in ("params", "forward_flops_per_clip"):
            assert sum(module[column] for module in counts["modules"][name].values()) == counts[column][name]


POSITIONS = 2 * 3 * 64 * 32 * 8  # fractions of three axes, 64 sinusoids each, for 8 tokens


def denoiser_by_hand():
    """Twice the multiplications of one pass: 2 × 2 × 2 tokens, and 16 text tokens."""
    dim, tokens, patch, text, width = 32, 8, 4 * 12, 16, 16
    once = (
        (3 * patch + 4) * dim * tokens  # latents, estimate, what is observed, and its mask
        + 256 * dim + dim * dim  # the time
        + width * dim * text + dim * dim  # the text, and its mean
        + 6 * dim * dim + 2 * dim * dim  # the modulation that blocks share, and that of the output
        + dim * patch * tokens
    )  # fmt: skip
    lora = 2 * dim + 2 * 6 * dim
    mlp = 2 * 4 * dim * dim * tokens
    own, cross = 4 * dim * dim * tokens, 4 * dim * dim * tokens + 2 * dim * dim * text
    # Scores and their use: each token with those of its frame, of its place in all frames, or of its frame and text.
    scores = 2 * dim * tokens * (4 + 2) + 2 * (2 * dim * tokens * (4 + text))
    return 2 * (once + 2 * (lora + mlp + own + cross) + scores) + POSITIONS


def text_encoder_by_hand():
    """One layer on 16 text tokens of width 16: four projections, scores and their use, three matrices of the MLP."""
    return 2 * (4 * 16**3 + 2 * 16**3 + 3 * 16**3)


def test_forward_operations_are_those_by_hand(counts):
    assert counts["forward_flops_per_clip"]["text_encoder"] == text_encoder_by_hand()
    assert counts["forward_flops_per_clip"]["denoiser"] == denoiser_by_hand()


def denoiser_step_by_hand(times_positions):
    """Self-conditioning's first pass, and one with gradients, except those of latents and sinusoids.

    The clips of a batch have the same positions, which are embedded once; in packs each clip's are.
    """
    first_layers = 2 * ((3 * 48 + 4) * 32 * 8 + 256 * 32)
    clip = (1 + 3) * (denoiser_by_hand() - POSITIONS) - first_layers + 3 * text_encoder_by_hand()
    return BATCH * clip + times_positions * (1 + 3 - 1) * POSITIONS


def test_a_step_of_the_denoiser_is_that_by_hand(counts):
    assert counts["train_flops_per_step"] == denoiser_step_by_hand(1)


def test_a_step_of_the_tokenizer_is_three_passes_without_the_gradient_of_pixels(counts):
    first = counts["modules"]["tokenizer"]["encoder/conv_in"]["forward_flops_per_clip"]
    clip = 3 * counts["forward_flops_per_clip"]["tokenizer"] - first
    assert counts["stages"]["tokenizer"]["train_flops_per_step"] == TINY.stages["tokenizer"].batch_size * clip


def with_stage(**changed):
    return dataclasses.replace(
        TINY, stages={**TINY.stages, "denoiser": dataclasses.replace(TINY.stages["denoiser"], **changed)}
    )


def test_a_step_that_encodes_its_clips_costs_as_much_more(counts):
    """Which is the encoder's part of the tokenizer, and is known where it is done once."""
    encoder = sum(
        module["forward_flops_per_clip"]
        for name, module in counts["modules"]["tokenizer"].items()
        if name.startswith("encoder")
    )
    cached = counts["stages"]["denoiser"]
    assert cached["encoding_flops_per_step"] == BATCH * encoder
    assert cached["latents_bytes_per_clip"] == 4 * 2 * 4 * 4 * 12
    each_time = plan(with_stage(cached_clips=0))["stages"]["denoiser"]
    assert each_time["train_flops_per_step"] == cached["train_flops_per_step"] + BATCH * encoder
    assert "encoding_flops_per_step" not in counts["stages"]["tokenizer"]


def test_batches_of_several_shapes_cost_the_mean_of_theirs():
    image = ShapeConfig(frames=1)
    both, clips = (with_stage(shapes=shapes) for shapes in ({"clip": ShapeConfig(), "image": image}, {}))
    mean, clip = (plan(config)["stages"]["denoiser"] for config in (both, clips))
    assert clip["latents_bytes_per_clip"] == 2 * 4 * 4 * 12 * 4
    assert mean["latents_bytes_per_clip"] == 3 / 4 * clip["latents_bytes_per_clip"]
    assert 0.5 < mean["train_flops_per_step"] / clip["train_flops_per_step"] < 1


def test_the_config_is_printed_and_kept_whole(planned, counts):
    _, out = planned
    assert build(RunConfig, counts["config"], "config") == dataclasses.replace(
        TINY, data=dataclasses.replace(TINY.data, source="/nowhere")
    )
    printed = dict(line.removeprefix("--config.").split("=", 1) for line in out.splitlines() if line[:9] == "--config.")
    assert printed["denoiser.dim"] == "32" and printed["data.source"] == "'/nowhere'"
    assert printed["stages.denoiser.windows"] == "None"


@pytest.mark.parametrize(
    "name", ["walt_l", "walt_xl", "walt_l_imagenet", "walt_l_k600", "walt_l_t2v", "walt_3b", "walt_sr_2x", "walt_sr_4x"]
)
def test_large_configs_encode_clips_once_and_their_heads_say_what_that_takes(name):
    config, head = config_of(name), (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    for stage in config.denoiser_stages:
        assert config.stages[stage].caches
        assert re.search(rf"\b{config.latents_bytes(stage) / 1e3:.0f} GB\b.*?per million", head, re.DOTALL)
    if config.text:
        rows = config.text.length * config.text.encoder.dim * 2
        assert re.search(rf"{rows / 1e3:.0f}\s+GB per million", head)


def test_w_a_l_ts_fine_tuning_changes_its_grid_and_windows():
    """Table 6 of the paper."""
    config = config_of("walt_3b")
    assert [config.bounds(stage) for stage in ("denoiser", "wide")] == [(5, 16, 16), (5, 16, 28)]
    assert config.denoiser_of("wide").windows == ((1, 16, 28), (5, 8, 14))
    stage = config.stages["wide"]
    assert (stage.steps, stage.batch_size, stage.optimizer.learning_rate) == (250_000, 512, 5e-5)
    assert (stage.optimizer.name, stage.optimizer.final_fraction) == ("adafactor", 1.0)
    for name in ("walt_l_t2v", "walt_3b"):  # clips of 8 frames a second, and images in the same run
        config = config_of(name)
        assert config.data.fps == 8
        assert [{shape.frames for shape in config.clip_shapes(stage)} for stage in config.denoiser_stages] == [
            {17, 1}
        ] * len(config.denoiser_stages)


def test_packs_whose_windows_do_not_divide_all_clips_have_a_plan():
    """Tables of relative positions have the sizes of each clip's windows."""
    knobs = runpy.run_path(str(CONFIGS / "walt_trends.py"))["get_config"]("packed")
    counts = plan(build(RunConfig, json.loads(json.dumps(knobs.to_dict())), "config"))
    assert counts["stages"]["denoiser"]["train_flops_per_step"] > 0


def test_packs_of_equal_clips_cost_what_those_clips_do():
    """Two clips of eight tokens a pack."""
    stage = dataclasses.replace(
        TINY.stages["denoiser"], shapes={"clip": ShapeConfig()}, pack=PackConfig(16, 4), batch_size=BATCH // 2
    )
    config = dataclasses.replace(TINY, stages={**TINY.stages, "denoiser": stage})
    assert plan(config)["train_flops_per_step"] == denoiser_step_by_hand(BATCH)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("walt_l", 313e6),
        ("walt_xl", 460e6),
        ("walt_l_imagenet", 460e6),
        ("walt_l_k600", 313e6),
        ("walt_l_t2v", 419e6),
        ("walt_sr_2x", 1.3e9),
        ("walt_sr_4x", 419e6),
    ],
)
def test_the_papers_denoisers_have_the_papers_size(name, parameters):
    assert size(denoiser_of(name)) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize(
    ("name", "parameters", "multiplications"),
    [
        ("dit_s_2", 33e6, 6.06e9),
        ("dit_b_2", 130e6, 23.01e9),
        ("dit_l_2", 458e6, 80.71e9),
        ("dit_xl_2", 675e6, 118.64e9),
        ("uvit_m_2", 131e6, None),
        ("uvit_l_2", 287e6, None),
        ("uvit_h_2", 501e6, None),
    ],
)
def test_the_siblings_have_their_papers_size_and_cost(name, parameters, multiplications):
    """DiT's "Gflops" are multiplications with their additions."""
    assert size(denoiser_of(name)) == pytest.approx(parameters, rel=0.01)
    if multiplications:
        config = config_of(name)
        model = make_model(config, config.most_pieces)
        params = unboxed(jax.eval_shape(model.init, jax.random.key(0)))
        cost = sum(denoiser_flops(model, params, config.text_length).values())
        assert cost / 2 == pytest.approx(multiplications, rel=0.01)


def test_u_vit_s_is_its_papers_without_classes():
    """Its 44M are those of CIFAR-10."""
    denoiser = denoiser_of("uvit_s_2")
    assert size(denoiser) - size(denoiser["label_embedding"]) == pytest.approx(44e6, rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        *(f"latte_xl_2_v{variant}" for variant in (1, 2, 3, 4)),
        "vdt_s_2",
        "vdt_l_2",
        "stdit_xl_2",
        "joint_l",
        "axial_l",
        "hierarchical_l",
        "navit_l",
    ],
)
def test_every_sibling_is_a_config_that_can_be_made(name):
    assert size(denoiser_of(name)) > 0


def test_lattes_variants_of_one_width_have_equally_many_parameters_but_the_third():
    """Whose blocks have two attentions each."""
    first, second, third, fourth = (size(denoiser_of(f"latte_xl_2_v{variant}")) for variant in (1, 2, 3, 4))
    assert first == second == fourth < third


NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in ("prepare", "demo_siblings"))


@functools.cache
def autoencoder(config):
    video = jnp.zeros((1, 1, *config.strides[1:], 3))
    return jax.eval_shape(Tokenizer(config).init, jax.random.key(0), video)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_rules_divide_every_config(name):
    """Over eight devices by `fsdp`, and over sixteen by `fsdp` and `tensor`: parameters need no rule of their own."""
    config = config_of(name)
    trained = {"tokenizer": autoencoder(config.tokenizer)}
    if config.denoiser:
        trained["denoiser"] = denoiser_of(name)
    for sizes in ((1, 8, 1, 1), (1, 8, 2, 1)):
        mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        for what, boxed in trained.items():
            shapes = [leaf.shape for leaf in jax.tree.leaves(nn.meta.unbox(boxed))]
            divided = jax.tree.leaves(shardings(boxed, mesh))
            own = sum(math.prod(part.shard_shape(x)) for part, x in zip(divided, shapes, strict=True))
            whole = sum(map(math.prod, shapes))
            assert own < 0.3 * whole, (what, own / whole)


def test_the_3b_models_blocks_have_the_papers_size():
    """What is around them makes another 1 %."""
    denoiser = denoiser_of("walt_3b")
    assert size(denoiser["cycles"]) == pytest.approx(3.05e9, rel=0.01)
    assert size(denoiser) == pytest.approx(3.09e9, rel=0.01)
