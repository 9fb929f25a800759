"""A progressive recipe: images, then clips with images, then packs of both, then larger clips in larger windows."""

import json
import pathlib
import runpy
import shutil

import jax
import numpy as np
import pytest

from walt_jax.config import build
from walt_jax.data.latents import LatentClips
from walt_jax.denoiser.layout import to_tokens
from walt_jax.errors import UserError
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.generation.request import Request
from walt_jax.training import pack_batches
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig

TINY = pathlib.Path(__file__).parents[2] / "configs" / "walt_tiny.py"
SMALL = {"height": 8, "width": 8}
IMAGE, CLIP = {"frames": 1, **SMALL}, {**SMALL, "weight": 2.0}
STEPS = [("tokenizer", 1), *((stage, step) for stage in ("images", "clips", "packs", "larger") for step in (1, 2, 3))]


def knobs():
    config = runpy.run_path(str(TINY))["get_config"]()
    config.data.update(frames=3, height=16, width=16)
    del config.text
    optimizer = {"name": "adamw", "learning_rate": 1e-2}  # quicker to compile than Muon
    config.tokenizer.update(
        base_channels=4,
        channel_multipliers=(1, 1),
        downsample=((2, 2, 2),),
        patch_size=2,
        norm_groups=2,
        latent_channels=4,
    )
    config.denoiser.update(
        dim=8, layers=1, windows=((None, 1, 1),), patch_size=(1, 1, 1), cross_attention=False,
        self_conditioning=False, isolate_images=True, positions="learned", relative="bias",
    )  # fmt: skip
    config.diffusion.self_conditioning = 0.0
    stage = {"task": "denoiser", "steps": 3, "batch_size": 2, "optimizer": optimizer, "log_every": 1,
             "checkpoint_every": 2}  # fmt: skip
    shapes = {"clip": CLIP, "image": IMAGE}
    stages = {
        "tokenizer": {**stage, "task": "tokenizer", "steps": 1, "shapes": {"clip": CLIP}},
        "images": {**stage, "shapes": {"image": IMAGE}, "cached_clips": 8},
        "clips": {**stage, "shapes": shapes, "cached_clips": 0},
        "packs": {**stage, "batch_size": 1, "shapes": shapes, "pack": {"tokens": 24, "clips": 4}, "cached_clips": 0},
        "larger": {**stage, "windows": ((None, 2, 2),), "cached_clips": 8},
    }
    return {**json.loads(json.dumps(config.to_dict())), "stages": stages}


@pytest.fixture(scope="module")
def compiled(cache, quick_compilation):
    """What one run has compiled, the next one need not."""
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def run_in(workdir) -> Run:
    run = Run(build(RunConfig, knobs(), "config"), workdir)
    workdir.mkdir(exist_ok=True)
    run.text.keep(run.make_vocabulary())
    return run


@pytest.fixture(scope="module")
def trained(compiled, tmp_path_factory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_batches, "WAITING", 4)
        run = run_in(tmp_path_factory.mktemp("progressive") / "run")
        run.check()
        run.train()
    return run


def losses(run):
    rows = map(json.loads, (run.workdir / "metrics.jsonl").read_text().splitlines())
    return [(row["stage"], row["step"], row["loss"]) for row in rows]


def test_each_stage_is_trained_and_its_tables_have_its_size(trained):
    assert [row[:2] for row in losses(trained)] == STEPS
    shapes = {}
    for name in trained.config.denoiser_stages:
        params = jax.eval_shape(trained._task(name).init, jax.random.key(0))[0]["denoiser"]
        leaves = jax.tree_util.tree_leaves_with_path(unboxed(params))
        tables = {path[-1].key: leaf.shape for path, leaf in leaves}
        shapes[name] = tables["time_embedding"][0], tables["space_embedding"][1:3], tables["relative_bias"][:3]
    assert shapes["images"] == (1, (2, 2), (1, 1, 1))
    assert shapes["clips"] == shapes["packs"] == (2, (2, 2), (3, 1, 1))
    assert shapes["larger"] == (2, (4, 4), (3, 3, 3))


def test_it_samples_at_the_last_size(trained):
    assert trained.generator().generate([Request()])[0].shape == (3, 16, 16, 3)
    assert trained.summary().count("are encoded first") == 2


def test_stopped_among_packs_it_samples_at_their_size_and_goes_on_to_the_last_bit(trained, tmp_path, monkeypatch):
    """As a run that was killed after the second step of the stage."""
    monkeypatch.setattr(pack_batches, "WAITING", 4)
    shutil.copytree(trained.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "larger")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "packs" / "3")
    run = run_in(tmp_path / "run")
    assert run.generator().generate([Request()])[0].shape == (3, 8, 8, 3)
    run.train()
    assert losses(run) == losses(trained)


def test_packs_that_are_encoded_each_time_hold_the_latents_that_would_be_cached(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_batches, "WAITING", 4)
    tokenizer = trained.tokenizer()
    trained.encode(tmp_path / "latents", tokenizer, 24, "packs")
    with pytest.raises(UserError, match="--stage=clip is not a stage of the config; choose tokenizer or images or"):
        trained.encode(tmp_path / "others", tokenizer, 24, "clip")
    cached = LatentClips(tmp_path / "latents")
    contents = [to_tokens(cached[index].latents[None], (1, 1, 1))[0] for index in range(24)]
    packs, seen = iter(trained.data.packs("packs", tokenizer)), set()
    for _ in range(4):
        batch = next(packs)
        for segment in range(4):
            own = batch["tokens"][0][batch["pack"].positions[0, :, 0] == segment]
            if len(own):
                same = [
                    number
                    for number, each in enumerate(contents)
                    if each.shape == own.shape and np.allclose(each, own, atol=1e-4)
                ]
                assert len(same) == 1
                seen.update(same)
    packs.close()
    assert len(seen) > 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"larger": {"windows": ((None, 3, 3),)}}, "stages.larger.*does not divide.*(2, 4, 4)"),
        ({"larger": {"windows": ((None, 2, 2),) * 2}}, "stages.larger.windows should be as many as denoiser.windows"),
        ({"clips": {"windows": ((None, 3, 3),)}}, "stages.clips.*does not divide.*(2, 2, 2)"),
        ({"larger": {"shapes": {"clip": SMALL}}}, "stages.larger.shapes lacks the data's shape, 3 × 16 × 16"),
        ({"tokenizer": {"windows": ((1, 1, 1),)}}, "windows are for denoiser stages"),
        ({"packs": {"shapes": {}}}, "pack needs shapes"),
    ],
)
def test_what_does_not_fit_is_said_at_the_start(changed, message):
    wrong = knobs()
    for name, stage in changed.items():
        wrong["stages"][name].update(stage)
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        build(RunConfig, wrong, "config")


def test_latents_that_the_disk_has_no_room_for_are_refused_before_training(trained, tmp_path):
    many = knobs()
    many["stages"]["larger"]["cached_clips"] = 10**13
    run = Run(build(RunConfig, many, "config"), tmp_path)
    with pytest.raises(UserError, match=r"Stage larger encodes 10,000,000,000,000 clips to 5\.1e"):
        run.check()
