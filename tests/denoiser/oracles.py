"""What the denoiser's tests share: packs to try, and attention written the slow and obvious way."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from walt_jax.denoiser.attend import attend
from walt_jax.denoiser.windows import Window

# All packs have one shape, whatever is in them, so that one compiled program is tried on many.
PACKS, TOKENS, CLIPS = 3, 96, 3
LARGEST = (3, 5, 6)
GRIDS = st.tuples(*(st.integers(1, most) for most in LARGEST))
WINDOWS = st.builds(Window, *3 * [st.none() | st.integers(1, 4)])


def _fitting(grids):
    kept = []
    for grid in grids:
        if math.prod(grid) + sum(map(math.prod, kept)) <= TOKENS:
            kept.append(grid)
    return kept


# Of one to three packs, the others empty.
BATCHES = st.lists(st.lists(GRIDS, max_size=CLIPS).map(_fitting), min_size=1, max_size=PACKS).map(
    lambda packs: packs + [[]] * (PACKS - len(packs))
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(module, *arguments, scale=0.3):
    """All parameters random: what is zero at initialisation would hide mistakes."""
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *arguments))
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([scale * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def with_all_pairs(query, key, value, bias, places, segments):
    """A kernel's arguments the obvious way: a bias and a mask for all pairs."""
    if bias is not None and places is None:
        bias = bias[None]
    elif bias is not None:
        bias = jnp.moveaxis(bias[:, places[0][:, :, None], places[1][:, None]], 1, 0)
    mask = None if segments is None else (segments[0][:, :, None] == segments[1][:, None])[:, None]
    return attend(query, key, value, bias, mask)


def assert_near(ours, theirs, most):
    """No array differs by more than this part of its norm."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.linalg.norm(one - other) < most * np.linalg.norm(other)


def assert_nothing_seen_is_zero(fused):
    """A query that sees no key has zeros, and nothing has a gradient through it."""
    arguments = tuple(normal(i, 1, 3, 1, 8) for i in range(3))
    segments = np.array([[0, 0, 5]]), np.array([[0, 0, 0]])

    def weighed(q, k, v):
        out, logsum = fused(q, k, v, segments=segments, interpret=True)
        return out[:, 2].sum(), (out, logsum)

    slopes, (out, logsum) = jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(*arguments)
    assert not out[:, 2].any() and (logsum[:, 2] < -1e37).all()
    assert not any(x.any() for x in slopes)


def places_of(packs, tokens):
    """(clip, t, y, x) of each token, counted one by one."""
    places = np.full((len(packs), tokens, 4), -1)
    for pack, grids in enumerate(packs):
        row = [(clip, *place) for clip, grid in enumerate(grids) for place in np.ndindex(*grid)]
        places[pack, : len(row)] = np.array(row).reshape(-1, 4)
    return places


def seen(packs, window, tokens, isolate_images=False):
    """[b, n, n]: whether the first token sees the second. Each sees itself, those that only fill up nothing else."""
    sees = np.tile(np.eye(tokens, dtype=bool), (len(packs), 1, 1))
    for pack, grids in enumerate(packs):
        start = 0
        for grid in grids:
            stop = start + math.prod(grid)
            if not (isolate_images and window.time != 1 and grid[0] == 1):
                places = np.array(list(np.ndindex(*grid)))
                cells = places // [10**6 if size is None else size for size in window]
                sees[pack, start:stop, start:stop] = (cells[:, None] == cells[None]).all(-1)
            start = stop
    return sees


def turned(x, places):
    """Rotary embedding: pairs of features as complex numbers, turned by t, y or x times their frequency."""
    pairs = x.shape[-1] // 2
    side = 3 * pairs // 8
    angles = [
        place * 10_000 ** (-number / count)
        for place, count in zip(np.moveaxis(places, -1, 0), (pairs - 2 * side, side, side), strict=True)
        for number in range(count)
    ]
    turn = np.exp(1j * np.stack(angles, -1))[:, :, None]
    z = (x[..., :pairs] + 1j * x[..., pairs:]) * turn
    return np.concatenate([z.real, z.imag], -1)


def masked(query, key, value, numbers, bias):
    """`grouped`'s answer from all pairs of tokens under a mask; those with number -1 see themselves only."""
    mask = (numbers[:, :, None] == numbers[:, None]) & (numbers >= 0)[:, :, None]
    mask = mask | np.eye(numbers.shape[1], dtype=bool)[None]
    return attend(query, key, value, bias, mask[:, None])


def dense_attention(params, x, places, sees, bounds, heads, relative="bias", text=None, text_mask=None, xp=np):
    """All tokens of a pack against all of its tokens and all of its clips' text, under a mask.

    In double precision with numpy; with `xp=jnp` it has gradients.

    Args:
        x: [b, n, d].
        places: (clip, t, y, x) of each token, [b, n, 4].
        sees: [b, n, n].
        text, text_mask: [b, s, m, d] and [b, s, m].
    """
    if xp is np:
        params, x, text = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x, text))

    def projected(name, y):
        y = y @ params[name]["kernel"] + params[name].get("bias", 0)
        y = y.reshape(*y.shape[:-1], heads, y.shape[-1] // heads)
        if f"{name}_norm" in params:
            y = y - y.mean(-1, keepdims=True)
            scale = params[f"{name}_norm"]["scale"].reshape(*(1,) * (y.ndim - 1), -1)
            y = y / xp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale
        return y

    batch, tokens, _ = x.shape
    dim = params["query"]["kernel"].shape[1]
    query, key, value = (projected(name, x) for name in ("query", "key", "value"))
    q, k = (turned(y, places[..., 1:]) for y in (query, key)) if relative == "rotary" else (query, key)
    logits = xp.einsum("bqhd,bkhd->bhqk", q, k)
    if relative == "bias":
        table = params["relative_bias"].reshape(*(2 * bound - 1 for bound in bounds), heads)
        offsets = xp.where(sees[..., None], places[:, :, None, 1:] - places[:, None, :, 1:], 0)
        dt, dy, dx = xp.moveaxis(offsets + np.array(bounds) - 1, -1, 0)
        logits = logits + math.sqrt(dim // heads) * xp.moveaxis(table[dt, dy, dx], -1, 1)
    visible = sees
    if text is not None:
        clips, length = text.shape[1:3]
        text = text.reshape(batch, clips * length, -1)
        logits = xp.concatenate([logits, xp.einsum("bqhd,bkhd->bhqk", query, projected("key", text))], -1)
        value = xp.concatenate([value, projected("value", text)], 1)
        own = np.repeat(np.arange(clips), length)[None, None] == places[:, :, :1]
        visible = xp.concatenate([sees, own & text_mask.reshape(batch, 1, -1)], -1)
    logits = xp.where(visible[:, None], logits / math.sqrt(dim // heads), -np.inf)
    weights = xp.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    out = xp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, tokens, dim)
    return out @ params["out"]["kernel"] + params["out"].get("bias", 0)
