"""Tokens divided over the mesh's `context` axis: in attention each device has whole windows, or some of the heads.

Elsewhere each device has an equal part of a clip's tokens, in one order through all blocks: raster order if the axis
divides the frames, so that each device has whole frames; else window by window, of windows whose number it divides.
Attention in such windows needs nothing from other devices. From frames to windows that span time, and back, is one
all-to-all each way. All other windows divide heads instead of tokens (Jacobs et al. 2023, DeepSpeed-Ulysses), which
takes an all-to-all of queries, keys, values and results.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from walt_jax.denoiser.kernels import tpu
from walt_jax.denoiser.layout import Grid, Layout
from walt_jax.denoiser.windows import Window, contiguous
from walt_jax.errors import UserError
from walt_jax.layers import platform
from walt_jax.parallel.rules import divided_along

Names = tuple[str | None, ...]


def parts() -> int:
    """Into how many parts the mesh in context divides tokens."""
    return math.prod(divided_along("tokens").values())


def ordered(layout: Layout, windows: Sequence[Window]) -> Layout:
    """The layout in the order that tokens have through all blocks of a model with these windows."""
    if layout.grid is None:
        return layout
    options = [window.sizes(layout.grid) for window in windows]
    if parts() == 1:
        return layout.replace(order=_frame_by_frame(options, layout.grid) if platform() == "tpu" else None)
    if layout.grid[0] % parts() == 0:
        return layout
    return layout.replace(order=next((sizes for sizes in options if _divides(sizes, layout.grid)), None))


def _frame_by_frame(options: Sequence[Grid], grid: Grid) -> Grid | None:
    """Sizes of a frame's parts, one after the other, that leave attention nothing to move; None for raster order.

    For windows of one size over all frames, alone or with whole frames: each frame has its part of a window in one
    piece, and in which order a whole frame's tokens are is indifferent.
    """
    over_time = [sizes for sizes in options if sizes != (1, *grid[1:])]
    if len(over_time) != 1 or over_time[0][0] != grid[0] or over_time[0] == grid:
        return None
    ((_, height, width),) = over_time
    return (1, height, width) if tpu.holds_windows(grid[0], height * width) else None


def _divides(sizes: Grid, grid: Grid) -> bool:
    """Whether the mesh divides the number of windows."""
    return math.prod(grid) // math.prod(sizes) % parts() == 0


def whole(sizes: Grid, layout: Layout) -> bool:
    """Whether each device has whole windows of these sizes, one after the other."""
    ordered = contiguous(sizes, layout.grid) if layout.order is None else layout.order == sizes
    return ordered and _divides(sizes, layout.grid)


def exchangeable(layout: Layout, windows: Sequence[Window]) -> bool:
    """Whether `to_windows` brings each device whole windows, which it has not."""
    if parts() == 1 or layout.grid is None or layout.order is not None or len(windows) != 1:
        return False
    (frames, _, _), sizes = layout.grid, windows[0].sizes(layout.grid)
    return not whole(sizes, layout) and frames % parts() == 0 and sizes[0] == frames and _divides(sizes, layout.grid)


def to_windows(x: Float[Array, "b n d"], sizes: Grid, grid: Grid) -> Float[Array, "b n d"]:
    """Tokens in raster order, whole frames on each device, window by window, whole ones on each: one all-to-all."""
    axes, count, side = tuple(divided_along("tokens")), parts(), _places(sizes, grid)

    def own(x: Array) -> Array:
        x = rearrange(x, "b (t h lh w lw) d -> b (h w) t lh lw d", t=grid[0] // count, **side)
        return jax.lax.all_to_all(x, axes, 1, 2, tiled=True).reshape(len(x), -1, x.shape[-1])

    return on_each_device(own, (x,), (("batch", "tokens"),))


def from_windows(x: Float[Array, "b n d"], sizes: Grid, grid: Grid) -> Float[Array, "b n d"]:
    """The inverse of `to_windows`."""
    axes, side = tuple(divided_along("tokens")), _places(sizes, grid)

    def own(x: Array) -> Array:
        x = rearrange(x, "b (p t lh lw) d -> b p t lh lw d", t=grid[0], lh=side["lh"], lw=side["lw"])
        x = jax.lax.all_to_all(x, axes, 2, 1, tiled=True)
        return rearrange(x, "b (h w) t lh lw d -> b (t h lh w lw) d", **side)

    return on_each_device(own, (x,), (("batch", "tokens"),))


def _places(sizes: Grid, grid: Grid) -> dict[str, int]:
    """Windows along height and width, and their sides."""
    (_, h, w), (_, lh, lw) = grid, sizes
    return {"h": h // lh, "w": w // lw, "lh": lh, "lw": lw}


def on_each_device(function: Callable[..., Any], arguments: tuple[Any, ...], names: tuple[Names, ...]) -> Any:
    """`function(*arguments)`; each device computes its own part, where the mesh in context divides the axes named.

    Args:
        function: independent for each part of these axes; its results' axes are named as those of the first argument.
        arguments: arrays or trees of them, or None.
        names: of each argument's first axes: "batch", "tokens" or "heads", or None. Where no tokens are named, heads
            are divided over `context` too.
    """
    named = {name for each in names for name in each}
    axes = {"batch": tuple(divided_along("batch", arguments[0].shape[0])), "heads": tuple(divided_along("heads"))}
    context = tuple(divided_along("tokens"))
    if "tokens" in named:
        axes["tokens"] = context
    elif "heads" in named:
        axes["heads"] += context
    taken = {axis for name in named & axes.keys() for axis in axes[name]}
    if not taken:
        return function(*arguments)
    specs = tuple(PartitionSpec(*(axes[name] or None if name else None for name in each)) for each in names)
    # Unchecked, for a kernel's outputs do not say along which axes they vary.
    mapped = jax.shard_map(function, in_specs=specs, out_specs=specs[0], axis_names=taken, check_vma=False)
    return mapped(*arguments)


def check_heads(heads: int) -> None:
    """Checks that heads can be divided over `context`, and over `tensor` as well, where windows can't be.

    Raises:
        UserError: if not.
    """
    count, tensor = parts(), math.prod(divided_along("heads").values())
    if count == 1 or heads % (count * tensor) == 0:
        return
    product = f"context={count}" + (f" × tensor={tensor}" if tensor > 1 else "")
    raise UserError(
        f"config.mesh.{product} divides neither the windows of an attention, nor its {heads} heads; choose a context "
        "that divides the frames of the latents, or the heads."
    )
