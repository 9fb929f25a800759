"""v-prediction (Salimans and Ho 2022), v = α ε − σ x, and its way back to x and ε.

W.A.L.T's equation 2 prints the target with α and σ exchanged; at zero terminal SNR that would be the network's input.
"""

from jaxtyping import Array, Float


def velocity(x: Float[Array, "*n"], noise: Float[Array, "*n"], alpha: Array, sigma: Array) -> Float[Array, "*n"]:
    return alpha * noise - sigma * x


def clean_from_velocity(v: Float[Array, "*n"], z: Float[Array, "*n"], alpha: Array, sigma: Array) -> Float[Array, "*n"]:
    return alpha * z - sigma * v


def noise_from_velocity(v: Float[Array, "*n"], z: Float[Array, "*n"], alpha: Array, sigma: Array) -> Float[Array, "*n"]:
    return sigma * z + alpha * v
