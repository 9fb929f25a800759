"""Samplers: from noise at t = 1 to clean latents at t = 0, by estimates of the clean latents.

All step through evenly spaced times from 1 down to 0, trailing (Lin et al. 2023): the first evaluation is at t = 1,
where with zero terminal SNR the latents are pure noise, as in training. None is made at t = 0, so σ > 0 wherever
ε = (z − α x̂) / σ is needed. "ddpm" takes so many of DDPM's thousand steps, the first and the last among them (Nichol
and Dhariwal 2021; DiT): its last evaluation is at t = 1/1000.

The orders named are those of the error in 1/steps, down to a time that is not 0. The last step, to σ = 0, is of first
order in all: it leaves about σ² of the time before. For "cosine" and "flow", whose σ falls in proportion to t, that is
of second order too; for "linear", whose σ falls as √t, it is of first order, if small.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from walt_jax.diffusion.learned_sigma import log_variance, log_variances
from walt_jax.diffusion.schedule import STEPS

Latents = Float[Array, "b *n"]
Level = Float[Array, "..."]  # of α, σ: a scalar or broadcastable to the latents
Levels = Callable[[Float[Array, ""]], tuple[Level, Level]]  # α and σ at a time
Index = Int[Array, ""]
# (noisy latents, time, carried) -> (estimate of the clean latents, carried)
Predict = Callable[[Latents, Float[Array, ""], Any], tuple[Latents, Any]]


class TimeGrid(NamedTuple):
    """The times that a sampler visits, from noise to data, and the noise levels there.

    Attributes:
        time: from 1 to 0; zeros may follow as padding, so that one program serves any number of steps.
        levels: α and σ at a time.
    """

    time: Float[Array, " visits"]
    levels: Levels

    def alpha(self, i: Index) -> Level:
        """α at time i."""
        return self.levels(self.time[i])[0]

    def sigma(self, i: Index) -> Level:
        """σ at time i."""
        return self.levels(self.time[i])[1]

    def stride(self, i: Index) -> Level:
        """h, the change of λ = log α/σ over step i; infinite in a step from α = 0 or to σ = 0."""

        def log_ratio(i):
            return jnp.log(self.alpha(i)) - jnp.log(self.sigma(i))

        return log_ratio(i + 1) - log_ratio(i)

    def step(self, i: Index, z: Latents, x: Latents) -> Latents:
        """From time i to time i + 1 as if x were the clean latents all the way: α' x + σ' (z − α x) / σ.

        This is DDIM's equation 12 and, as α' (1 − e^{−h}) = α' − α σ'/σ, also the first-order step of DPM-Solver++,
        here without exponents, so that it holds where h is infinite.
        """
        ratio = self.sigma(i + 1) / self.sigma(i)
        return ratio * z + (self.alpha(i + 1) - ratio * self.alpha(i)) * x

    def has_slope(self, i: Index) -> Bool[Array, "..."]:
        """Whether steps i − 1 and i give x̂ a finite slope in λ: not for the first, nor where a stride is infinite."""
        return (i > 0) & jnp.isfinite(self.stride(i)) & jnp.isfinite(self.stride(i - 1))


class Solver(NamedTuple):
    """A sampler for one model and grid, evaluation by evaluation.

    Attributes:
        start: (noise, what the model carries at first) -> state, a pytree of constant shapes.
        step: (state, number of the evaluation) -> state after it; `evaluations` says how many there are.
        result: state after the last evaluation -> clean latents.
    """

    start: Callable[[Latents, Any], Any]
    step: Callable[[Any, Index], Any]
    result: Callable[[Any], Latents]


def times_of(name: str, steps: int) -> Float[np.ndarray, " steps+1"]:
    """The times that a sampler visits in so many steps."""
    times = np.linspace(1.0, 0.0, steps + 1)
    if name == "ddpm":
        times[:-1] = (1 + np.round(np.linspace(STEPS - 1, 0, steps))) / STEPS
    return times


def solver(
    name: str,
    predict: Predict,
    grid: TimeGrid,
    key: PRNGKeyArray,
    learned: Callable[[Any], Latents] | None = None,
) -> Solver:
    """A sampler that can be stopped, watched and continued between evaluations; arguments as those of `sample`."""
    if name == "ddpm":
        return ddpm(predict, grid, key, learned)
    return SAMPLERS[name](predict, grid, key)


def evaluations(name: str, steps: int) -> int:
    """How often a sampler calls the model in so many steps."""
    return 2 * steps - 1 if name == "heun" else steps


def sample(
    name: str,
    predict: Predict,
    noise: Latents,
    levels: Levels,
    steps: int,
    key: PRNGKeyArray,
    carried: Any = None,
    learned: Callable[[Any], Latents] | None = None,
) -> Latents:
    """Clean latents from noise, all evaluations in one scan.

    Args:
        name: one of `SAMPLERS`.
        predict: the model, guided or not. It is called in order of time, with what its last call returned as carried:
            any pytree of constant shapes, such as the estimates for self-conditioning.
        noise: standard normal.
        levels: α and σ at a time, such as `lambda time: schedule(time)`; they may differ from clip to clip.
        steps: how many there are; one evaluation each, for "heun" 2 · steps − 1 in all.
        key: read only by "ddpm". One for all, or an array of them along the first axes of `noise`, such as one a clip,
            which makes a clip's sample independent of the rest of its batch.
        carried: the first call's.
        learned: v of `learned_sigma`, from what `predict` returned as carried; read only by "ddpm".
    """
    time = jnp.asarray(times_of(name, steps), jnp.zeros(()).dtype)
    chosen = solver(name, predict, TimeGrid(time, levels), key, learned)
    state, count = chosen.start(noise, carried), evaluations(name, steps)
    state, _ = jax.lax.scan(lambda state, i: (chosen.step(state, i), None), state, jnp.arange(count))
    return chosen.result(state)


def ddim(predict: Predict, grid: TimeGrid, key: PRNGKeyArray) -> Solver:
    """DDIM (Song et al. 2020), η = 0, which is Euler's method along the flow's straight path too; order 1.

    With y = z / (α + σ) and s = σ / (α + σ) any schedule is the flow y = (1 − s) x + s ε, and Euler's step
    y' = y + (s' − s) (ε̂ − x̂) = (1 − s') x̂ + s' ε̂ is DDIM's over α' + σ'. So "ddim" and "euler" are one.
    """

    def step(state, i):
        z, carried = state
        x, carried = predict(z, grid.time[i], carried)
        return grid.step(i, z, x), carried

    return Solver(lambda noise, carried: (noise, carried), step, _first)


def ddpm(
    predict: Predict,
    grid: TimeGrid,
    key: PRNGKeyArray,
    learned: Callable[[Any], Latents] | None = None,
) -> Solver:
    """Ancestral sampling (Ho et al. 2020): each step draws from q(z' | z, x̂), DDIM with η = 1.

    With κ = (α/σ) / (α'/σ') = e^{−h} that posterior, for any schedule, is z' = α' x̂ + σ' (κ ε̂ + √(1 − κ²) n); where the
    variance is `learned`, that of n is.
    """

    def step(state, i):
        z, carried = state
        x, carried = predict(z, grid.time[i], carried)
        kept = grid.alpha(i) * grid.sigma(i + 1) / (grid.sigma(i) * grid.alpha(i + 1))
        eps = (z - grid.alpha(i) * x) / grid.sigma(i)
        deviation = grid.sigma(i + 1) * jnp.sqrt(jnp.maximum(1 - kept**2, 0))
        if learned is not None:
            sigma = jnp.maximum(grid.sigma(i + 1), 1e-8)  # of the last step, which has no noise
            least, most = log_variances(grid.alpha(i), grid.sigma(i), grid.alpha(i + 1), sigma)
            own = jnp.exp(0.5 * log_variance(learned(carried), least, most))
            deviation = jnp.where(grid.sigma(i + 1) > 0, own, 0)
        fresh = deviation * _normal(key, i, z)
        return grid.alpha(i + 1) * x + grid.sigma(i + 1) * kept * eps + fresh, carried

    return Solver(lambda noise, carried: (noise, carried), step, _first)


def _first(state: tuple[Latents, Any]) -> Latents:
    return state[0]


def _normal(key: PRNGKeyArray, i: Index, like: Latents) -> Latents:
    shape = like.shape[key.ndim :]
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape, like.dtype))
    return draw(key.reshape(-1)).reshape(like.shape)


def dpm_solver_2m(predict: Predict, grid: TimeGrid, key: PRNGKeyArray) -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): x̂ is extrapolated from the last two evaluations; order 2."""

    def step(state, i):
        z, before, carried = state
        x, carried = predict(z, grid.time[i], carried)
        return grid.step(i, z, _extrapolated(grid, i, x, before)), x, carried

    return Solver(lambda noise, carried: (noise, jnp.zeros_like(noise), carried), step, _first)


def _extrapolated(grid: TimeGrid, i: Index, x: Latents, before: Latents) -> Latents:
    """x̂ half a step ahead of time i, on the line in λ through times i − 1 and i; x̂ itself where it has no slope."""
    ahead = jnp.where(grid.has_slope(i), grid.stride(i) / (2 * grid.stride(i - 1)), 0)
    return x + ahead * (x - before)


def unipc(predict: Predict, grid: TimeGrid, key: PRNGKeyArray) -> Solver:
    """UniPC-2 with B₂(h) = e^h − 1 and x-prediction (Zhao et al. 2023); order 2, as a rule 3.

    Each evaluation serves twice: it corrects the step that led to it (UniC), then predicts the next one (UniP, which
    for order 2 and B₂ is DPM-Solver++(2M)). The last step has no evaluation after it and is not corrected.
    """

    def step(state, i):
        z, start, before, long_before, carried = state
        x, carried = predict(z, grid.time[i], carried)
        last = jnp.maximum(i - 1, 0)
        z = jnp.where(i > 0, grid.step(last, start, _corrected(grid, last, before, long_before, x)), z)
        return grid.step(i, z, _extrapolated(grid, i, x, before)), z, x, before, carried

    def start(noise, carried):
        return noise, noise, jnp.zeros_like(noise), jnp.zeros_like(noise), carried

    return Solver(start, step, _first)


def _corrected(grid: TimeGrid, i: Index, x: Latents, before: Latents, after: Latents) -> Latents:
    """The mean of x̂ over step i, from its values at times i, i − 1 and i + 1 (UniC-2); x̂ without slope: UniC-1.

    The weights ρ solve ρ₁ + ρ₂ = b₁ and r ρ₁ + ρ₂ = b₂, where r = −h₋/h is the place of time i − 1 if time i is at 0
    and i + 1 at 1, and b₁, b₂ are the means of that place and of its square over the step.
    """
    h, r = grid.stride(i), -grid.stride(i - 1) / grid.stride(i)
    b_1 = -1 / jnp.expm1(-h) - 1 / h
    b_2 = -1 / jnp.expm1(-h) - 2 * b_1 / h
    rho_1 = (b_1 - b_2) / (1 - r)
    full = grid.has_slope(i)
    return x + jnp.where(full, rho_1 / r, 0) * (before - x) + jnp.where(full, b_1 - rho_1, 0.5) * (after - x)


def heun(predict: Predict, grid: TimeGrid, key: PRNGKeyArray) -> Solver:
    """Heun's method along the flow's straight path (see `ddim` for y and s): dy/ds = ε̂ − x̂ = (y − x̂) / s; order 2.

    For "flow" y is z and s is t. Other schedules are converted to that form, which unlike Karras et al.'s z/α and σ/α
    (2022, algorithm 1) is finite at α = 0. As there, the last step is Euler's: at s = 0 x̂ does not determine the slope.
    """

    def total(i):
        return grid.alpha(i) + grid.sigma(i)

    def s(i):
        return grid.sigma(i) / total(i)

    # Evaluations, not steps, so that a large model is compiled once and not three times. The even ones are made at a
    # step's start, the odd ones at its end.
    def evaluation(state, j):
        y, start, slope_at_start, carried = state
        i, here = j // 2, (j + 1) // 2
        x, carried = predict(y * total(here), grid.time[here], carried)
        slope = (y - x) / s(here)
        at_start = j % 2 == 0
        start = jnp.where(at_start, y, start)
        slope_at_start = jnp.where(at_start, slope, slope_at_start)
        y = start + (s(i + 1) - s(i)) * (slope_at_start + slope) / 2
        return y, start, slope_at_start, carried

    def begin(noise, carried):
        y = noise / total(0)
        return y, y, jnp.zeros_like(y), carried

    return Solver(begin, evaluation, lambda state: state[0] * total(-1))


SAMPLERS: dict[str, Callable[[Predict, TimeGrid, PRNGKeyArray], Solver]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++2m": dpm_solver_2m,
    "unipc": unipc,
    "euler": ddim,
    "heun": heun,
}
