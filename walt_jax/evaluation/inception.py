"""Inception v3 as FID and the inception score of images use it (Szegedy et al. 2015; Heusel et al. 2017).

The network of TensorFlow's file of 2015-12-05, whose weights pytorch-fid and torch-fidelity have as
`pt_inception-2015-12-05-6726825d.pth`. It differs from torchvision's: 1008 classes, average pooling that leaves the
padding out, and max-pooling in the last block.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from walt_jax.errors import UserError

SIDE = 299  # pixels
FEATURES, CLASSES = 2048, 1008
EPSILON = 1e-3  # of batch normalisation

Kernel = tuple[int, int, int, int]  # height, width, in, out
Layer = tuple[Float[Array, "kh kw i o"], Float[Array, " o"]]
Weights = dict[str, Layer]
Images = Float[Array, "n h w c"]


def kernels() -> dict[str, Kernel]:
    """The shape of each convolution, by its name in the file; "fc" as one of 1 × 1."""
    shapes: dict[str, Kernel] = {
        "Conv2d_1a_3x3": (3, 3, 3, 32),
        "Conv2d_2a_3x3": (3, 3, 32, 32),
        "Conv2d_2b_3x3": (3, 3, 32, 64),
        "Conv2d_3b_1x1": (1, 1, 64, 80),
        "Conv2d_4a_3x3": (3, 3, 80, 192),
    }

    def chain(block: str, branch: str, into: int, *layers: tuple[int, int, int]) -> None:
        for number, (height, width, out) in enumerate(layers, 1):
            suffix = f"_{number}" if len(layers) > 1 else ""
            shapes[f"{block}.{branch}{suffix}"] = (height, width, into, out)
            into = out

    for block, into, pooled in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        chain(block, "branch1x1", into, (1, 1, 64))
        chain(block, "branch5x5", into, (1, 1, 48), (5, 5, 64))
        chain(block, "branch3x3dbl", into, (1, 1, 64), (3, 3, 96), (3, 3, 96))
        chain(block, "branch_pool", into, (1, 1, pooled))
    chain("Mixed_6a", "branch3x3", 288, (3, 3, 384))
    chain("Mixed_6a", "branch3x3dbl", 288, (1, 1, 64), (3, 3, 96), (3, 3, 96))
    for block, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        chain(block, "branch1x1", 768, (1, 1, 192))
        chain(block, "branch7x7", 768, (1, 1, c), (1, 7, c), (7, 1, 192))
        chain(block, "branch7x7dbl", 768, (1, 1, c), (7, 1, c), (1, 7, c), (7, 1, c), (1, 7, 192))
        chain(block, "branch_pool", 768, (1, 1, 192))
    chain("Mixed_7a", "branch3x3", 768, (1, 1, 192), (3, 3, 320))
    chain("Mixed_7a", "branch7x7x3", 768, (1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192))
    for block, into in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        chain(block, "branch1x1", into, (1, 1, 320))
        shapes[f"{block}.branch3x3_1"] = (1, 1, into, 384)
        chain(block, "branch3x3dbl", into, (1, 1, 448), (3, 3, 384))
        for branch in ("branch3x3_2", "branch3x3dbl_3"):
            shapes[f"{block}.{branch}a"], shapes[f"{block}.{branch}b"] = (1, 3, 384, 384), (3, 1, 384, 384)
        chain(block, "branch_pool", into, (1, 1, 192))
    return shapes | {"fc": (1, 1, FEATURES, CLASSES)}


def weights_from(tensors: Mapping[str, np.ndarray], path: str) -> Weights:
    """The layers, with batch normalisation folded into the convolution before it.

    Args:
        tensors: a PyTorch state dict: `Mixed_5b.branch5x5_1.conv.weight`, `….bn.running_mean`, …, `fc.weight`.
        path: of the file, for messages.

    Raises:
        UserError: if one is missing or has another shape.
    """
    weights: Weights = {}
    try:
        for name, shape in kernels().items():
            if name == "fc":
                kernel, bias = tensors["fc.weight"].T[None, None], tensors["fc.bias"]
            else:
                kernel = np.transpose(tensors[f"{name}.conv.weight"], (2, 3, 1, 0))
                scale, bias, mean, variance = (
                    tensors[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
                )
                factor = scale / np.sqrt(variance.astype(np.float64) + EPSILON)
                kernel, bias = kernel * factor[None, None, None], bias - mean * factor
            if kernel.shape != shape or bias.shape != shape[-1:]:
                raise UserError(
                    f"The Inception weights {path} hold {name} of shape {list(kernel.shape)}, not {list(shape)}; FID's "
                    "are pt_inception-2015-12-05-6726825d.pth."
                )
            weights[name] = (jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32))
    except KeyError as error:
        raise UserError(
            f"The weights {path} lack {error}, so they are not FID's Inception's; give "
            "pt_inception-2015-12-05-6726825d.pth."
        ) from error
    return weights


def _max_pool(x: Images, stride: int, padding: str) -> Images:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average_pool(x: Images) -> Images:
    """3 × 3 with stride 1; a mean of pixels alone, without the padding."""
    window = (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, *window)
    return total / jax.lax.reduce_window(jnp.ones_like(x), 0.0, jax.lax.add, *window)


def features_and_logits(
    weights: Weights, images: Float[Array, "n h w 3"]
) -> tuple[Float[Array, "n 2048"], Float[Array, "n 1008"]]:
    """FID's features, the last average pooling; and the inception score's logits, which lack the bias.

    Args:
        weights: see `weights_from`.
        images: in -1..1, SIDE × SIDE pixels for published numbers, as the protocol resizes and maps them.
    """

    def unit(x: Images, name: str, stride: int = 1, padding: str = "SAME") -> Images:
        kernel, bias = weights[name]
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(x + bias[None, None, None])

    def branch(x: Images, name: str, count: int) -> Images:
        for number in range(1, count + 1):
            x = unit(x, f"{name}_{number}" if count > 1 else name)
        return x

    def mixed(x: Images, block: str, branches: tuple[tuple[str, int], ...], pool: Callable[[Images], Images]) -> Images:
        parts = [branch(x, f"{block}.{name}", count) for name, count in branches]
        return jnp.concatenate([*parts, unit(pool(x), f"{block}.branch_pool")], axis=-1)

    def last(x: Images, block: str, pool: Callable[[Images], Images]) -> Images:
        parts = [unit(x, f"{block}.branch1x1")]
        for name, y in (
            ("branch3x3_2", unit(x, f"{block}.branch3x3_1")),
            ("branch3x3dbl_3", branch(x, f"{block}.branch3x3dbl", 2)),
        ):
            parts += [unit(y, f"{block}.{name}a"), unit(y, f"{block}.{name}b")]
        return jnp.concatenate([*parts, unit(pool(x), f"{block}.branch_pool")], axis=-1)

    x = unit(images, "Conv2d_1a_3x3", 2, "VALID")
    x = unit(unit(x, "Conv2d_2a_3x3", 1, "VALID"), "Conv2d_2b_3x3")
    x = unit(_max_pool(x, 2, "VALID"), "Conv2d_3b_1x1")
    x = _max_pool(unit(x, "Conv2d_4a_3x3", 1, "VALID"), 2, "VALID")
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = mixed(x, block, (("branch1x1", 1), ("branch5x5", 2), ("branch3x3dbl", 3)), _average_pool)
    deep = unit(branch(x, "Mixed_6a.branch3x3dbl", 2), "Mixed_6a.branch3x3dbl_3", 2, "VALID")
    x = jnp.concatenate([unit(x, "Mixed_6a.branch3x3", 2, "VALID"), deep, _max_pool(x, 2, "VALID")], axis=-1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = mixed(x, block, (("branch1x1", 1), ("branch7x7", 3), ("branch7x7dbl", 5)), _average_pool)
    short = unit(unit(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", 2, "VALID")
    deep = unit(branch(x, "Mixed_7a.branch7x7x3", 3), "Mixed_7a.branch7x7x3_4", 2, "VALID")
    x = jnp.concatenate([short, deep, _max_pool(x, 2, "VALID")], axis=-1)
    x = last(x, "Mixed_7b", _average_pool)
    x = last(x, "Mixed_7c", lambda x: _max_pool(x, 1, "SAME"))
    features = x.mean(axis=(1, 2))
    return features, features @ weights["fc"][0][0, 0]
