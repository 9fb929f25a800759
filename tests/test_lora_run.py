"""LoRA from the command line: a stage on a trained run, its file, samples with and without it, exports."""

import json
import shutil

import jax
import numpy as np
import pytest

import walt_jax
from walt_jax import main
from walt_jax.config import build, plain
from walt_jax.errors import UserError
from walt_jax.generation import lora_files
from walt_jax.generation.lora import merged
from walt_jax.generation.lora_files import FILE, Chosen
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig
from walt_jax.workdir import claim

pytestmark = pytest.mark.usefixtures("quick_compilation")
STAGE = "--config.stages.denoiser"
PROMPT = "a red circle moving up"


def prepared(base, workdir, *flags):
    """The run of `walt_tiny`'s denoiser stage as LoRA of a base, checked as the command checks it."""
    knobs = plain(
        main.parse(
            [
                "--config=configs/walt_tiny.py",
                f"--config.init_from={base}",
                f"--config.tokenizer_from={base}",
                f"{STAGE}.lora.rank=2",
                f"{STAGE}.steps=3",
                f"{STAGE}.cached_clips=4",
                f"{STAGE}.preview_every=100",
                *flags,
            ]
        ).config,
        "config",
    )
    run = Run(build(RunConfig, knobs, "config"), workdir)
    run.check()
    vocabulary = run.make_vocabulary()
    workdir.mkdir(parents=True, exist_ok=True)
    claim(workdir, knobs)
    run.text.keep(vocabulary)
    return run


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """(the base's workdir, the LoRA's run), whose base has gone once it had begun."""
    base = tmp_path_factory.mktemp("lora") / "base"
    shutil.copytree(tiny_run, base)
    run = prepared(base, base.with_name("run"))
    with run.on_mesh():
        run.train()
    return base, run


def test_the_run_is_the_base_with_its_file_merged(trained):
    base, run = trained
    before = walt_jax.load(base).generator.params
    found = run.generator().params
    for wanted in (
        merged(before, run._restored("denoiser")[1].served, 8.0 / 2),
        lora_files.with_loras(before, [Chosen(run.workdir / FILE)]),
        walt_jax.load(base, lora=str(run.workdir)).generator.params,
    ):
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    pairs = zip(*map(jax.tree.leaves, (found, before)), strict=True)
    assert any((np.asarray(one) != np.asarray(two)).any() for one, two in pairs)


def test_it_does_not_need_the_base_any_more(trained):
    base, run = trained
    hidden = base.with_name("hidden")
    base.rename(hidden)
    try:
        again = Run(run.config, run.workdir)
        again.check()
        assert again.make_vocabulary() == (run.workdir / "vocabulary.model").read_bytes()
        both = (one.generator().params for one in (run, again))
        assert all(np.array_equal(one, two) for one, two in zip(*map(jax.tree.leaves, both), strict=True))
    finally:
        hidden.rename(base)


def sample(workdir, out, *flags):
    code = main.main([f"--workdir={workdir}", "--mode=sample", f"--prompt={PROMPT}", f"--out={out}", *flags])
    rows = json.loads((out / "samples.json").read_text()) if code == 0 else None
    return code, rows


def test_samples_and_exports_of_the_command_line(trained, tmp_path, capsys):
    base, run = trained
    lora = f"--lora={run.workdir}:0.5"
    code, [row] = sample(base, tmp_path / "out", lora, lora, "--int8")
    assert code == 0 and row["loras"] == ["run:0.5", "run:0.5"] and row["int8"] is True
    assert main.main([f"--workdir={base}", "--mode=export", lora, lora, f"--out={tmp_path / 'exported'}"]) == 0
    exported = walt_jax.load(tmp_path / "exported").generator.params
    for one, two in zip(*map(jax.tree.leaves, (exported, run.generator().params)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    again = walt_jax.load(tmp_path / "exported", lora=[f"{run.workdir}:-1"], int8=True).generator.params
    plain = walt_jax.load(base, int8=True).generator.params
    for one, two in zip(*map(jax.tree.leaves, (again, plain)), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=2 if one.dtype == np.int8 else 1e-5)
    for flags, says in (
        (["--mode=evaluate", lora], "--lora is for sample and export; --mode=evaluate takes none"),
        (["--mode=export", "--int8", f"--out={tmp_path / 'other'}"], "--int8 is for --mode=sample"),
        (["--mode=sample", f"--prompt={PROMPT}", f"--lora={tmp_path}"], "there is no"),
    ):
        capsys.readouterr()
        assert main.main([f"--workdir={base}", *flags]) == 1
        assert says in capsys.readouterr().err


def test_another_model_is_refused_before_training(trained, tmp_path):
    base, run = trained
    for flags, says in (
        (
            ["--config.denoiser.mlp_ratio=3"],
            "mlp_in.* of .* is another than this config's, and LoRA",
        ),
        (["--config.diffusion.times.mean=0.5"], "config.diffusion of .* is another than this config's"),
        ([f"--config.init_from={run.workdir}"], "has trained a LoRA itself; name the run that it has changed"),
    ):
        with pytest.raises(UserError, match=says):
            prepared(base, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
