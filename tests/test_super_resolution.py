"""Super-resolution from 16 × 16 to 32 × 32 pixels: a base run, and a run on its latents, to the evaluation."""

import json
import shutil

import jax
import numpy as np
import pytest

from walt_jax import main
from walt_jax.config import build, plain
from walt_jax.data.latents import LatentClips
from walt_jax.errors import UserError
from walt_jax.generation.low_res import shrunk
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig
from walt_jax.training.run_data import digest
from walt_jax.workdir import claim, read_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLIPS = 6

BASE = """
from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config():
    config = parent("configs/walt_tiny.py", "walt_tiny")
    for name in ("text", "denoiser", "diffusion", "sampling", "conditioning"):
        del config[name]
    del config.stages["denoiser"]
    config.stages.tokenizer.update(steps=2)
    config.evaluation.update(clips=2)
    return config
"""
UPSCALING = """
from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config():
    config = parent("configs/walt_tiny.py", "walt_tiny")
    del config.text
    config.data.update(height=32, width=32, caption_dropout=0.0)
    config.denoiser.update(cross_attention=False, classes=72, upscale=2, layers=1, windows=((1, None, None),))
    config.denoiser.update(self_conditioning=False, frame_prediction=False)
    config.diffusion.self_conditioning = 0.0
    config.conditioning = ConfigDict({"low_res_noise": 0.3})
    config.stages.tokenizer.update(steps=2)
    config.stages.denoiser.update(steps=3, batch_size=2, cached_clips=CLIPS, ema_decay=0.0)
    config.sampling.update(batch_size=2)
    config.evaluation.update(clips=2, prompts=2)
    return config
""".replace("CLIPS", str(CLIPS))


@pytest.fixture(scope="module")
def command(cache):
    """Runs the command line in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        yield lambda *flags: main.main(list(flags))
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "base.py").write_text(BASE)
    knobs = plain(main.parse([f"--config={folder / 'base.py'}"]).config, "config")
    claim(folder / "run", knobs)
    Run(build(RunConfig, knobs, "config"), folder / "run").train()
    return folder / "run"


@pytest.fixture(scope="module")
def flags(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "upscaling.py"
    path.write_text(UPSCALING)
    return [f"--config={path}", f"--config.low_res_from={base}"]


@pytest.fixture(scope="module")
def trained(command, flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("upscaling") / "run"
    assert command(*flags, f"--workdir={workdir}") == 0
    return workdir


def run_of(workdir, folder=None, **knobs):
    return Run(build(RunConfig, {**read_config(workdir), **knobs}, "config"), folder or workdir)


def test_a_run_ends_with_an_evaluation(trained):
    report = json.loads((trained / "evaluate.json").read_text())
    metrics = {metric["name"]: metric["value"] for metric in report["metrics"]}
    names = {f"super_resolution_{name}" for name in ("psnr_db", "low_res_psnr_db", "bicubic_psnr_db")}
    assert names <= set(metrics) and np.isfinite([metrics[name] for name in names]).all()
    assert metrics["super_resolution_bicubic_psnr_db"] > 20
    assert len(report["super_resolution"]) == 2
    assert len(json.loads((trained / "samples" / "samples.json").read_text())) == 2
    assert (trained / "super_resolution.png").read_bytes().startswith(b"\x89PNG")
    assert 'id="super-resolution"' in (trained / "report.html").read_text()


def test_cached_pairs_are_both_tokenizers_latents_of_each_clip(base, trained):
    """The plain way: the clip by this run's tokenizer, and the mean of its pixels by the base run's."""
    run, lower = run_of(trained), run_of(base)
    assert digest(lower.tokenizer()) != digest(run.tokenizer())
    pairs, clips = LatentClips(trained / "latents" / "denoiser"), run.data.clips("denoiser")
    assert len(pairs) == CLIPS
    for number in range(CLIPS):
        video = clips[number]["video"][None]
        small = video.reshape(1, 5, 16, 2, 16, 2, 3).mean((3, 5)).round().astype(np.uint8)
        np.testing.assert_allclose(pairs[number].latents, run.codec.encode(run.tokenizer(), video)[0][0], atol=1e-4)
        np.testing.assert_allclose(pairs[number].low_res, lower.codec.encode(lower.tokenizer(), small)[0][0], atol=1e-4)


def test_batches_of_cached_pairs_equal_those_that_are_encoded_anew(trained):
    run = run_of(trained)
    cached = next(iter(run.data.encoded("denoiser", run.tokenizer())))
    stages = {**read_config(trained)["stages"]}
    stages["denoiser"] = {**stages["denoiser"], "cached_clips": 0}
    anew = run_of(trained, stages=stages)
    some = [next(iterator) for iterator in [iter(anew.data.batches("denoiser"))] for _ in range(CLIPS // 2)]
    videos, low_res = (np.concatenate([batch[name] for batch in some]) for name in ("video", "low_res"))
    latents = np.concatenate([run.codec.encode(run.tokenizer(), video[None])[0] for video in videos])
    for high, low in zip(cached["latents"], cached["low_res"], strict=True):
        index = np.abs(latents - high).max((1, 2, 3, 4)).argmin()
        np.testing.assert_allclose(latents[index], high, atol=1e-4)
        np.testing.assert_allclose(low_res[index], low, atol=1e-4)


def test_the_workdir_is_complete_without_the_base_run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "moved")
    moved = run_of(trained, tmp_path / "moved", low_res_from=str(tmp_path / "gone"))
    assert digest(moved.low_res().tokenizer) == digest(run_of(trained).low_res().tokenizer)


def test_a_base_run_that_does_not_fit_is_refused(base, trained, tmp_path):
    with pytest.raises(UserError, match="gone holds no run; name the --workdir of the base run"):
        run_of(trained, tmp_path / "new", low_res_from=str(tmp_path / "gone")).check()
    shutil.copytree(base, tmp_path / "other")
    knobs = read_config(base)
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({**knobs, "tokenizer": {**knobs["tokenizer"], "latent_channels": 4}})
    )
    with pytest.raises(UserError, match=r"makes latents of \(2, 4, 4, 4\).*reads \(2, 4, 4, 12\)"):
        run_of(trained, tmp_path / "new", low_res_from=str(tmp_path / "other")).check()


def test_latents_without_low_resolution_are_refused(base, trained, tmp_path):
    run = run_of(trained)
    path = trained / "latents" / "denoiser"
    LatentClips(path, low_res=digest(run.low_res().tokenizer))
    with pytest.raises(UserError, match="no low-resolution latents of the tokenizer"):
        LatentClips(path, low_res=digest(run.tokenizer()))


def test_prompts_alone_are_refused(command, trained, capsys):
    assert command(f"--workdir={trained}", "--mode=sample", "--prompt=a red circle moving up") == 1
    assert "upscales clips" in capsys.readouterr().err


def test_pixels_are_shrunk_to_their_means():
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6, 3), np.uint8)
    small = shrunk(video, 2)
    assert small.shape == (2, 3, 2, 3, 3) and small.dtype == np.uint8
    np.testing.assert_array_equal(small[1, 2, 1, 2], video[1, 2, 2:4, 4:6].reshape(4, 3).mean(0).round())
