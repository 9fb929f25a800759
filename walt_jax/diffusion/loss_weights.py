"""The weight of the squared error at each noise level: min-SNR-γ (Hang et al. 2023)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.diffusion.parameterization import Kind


def min_snr(kind: Kind, alpha: Float[Array, "*n"], sigma: Float[Array, "*n"], gamma: float) -> Float[Array, "*n"]:
    """The weight of a prediction's squared error that makes the error of x count min(SNR, γ), SNR = α²/σ².

    At a fixed z an error e of x is one of e α/σ in ε, of e (α² + σ²)/σ in v and of e (α + σ)/σ in u = ε − x. Dividing
    by those squares leaves min(α², γσ²) over σ², α², (α² + σ²)² and (α + σ)². With α² + σ² = 1 these are the
    paper's min(SNR, γ), min(SNR, γ) / SNR and min(SNR, γ) / (SNR + 1), and the one for u that it doesn't give.

    Args:
        kind: what is predicted.
        alpha: 0..1.
        sigma: 0..1, not 0 together with alpha.
        gamma: 5 in the paper.

    Returns:
        Finite at both ends. Where α = 0 it is 0 for x0, v and flow: they have no loss at zero SNR.
    """
    signal, noise = alpha**2, sigma**2
    match kind:
        # A division by 0 gives infinity here, which the minimum takes away.
        case "x0":
            return jnp.minimum(signal / noise, gamma)
        case "eps":
            return jnp.minimum(1.0, gamma * noise / signal)
        case "v":
            return jnp.minimum(signal, gamma * noise) / (signal + noise) ** 2
        case "flow":
            return jnp.minimum(signal, gamma * noise) / (alpha + sigma) ** 2
    raise ValueError(f"{kind!r} is no parameterisation")
