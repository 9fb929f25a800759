"""Sampling under conditions: observed positions keep the noise of training, and guidance leaves them out."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.diffusion.guidance import GuidanceConfig
from walt_jax.diffusion.objective import DiffusionConfig
from walt_jax.diffusion.schedule import Schedule
from walt_jax.generation.latent_diffusion import LatentDiffusion, SamplingConfig

SHAPE = (3, 2, 2, 2)
CONFIG = WaltConfig(
    dim=16, heads=2, layers=1, windows=((1, None, None),), positions="fractional", relative="rotary",
    cross_attention=False, classes=4, frame_prediction=True, self_conditioning=False,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_compilation")


class Latents:
    """In the codec's place: what is sampled comes out as it is."""

    def decode(self, tokenizer, latents):
        return latents, None


class Recorder(LatentDiffusion):
    """Notes (label, mask, observed, noisy, time) of each evaluation and answers with a plain wrong prediction."""

    calls: ClassVar[list] = []

    def denoise(self, params, condition, layout):
        def answer(noisy, time, estimate):
            noted = condition.label, condition.observed_mask, condition.observed, noisy, time
            jax.debug.callback(lambda *values: self.calls.append([np.asarray(x) for x in values]), *noted)
            return 0.3 * noisy + 1

        return answer


@pytest.fixture
def draw():
    def run(sampler, scale):
        """(what was noted of each evaluation, latents, observed, mask)"""
        Recorder.calls.clear()
        model = Recorder(Latents(), None, Denoiser(CONFIG, SHAPE[:3]), DiffusionConfig(Schedule("cosine"), "x0"), SHAPE)
        observed = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
        mask = np.zeros((2, *SHAPE[:3], 1), np.float32)
        mask[0, :1] = mask[1, :2] = 1  # clips differ
        labels, empty = jnp.array([[1], [2]]), jnp.array([4])
        config = SamplingConfig(6, sampler, GuidanceConfig(scale=scale))
        out = model.sample({}, None, labels, empty, np.arange(2, dtype=np.uint32), config, observed, mask)
        jax.block_until_ready(out)
        jax.effects_barrier()
        return Recorder.calls[:], np.asarray(out), observed, mask

    return run


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "unipc"])
def test_observed_positions_follow_the_forward_process(draw, sampler):
    """Their noise at each time is the first noise scaled, as in training, however wrong the denoiser is."""
    calls, out, observed, mask = draw(sampler, 1.0)
    calls.sort(key=lambda call: -call[-1].max())
    where = np.broadcast_to(mask.reshape(2, 12, 1), (2, 12, 2)) == 1
    clean, schedule, noises = observed.reshape(2, 12, 2), Schedule("cosine"), []
    for *_, noisy, time in calls:
        alpha, sigma = (np.asarray(level)[..., None] for level in schedule(jnp.asarray(time)))
        noises.append(((noisy - alpha * clean) / sigma)[where])
    assert len({float(call[-1].max()) for call in calls}) >= 5
    for noise in noises[1:]:
        np.testing.assert_allclose(noise, noises[0], atol=2e-2)
    np.testing.assert_array_equal(out.reshape(2, 12, 2)[where], clean[where])


def test_guidance_leaves_observed_positions_out(draw):
    calls, *_, observed, mask = draw("ddim", 2.0)
    conditional = [call for call in calls if (call[0] != 4).all()]
    unconditional = [call for call in calls if (call[0] == 4).all()]
    assert len(conditional) == len(unconditional) == len(calls) / 2 > 0
    for _, seen_mask, seen, *_ in conditional:
        np.testing.assert_array_equal(seen_mask, mask.reshape(2, 12, 1))
        np.testing.assert_allclose(seen, (observed * mask).reshape(2, 12, 2))
    for _, seen_mask, seen, *_ in unconditional:
        assert not seen_mask.any()
        assert not seen.any()
