"""Noise schedules: z_t = α(t) x + σ(t) ε, with t from 0 (clean) to 1 (noise)."""

import functools
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

STEPS = 1000
BETAS = {
    "linear": np.linspace(1e-4, 0.02, STEPS),
    "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2,
}


@dataclass(frozen=True)
class Schedule:
    """How much signal and noise there is at each time. Called with times, it returns α and σ.

    Attributes:
        name: "linear", DDPM's β from 1e-4 to 0.02 in 1000 steps, as in W.A.L.T; "scaled_linear", whose √β is linear and
            β goes from 0.00085 to 0.012 (Stable Diffusion, Rombach et al. 2022; U-ViT); "cosine", α = cos(πt/2) (Nichol
            and Dhariwal 2021, without offset); "flow", α = 1 − t (Lipman et al. 2022, Liu et al. 2022), which has
            α + σ = 1. The others have α² + σ² = 1.
        zero_terminal_snr: whether α(1) = 0, for the two of β. Off is DDPM's plain schedule, with α(1) = 0.006, and
            Stable Diffusion's, with 0.068; on is W.A.L.T's, rescaled as in Lin et al. 2023, algorithm 1. "cosine" and
            "flow" have zero terminal SNR themselves.
        shift: by which σ/α is multiplied at every time, so that log SNR falls by 2 log shift. More tokens carry the
            same picture through more noise, so they need more (simple diffusion, Hoogeboom et al. 2023, section 3.1,
            with shift = d/64). For "flow" it is t' = shift · t / (1 + (shift − 1) t) (SD3, Esser et al. 2024,
            equation 23).
    """

    name: Literal["linear", "scaled_linear", "cosine", "flow"]
    zero_terminal_snr: bool = True
    shift: float = 1.0

    def __post_init__(self):
        if not self.zero_terminal_snr and self.name not in BETAS:
            raise ValueError(f"zero_terminal_snr is off, but {self.name!r} has zero terminal SNR itself; leave it out")
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift:g}; it should be more than 0")

    @property
    def terminal_snr_is_zero(self) -> bool:
        """Whether α(1) = 0: sampling then starts from just what training saw at t = 1."""
        return self.zero_terminal_snr

    def __call__(
        self, time: Float[Array, "*n"], shift: Float[Array, "*n"] | None = None
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        """α and σ at `time`, exactly 1 and 0 at t = 0, and exactly 0 and 1 at t = 1 where terminal SNR is zero.

        Args:
            time: 0..1.
            shift: more than 0; multiplied with the schedule's own, such as each clip's `times.resolution_shift`.
        """
        if self.name in BETAS:
            alpha, sigma = self._tabulated(time)
        elif self.name == "cosine":
            # The sine of the complement, for in float32 the cosine of π/2 is not zero.
            alpha, sigma = jnp.sin(0.5 * jnp.pi * (1 - time)), jnp.sin(0.5 * jnp.pi * time)
        else:
            alpha, sigma = 1 - time, time
        if shift is None and self.shift == 1:
            return alpha, sigma
        return self._rescaled(alpha, sigma * (self.shift if shift is None else self.shift * shift))

    def time_of(self, alpha: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The time at which the schedule, its own shift included, has this α (0..1).

        Near t = 0 α is flat, so in float32 the cosine schedule's time is known to about 3e-4 there. An α below that of
        t = 1 gives 1.
        """
        sigma = 1 - alpha if self.name == "flow" else jnp.sqrt(1 - alpha**2)
        alpha, sigma = self._rescaled(alpha, sigma / self.shift)
        if self.name in BETAS:
            table = alphas(self.name, self.zero_terminal_snr)
            times = jnp.asarray(np.linspace(1.0, 0.0, STEPS + 1), alpha.dtype)
            rising = jnp.asarray(table[::-1], alpha.dtype)
            return jnp.interp(alpha.reshape(-1), rising, times).reshape(alpha.shape)
        if self.name == "cosine":
            return jnp.arctan2(sigma, alpha) / jnp.arctan2(jnp.ones_like(sigma), jnp.zeros_like(alpha))
        return sigma

    def _tabulated(self, time: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        times = jnp.asarray(np.linspace(0.0, 1.0, STEPS + 1), time.dtype)
        table = jnp.asarray(alphas(self.name, self.zero_terminal_snr), time.dtype)
        alpha = jnp.interp(time.reshape(-1), times, table).reshape(time.shape)
        return alpha, jnp.sqrt(1 - alpha**2)

    def _rescaled(
        self, alpha: Float[Array, "*n"], sigma: Float[Array, "*n"]
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        """The pair of the same ratio that keeps what the schedule keeps, α² + σ² or α + σ."""
        total = alpha + sigma if self.name == "flow" else jnp.hypot(alpha, sigma)
        return alpha / total, sigma / total


@functools.cache
def alphas(name: str, zero_terminal_snr: bool) -> np.ndarray:
    """α = √ᾱ of a schedule of β at t = 0, 1/1000, ..., 1; DDPM's first step comes after the clean 1."""
    root = np.sqrt(np.cumprod(1 - BETAS[name]))
    if zero_terminal_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return np.concatenate([[1.0], root])
