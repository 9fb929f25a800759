"""Windows partition a grid, and attention in them equals dense attention over the whole grid under a mask."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.denoiser.attention import WindowAttention
from walt_jax.denoiser.windows import Window, merge, partition

AXIS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans())  # window, windows on the axis, written as None


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def window_and_grid(axes):
    """The window as a config has it, its sizes, and the grid. Where it is None it is the whole axis."""
    grid = tuple(size * count for size, count, _ in axes)
    sizes = tuple(length if whole else size for length, (size, _, whole) in zip(grid, axes, strict=True))
    return Window(*(None if whole else size for size, _, whole in axes)), sizes, grid


@settings(max_examples=20, deadline=None)
@given(st.tuples(AXIS, AXIS, AXIS))
def test_partition_groups_a_windows_tokens_and_merge_puts_them_back(axes):
    window, sizes, grid = window_and_grid(axes)
    assert window.sizes(grid) == sizes
    x = np.arange(2 * np.prod(grid) * 3).reshape(2, *grid, 3)
    parts = partition(x, sizes)
    assert parts.shape == (x.size // 3 // np.prod(sizes), np.prod(sizes), 3)
    twin = [
        x[clip, t : t + sizes[0], y : y + sizes[1], z : z + sizes[2]].reshape(-1, 3)
        for clip in range(2)
        for t in range(0, grid[0], sizes[0])
        for y in range(0, grid[1], sizes[1])
        for z in range(0, grid[2], sizes[2])
    ]
    np.testing.assert_array_equal(parts, twin)
    np.testing.assert_array_equal(merge(parts, sizes, grid), x)
    np.testing.assert_array_equal(partition(merge(parts, sizes, grid), sizes), parts)


@pytest.mark.parametrize("window", [(2, None, None), (None, 3, 8), (5, 16, 16), (None, None, 5)])
def test_windows_that_do_not_divide_the_grid_are_refused(window):
    with pytest.raises(ValueError, match=r"does not divide a latent grid of \(5, 8, 8\) tokens"):
        Window(*window).sizes((5, 8, 8))


def test_the_papers_windows():
    assert Window(1, None, None).sizes((5, 16, 16)) == (1, 16, 16)
    assert Window(None, 8, 8).sizes((5, 16, 28 - 4)) == (5, 8, 8)
    assert Window(None, 8, 8).sizes((1, 8, 8)) == (1, 8, 8)


def layer_norm(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def dense_attention(params, x, sizes, text=None, text_mask=None):
    """The twin: every token of the grid against every token and text token, in double precision, under a mask."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    batch, *grid, dim = x.shape
    table = params["relative_bias"]
    heads = table.shape[1]
    table = table.reshape(*(2 * size - 1 for size in sizes), heads)
    places = np.array(list(np.ndindex(*grid)))
    windows = places // np.array(sizes)
    together = (windows[:, None] == windows[None, :]).all(-1)
    out = np.empty((batch, len(places), dim))
    for clip in range(batch):
        tokens = x[clip].reshape(-1, dim).astype(np.float64)
        if text is None:
            sources, visible = tokens, together
        else:
            sources = np.concatenate([tokens, text[clip]])
            visible = np.concatenate([together, np.tile(text_mask[clip], (len(tokens), 1))], axis=1)
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            query = layer_norm(tokens @ params["query"]["kernel"][:, part], params["query_norm"]["scale"])
            key = layer_norm(sources @ params["key"]["kernel"][:, part], params["key_norm"]["scale"])
            value = sources @ params["value"]["kernel"][:, part]
            logits = query @ key.T / np.sqrt(dim // heads)
            for q, k in zip(*np.nonzero(together), strict=True):
                dt, dy, dx = places[q] - places[k]
                logits[q, k] += table[dt + sizes[0] - 1, dy + sizes[1] - 1, dx + sizes[2] - 1, head]
            weights = np.where(visible, np.exp(logits), 0)
            out[clip, :, part] = weights @ value / weights.sum(1, keepdims=True)
    return (out @ params["out"]["kernel"]).reshape(x.shape)


def filled(module, *inputs):
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([jnp.asarray(normal(i, *leaf.shape)) for i, leaf in enumerate(leaves)])


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(AXIS, AXIS, AXIS).filter(lambda axes: np.prod([size * count for size, count, _ in axes]) <= 60),
    st.integers(1, 3),
    st.integers(4, 6),
    st.none() | st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=2),
    st.integers(0, 99),
)
def test_equals_dense_attention_under_a_mask(axes, heads, head_dim, text_mask, seed):
    window, sizes, grid = window_and_grid(axes)
    dim = heads * head_dim
    inputs = [normal(seed, 2, *grid, dim)]
    if text_mask is not None:
        inputs += [normal(seed + 1, 2, 3, dim), np.array(text_mask)]
    module = WindowAttention(heads, window, jnp.float32)
    variables = filled(module, *inputs)
    ours = jax.jit(module.apply)(variables, *inputs)
    twin = dense_attention(variables["params"], inputs[0], sizes, *inputs[1:])
    np.testing.assert_allclose(ours, twin, rtol=1e-3, atol=1e-3)


def test_nothing_outside_the_window_and_no_padding_is_seen():
    grid, module = (2, 4, 4), WindowAttention(2, Window(None, 2, 2), jnp.float32)
    x, text, mask = normal(0, 2, *grid, 4), normal(1, 2, 3, 4), np.array([[1, 1, 0], [1, 0, 0]], bool)
    variables = filled(module, x, text, mask)

    @jax.jit
    def gradients(x, text):
        def one(x, text):  # the token at (1, 2, 1) of clip 0, in window (0..1, 2..3, 0..1)
            return module.apply(variables, x, text, mask)[0, 1, 2, 1] @ normal(2, 4)

        return jax.grad(one, argnums=(0, 1))(x, text)

    of_tokens, of_text = (np.any(np.asarray(gradient) != 0, axis=-1) for gradient in gradients(x, text))
    window = np.zeros((2, *grid), bool)
    window[0, :, 2:, :2] = True
    np.testing.assert_array_equal(of_tokens, window)
    np.testing.assert_array_equal(of_text, mask & [[True], [False]])


def test_logits_are_bounded_whatever_the_weights():
    """q-k normalisation: scaling the projections changes nothing."""
    x = normal(0, 1, 1, 2, 2, 4)
    module = WindowAttention(2, Window(None, None, None), jnp.float32)
    params = filled(module, x)["params"]
    louder = {**params, "query": {"kernel": 50 * params["query"]["kernel"]}}
    ours = module.apply({"params": params}, x)
    np.testing.assert_allclose(module.apply({"params": louder}, x), ours, atol=1e-4)
