"""The log's rates are what its steps did in their time; programs know their operations and when they are made again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.diffusion.objective import Binned
from walt_jax.errors import UserError
from walt_jax.parallel.mesh import MeshConfig, make_mesh
from walt_jax.training import stage_log
from walt_jax.training.norms import norms_by_module
from walt_jax.training.profiling import profile_steps
from walt_jax.training.stage_log import Peak, StageLog, Work
from walt_jax.training.state import OPTIMIZER
from walt_jax.training.step_programs import StepPrograms

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the log believes to have passed."""
    now = [0.0]
    monkeypatch.setattr(stage_log.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rates_are_means_over_the_steps_since_the_last_line(tmp_path, clock, capsys):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    log = StageLog(tmp_path, "first", 7, 0, 3, tuple, mesh, Peak(1000.0, "a table"))
    log.paused()  # the first step was compiled
    for step, seconds in enumerate((9.0, 2.0, 4.0, 1.0, 1.0, 1.0, 5.0), 1):
        clock(seconds)
        levels = Binned(np.array([2.0 * step, 1, 0, 0]), np.array([2.0, 0, 0, 0]) if step < 4 else np.zeros(4))
        metrics = {"loss": jnp.float32(step), "gradient_norm": jnp.float32(1), "other": step, "loss_by_noise": levels}
        log.report(step, Work(clips=4, tokens=100 * step, waited=0.5, flops=600.0), metrics)
        if step == 2:
            log.warn(step, "A sentence.")
    log.close()
    first, second, last = rows(tmp_path)
    expected = {
        "step": 3, "loss": 3, "other": 3, "step_seconds": 3, "clips_per_second": 8 / 6, "model_flops": 600,
        "tokens_per_second_per_device": 500 / 6, "data_wait_fraction": 1 / 6, "mfu": 1200 / 6 / 1000,
        "mfu_peak_flops_per_second": 1000, "loss_noise_0_25": 2, "elapsed_seconds": 15,
    }  # fmt: skip
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert (first["mfu_peak"], first["warnings"]) == ("a table", ["A sentence."])
    assert "loss_noise_25_50" not in first  # no clip had such a time
    assert (second["step"], second["step_seconds"], "warnings" in second) == (6, 1, False)
    assert (last["step"], last["step_seconds"]) == (7, 5)
    assert "warning: Step 2 of first: A sentence." in capsys.readouterr().err


def test_a_step_that_is_not_logged_must_be_finite_too(tmp_path):
    log = StageLog(tmp_path, "first", 9, 0, 5, tuple, make_mesh(MeshConfig(), jax.devices()[:1]), None)
    with pytest.raises(UserError, match="stopped at step 1, where gradient_norm is nan"):
        log.report(1, Work(1, 1, 0.0, 0.0), {"loss": jnp.float32(1), "gradient_norm": jnp.float32("nan")})
    log.close()


def product_step():
    @jax.jit
    def step(state, frozen, batch, key):
        layer = jax.checkpoint(lambda w, x: jnp.sin(x @ w).sum())
        slope = jax.grad(layer)(state, batch["x"])
        with jax.named_scope(OPTIMIZER):
            update = slope @ slope
        return state - 0.1 * update, {"loss": update.sum()}

    return step


def test_programs_count_their_own_operations_and_say_when_they_are_made_again():
    programs, key = StepPrograms(product_step()), jax.random.key(0)
    batch, other = ({"x": np.ones((rows, 3), np.float32)} for rows in (5, 7))
    seen = []
    for state, some in [
        (jnp.ones((3, 3)), batch),
        (jnp.ones((3, 3)), batch),
        (jnp.ones((3, 3)), other),
        (jnp.ones((3, 3), jnp.bfloat16), batch),
    ]:
        *_, warning = programs(state, None, some, key)
        seen.append((programs.compiled, programs.flops, warning))
    programs.close()
    # Forward, and the kernel's gradient; not what is computed again, nor the optimizer's product.
    assert [(compiled, flops) for compiled, flops, _ in seen] == [(True, 180), (False, 180), (True, 252), (True, 180)]
    assert [warning for *_, warning in seen[:3]] == [None] * 3
    assert "compiled again" in seen[3][2] and seen[3][2].endswith("compiled for before, x float32[5,3].")


def test_packs_should_all_have_one_shape():
    programs = StepPrograms(product_step(), one_shape=True)
    *_, first = programs(jnp.ones((3, 3)), None, {"x": np.ones((5, 3), np.float32)}, jax.random.key(0))
    *_, second = programs(jnp.ones((3, 3)), None, {"x": np.ones((7, 3), np.float32)}, jax.random.key(0))
    programs.close()
    assert first is None
    assert second.endswith("for new shapes, x float32[7,3].")


def test_norms_of_the_modules_of_each_model():
    tree = {
        "denoiser": {"cycle0": {"a": jnp.array([3.0])}, "cycle12": {"a": jnp.array([4.0])}, "patch_in": jnp.ones(4)},
        "discriminator": {"scale0_block1": jnp.array([-2.0])},
        "w": jnp.ones(9),
    }
    found = norms_by_module("gradient_norm", tree)
    assert {name: float(value) for name, value in found.items()} == {
        "gradient_norm/denoiser/cycle": 5,
        "gradient_norm/denoiser/patch_in": 2,
        "gradient_norm/discriminator/scale": 2,
        "gradient_norm/w": 3,
    }


@pytest.mark.parametrize("text", ["10", "15:10", "0:3", "a:b", "1:2:3", "-1:3"])
def test_steps_to_trace_are_a_first_and_a_last_one(text):
    with pytest.raises(UserError, match=f"--profile_steps={text} should be the first and the last step"):
        profile_steps(text)
    assert profile_steps("10:15") == (10, 15)
