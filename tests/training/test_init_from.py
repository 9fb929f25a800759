"""Of another run's parameters what fits is taken, what differs is listed, and the rest is fresh."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from walt_jax import main
from walt_jax.config import build, plain
from walt_jax.errors import UserError
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.training.checkpoint import Checkpoints
from walt_jax.training.init_from import completed, take
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig
from walt_jax.training.state import TrainState
from walt_jax.workdir import claim

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = f"--config={pathlib.Path(__file__).parents[2] / 'configs' / 'walt_tiny.py'}"


def ones(*shape):
    return np.ones(shape, np.float32)


def test_what_fits_is_taken_and_what_differs_is_listed():
    found = {"denoiser": {"a": {"kernel": ones(2, 3)}, "space_embedding": ones(1, 2, 2, 4), "old": ones(5)}}
    found |= {"text": {"embedding": ones(7, 2)}}
    like = {"denoiser": {"a": {"kernel": ones(2, 3)}, "space_embedding": ones(1, 3, 3, 4), "b": ones(2, 9)}}
    like["denoiser"]["c"] = ones(4)
    found["denoiser"]["b"] = ones(2, 8)
    like |= {"text": {"embedding": ones(7, 2)}}
    taken = take(found, like, pathlib.Path("runs/base"), {"text": "of another vocabulary"})
    assert set(taken.params) == {"denoiser"} and set(taken.params["denoiser"]) == {"a", "space_embedding"}
    assert taken.sentences == [
        "runs/base: 2 of 5 arrays, 42 of 78 parameters fit",
        "interpolated: denoiser/space_embedding",
        "fresh: denoiser/b (2×9 here, 2×8 there), denoiser/c, text/embedding (of another vocabulary)",
        "not used: denoiser/old",
    ]
    fresh = jax.tree.map(np.zeros_like, like)
    whole = completed(taken.params, fresh)
    assert jax.tree.structure(whole) == jax.tree.structure(fresh)
    assert whole["denoiser"]["a"]["kernel"].all() and not whole["denoiser"]["c"].any()


def run_of(workdir: pathlib.Path, *flags: str) -> Run:
    knobs = plain(main.parse([TINY, *flags]).config, "config")
    run = Run(build(RunConfig, knobs, "config"), workdir)
    run.check()
    vocabulary = run.make_vocabulary()
    workdir.mkdir(parents=True, exist_ok=True)
    claim(workdir, knobs)
    run.text.keep(vocabulary)
    return run


def as_if_trained(run: Run) -> None:
    """A checkpoint of each stage, of parameters that no other run starts with."""
    for name in run.config.trained_stages:
        task = run._task(name)
        params, moving = jax.jit(lambda key, task=task: tuple(map(unboxed, task.init(key))))(jax.random.key(99))
        state = TrainState.create(params, moving, task, optax.identity(), 0.9).replace(step=jnp.int32(1))
        checkpoints = Checkpoints(run.workdir / "checkpoints" / name, writer=True)
        checkpoints.save(state, {}, {"latent_mean": [0.0], "latent_std": [1.0]})
        checkpoints.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    run = run_of(tmp_path_factory.mktemp("base") / "run")
    as_if_trained(run)
    return run


def test_another_denoiser_starts_from_a_run(base, tmp_path, capsys):
    run = run_of(tmp_path / "run", f"--config.init_from={base.workdir}", "--config.denoiser.mlp_ratio=3")
    initial = run._initial()
    tokenizer, denoiser = sorted((line for line in capsys.readouterr().out.splitlines()), reverse=True)
    assert tokenizer.startswith(f"the tokenizer starts from {base.workdir}: 83 of 83 arrays")
    assert denoiser.startswith("the denoiser starts from") and "96" in denoiser and "not used" not in denoiser
    for task in ("tokenizer", "denoiser"):
        ours, theirs = flatten_dict(initial[task]), flatten_dict(base._restored(task)[1].served)
        assert all(np.array_equal(array, theirs[path]) for path, array in ours.items())
        assert len(ours) == len(theirs) if task == "tokenizer" else 0.7 * len(theirs) < len(ours) < len(theirs)
    # Once it has begun, it does not need the other run.
    as_if_trained(run)
    base.workdir.rename(base.workdir.with_name("gone"))
    try:
        assert run._initial() == {}
    finally:
        base.workdir.with_name("gone").rename(base.workdir)


def test_nothing_fits(base, tmp_path):
    sizes = ["--config.denoiser.dim=64", "--config.denoiser.heads=4", "--config.text.encoder.dim=32"]
    flags = [*sizes, f"--config.init_from={base.workdir}", f"--config.tokenizer_from={base.workdir}"]
    with pytest.raises(UserError, match=r"nothing to start from \(.* parameters fit; .*fresh: .* here, .* there"):
        run_of(tmp_path, *flags)
    with pytest.raises(UserError, match="holds no run; name the --workdir of one"):
        run_of(tmp_path, f"--config.init_from={tmp_path / 'nowhere'}")
    assert not (tmp_path / "config.json").exists()
