"""Requests of any size, alone, in batches and in packs; long videos, window by window."""

import dataclasses

import jax
import numpy as np
import pytest
from small_generator import make

from walt_jax.denoiser.resize import resize
from walt_jax.diffusion.guidance import APGConfig, GuidanceConfig
from walt_jax.errors import UserError
from walt_jax.generation import packs
from walt_jax.generation.asking import encoded
from walt_jax.generation.latent_diffusion import NEVER, LatentDiffusion, SamplingConfig, unboxed
from walt_jax.generation.long_video import segments, windows
from walt_jax.generation.packs import can_pack
from walt_jax.generation.request import Given, Request
from walt_jax.parallel.mesh import MeshConfig, make_mesh, on, replicated

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def generator():
    return make()


SIZES = [(9, 16, 16), (5, 16, 24), (1, 24, 16), (9, 16, 16)]


def test_a_pack_gives_each_request_what_it_gives_alone(generator):
    """With conditions, negative prompts and seeds of their own."""
    rng = np.random.default_rng(0)
    requests = []
    for number, size in enumerate(SIZES):
        shape = generator.shape(size)
        until = rng.choice([0, 0.4, NEVER], (*shape[:3], 1)).astype(np.float32)
        given = Given(rng.normal(size=shape).astype(np.float32), until) if number != 1 else None
        requests.append(Request("ab"[number % 2], number, "c" * number, size, given))
    together = generator.latents(requests)
    for request, latents in zip(requests, together, strict=True):
        assert latents.shape == generator.shape(request.size)
        [alone] = generator.latents([request])
        np.testing.assert_allclose(latents, alone, atol=2e-4, rtol=1e-4)
        if request.given is not None:
            kept = np.broadcast_to(request.given.until == 0, latents.shape)
            np.testing.assert_allclose(latents[kept], request.given.latents[kept], atol=1e-6)
    assert np.abs(together[0] - together[3]).max() > 0.1


@pytest.mark.parametrize(
    ("apg", "packs_too"),
    [(APGConfig(0.0), False), (APGConfig(1.0, 2.0), False), (APGConfig(1.0, 0.0, -0.5), True)],
)
def test_guidance_that_measures_clips_is_not_packed(generator, apg, packs_too):
    """Momentum alone is each value's own, and a pack gives what its clips give alone."""
    config = SamplingConfig(2, guidance=GuidanceConfig(2.0, apg=apg), batch_size=2)
    assert can_pack(generator.model, config) == packs_too
    if packs_too:
        generator = dataclasses.replace(generator, config=config)
        requests = [Request("a", 0, size=SIZES[0]), Request("b", 1, size=SIZES[2])]
        for request, latents in zip(requests, generator.latents(requests), strict=True):
            np.testing.assert_allclose(latents, generator.latents([request])[0], atol=2e-4, rtol=1e-4)


def test_each_request_matters(generator):
    """Prompt, negative prompt and seed each change what is made."""
    base = Request("a", 1)
    changes = {"prompt": "b"}, {"negative_prompt": "b"}, {"seed": 2}
    others = [dataclasses.replace(base, **change) for change in changes]
    first, *changed = generator.latents([base, *others])
    assert all(np.abs(first - other).max() > 1e-3 for other in changed)


def test_windows_that_do_not_divide_a_size_are_a_pack_of_one():
    """On a grid that is smaller than the window it is the same as a window of a whole frame, which is the twin."""
    whole = make(windows=((1, None, None), (None, 1, 1)))
    cut = make(windows=((1, 2, 2), (None, 1, 1)))
    request = Request("a", 3, size=(5, 8, 16))  # 2 × 1 × 2 tokens
    [expected], [got] = whole.latents([request]), cut.latents([request])
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=1e-4)


def test_tables_of_positions_are_interpolated_to_another_size():
    learned = make(positions="learned", relative="bias")
    model, params = learned.at([(3, 4, 2)])
    assert model.denoiser.bounds == (3, 4, 2)
    table = params["denoiser"]["space_embedding"]
    assert table.shape[1:3] == (4, 2)
    like = unboxed(jax.eval_shape(model.init, jax.random.key(0)))["denoiser"]
    twin = resize(learned.params["denoiser"], like)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (params["denoiser"], twin)), strict=True))
    [latents] = learned.latents([Request("a", size=(9, 32, 16))])
    assert latents.shape == learned.shape((9, 32, 16)) and np.isfinite(latents).all()


@pytest.mark.parametrize(
    ("size", "says"),
    [((10, 16, 16), "1 \\+ 4·k"), ((9, 12, 16), "height of 12 .* multiple of 8"), ((9, 16, 3), "width of 3 .* 8")],
)
def test_a_size_that_can_not_be_made_is_refused_with_the_nearest(generator, size, says):
    with pytest.raises(UserError, match=says):
        generator.shape(size)


def test_what_watches_sees_every_evaluation_and_can_end_it(generator):
    seen = []

    def watch(numbers, number, count, estimate):
        seen.append((numbers, number, count, estimate(0).shape))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.latents([Request("a"), Request("b"), Request("c")], watch=watch)
    shape = generator.model.latent_shape
    assert seen == [([0, 1], 1, 2, shape), ([0, 1], 2, 2, shape), ([2], 1, 2, shape)]


def test_all_evaluations_share_a_program_and_have_ended_when_they_are_watched(generator):
    """With parameters as runs restore them: on a mesh, also of one device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(generator.params, replicated(mesh))
    model, ended, before = generator.model, [], LatentDiffusion._step._cache_size()
    config = SamplingConfig(12, guidance=GuidanceConfig(scale=2.0))
    text = np.ones((3, 8), np.int32)  # a size that no other test has
    with on(mesh):
        model.sample(params, text, text, np.arange(3), config, on_step=lambda *step: ended.append(step[2].is_ready()))
    assert ended == [True] * 12 and LatentDiffusion._step._cache_size() == before + 1


@pytest.mark.parametrize(("total", "size", "observed"), [(5, 5, 2), (6, 5, 2), (20, 5, 2), (9, 2, 1), (30, 8, 4)])
def test_windows_cover_a_video_once(total, size, observed):
    made = []
    for window in windows(total, size, observed):
        assert window.stop - window.start == size
        assert window.start + window.done == len(made)  # what is there before it reaches up to what is new
        assert not made or window.done >= observed
        made += range(window.start + window.done, window.stop)
    assert made == list(range(total))


def test_a_long_video_is_decoded_once_and_begins_like_a_short_one(generator):
    """Its frames are those of its latents, decoded as one; the first window is the short video."""
    size = (21, 16, 16)
    shape = generator.shape(size)
    last = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    until = np.full((*shape[:3], 1), NEVER, np.float32)
    until[-1] = 0
    found = list(segments(generator, Request("a", 5, size=size, given=Given(last, until))))
    latents = np.concatenate([segment.latents for segment in found])
    frames = np.concatenate([segment.frames for segment in found])
    assert latents.shape == shape and frames.shape == (*size, 3)
    whole = np.asarray(generator.model.codec.decode(generator.tokenizer, latents[None])[0][0])
    assert np.abs(whole.astype(int) - frames).max() <= 1
    [short] = generator.latents([Request("a", 5)])
    np.testing.assert_allclose(latents[:3], short, atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(latents[-1], last[-1], atol=1e-6)  # given at the end
    assert np.abs(latents[3:5] - latents[1:3]).max() > 1e-3


def test_encoding_in_chunks_is_encoding_at_once(generator):
    video = np.random.default_rng(0).integers(0, 255, (37, 16, 16, 3), np.uint8)
    whole = generator.model.codec.encode(generator.tokenizer, video[None])[0][0]
    np.testing.assert_allclose(encoded(generator.model.codec, generator.tokenizer, video), whole, atol=1e-4)


def test_many_mixes_of_sizes_are_few_shapes(generator):
    """Of a pack: what a program is compiled for."""
    rng, shapes, mixes = np.random.default_rng(0), set(), set()
    clips = [generator.shape(size) for size in ((9, 16, 16), (9, 16, 24), (5, 24, 24))]
    for _ in range(40):
        mix = sorted(rng.integers(0, 3, rng.integers(2, 9)).tolist())
        ids = np.ones((len(mix), 8), np.int32)
        packed = packs.pack(
            generator.model, [clips[one] for one in mix], ids, ids, np.arange(len(mix)), [None] * len(mix)
        )
        leaves, structure = jax.tree.flatten(packed.asked)
        shapes.add((structure, *(leaf.shape for leaf in leaves)))
        mixes.add(tuple(mix))
    assert len(mixes) > 25 and len(shapes) < 12


def test_rounding_adds_a_quarter_at_most():
    for count in range(1, 2000):
        assert count <= packs.rounded(count) <= 1.25 * count and packs.rounded(packs.rounded(count)) == packs.rounded(
            count
        )
    assert len({packs.rounded(count) for count in range(1, 1025)}) < 40
