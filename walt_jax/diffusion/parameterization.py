"""What a network predicts, and how the clean latents x follow from it.

All are predictions at the same z = α x + σ ε, for any α and σ, not only those with α² + σ² = 1:

    eps   ε                 (Ho et al. 2020); does not determine x where α = 0, that is at t = 1
    x0    x                 does not determine ε where σ = 0, that is at t = 0
    v     v = α ε − σ x     (Salimans and Ho 2022); determines both at both ends
    flow  u = ε − x         (Liu et al. 2022), the velocity of z = (1 − t) x + t ε; determines both at both ends

Where a kind determines nothing, the division here gives infinity or NaN.

W.A.L.T's equation 2 prints v with α and σ exchanged; at zero terminal SNR that would be the network's input.
"""

from typing import Literal

from jaxtyping import Array, Float

Kind = Literal["eps", "x0", "v", "flow"]


def target(kind: Kind, x: Float[Array, "*n"], noise: Float[Array, "*n"], alpha: Array, sigma: Array):
    """What a network of this kind is trained to predict; α and σ broadcast to x."""
    match kind:
        case "eps":
            return noise
        case "x0":
            return x
        case "v":
            return alpha * noise - sigma * x
        case "flow":
            return noise - x
    raise ValueError(f"{kind!r} is no parameterisation")


def clean(kind: Kind, prediction: Float[Array, "*n"], z: Float[Array, "*n"], alpha: Array, sigma: Array):
    """The x that follows from a prediction at z; for "eps" α should not be 0."""
    match kind:
        case "eps":
            return (z - sigma * prediction) / alpha
        case "x0":
            return prediction
        case "v":
            return (alpha * z - sigma * prediction) / (alpha**2 + sigma**2)
        case "flow":
            return (z - sigma * prediction) / (alpha + sigma)
    raise ValueError(f"{kind!r} is no parameterisation")
