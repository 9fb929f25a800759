"""Content-adaptive noise levels: a clip with much detail and motion is trained at more noise than a smooth, still one.

A clip's gradient energy raises its training time. The model is conditioned on the raised time, so its target at a noise
level stays the same; only the frequency of such clips at that level changes. Samplers are not affected.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.diffusion.schedule import Schedule


def complexity(latents: Float[Array, "b t h w c"]) -> Float[Array, " b"]:
    """Each clip's gradient energy, 0 (flat) to 2 (a chequerboard in time and space); white noise has about 1.

    The mean squared difference of neighbours in time, in height and in width, each over twice the clip's variance about
    its channels' means, which is what independent neighbours would have; then the mean of the three. An axis of length
    1 counts 0, so an image has the complexity of a still clip of it, and contrast does not matter.
    """
    latents = latents.astype(jnp.float32)
    each = (1, 2, 3, 4)
    centred = latents - latents.mean(axis=(1, 2, 3), keepdims=True)
    variance = jnp.square(centred).mean(axis=each)
    energy = jnp.zeros_like(variance)
    for axis in (1, 2, 3):
        if latents.shape[axis] > 1:
            energy += jnp.square(jnp.diff(latents, axis=axis)).mean(axis=each)
    # A flat clip has neither energy nor variance: its complexity is 0.
    return energy / (3 * 2 * jnp.maximum(variance, 1e-12))


def adapted_time(
    schedule: Schedule, time: Float[Array, "*n"], complexity: Float[Array, "*n"], strength: float
) -> Float[Array, "*n"]:
    """The time t' at which ᾱ(t') = ᾱ(t)^(1 + strength · complexity), with ᾱ = α².

    t = 0 and t = 1 stay where they are, strength 0 changes nothing, and more complexity never means less noise. A
    clip's own shift is left out of ᾱ here; it is applied to t' as it would be to t.

    Args:
        schedule: of the model.
        time: 0..1.
        complexity: at least 0.
        strength: at least 0; at 1 white noise has its ᾱ squared.
    """
    power = 1 + strength * complexity
    alpha, _ = schedule(time)
    # Never below `time`: `time_of` would lose digits of it.
    return jnp.where(power > 1, jnp.maximum(schedule.time_of(alpha**power), time), time)
