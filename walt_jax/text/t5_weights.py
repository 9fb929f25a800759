"""Reads a published T5 v1.1 encoder from a folder that the user provides. Nothing is downloaded.

The folder has the format of transformers' `save_pretrained`, for example of google/t5-v1_1-xl: `model.safetensors`, or
several files with their `model.safetensors.index.json`; and the sentencepiece vocabulary, `spiece.model` or another
name that ends in .model. The weights are of an encoder only, or of a complete T5, whose decoder is ignored.
"""

import contextlib
import hashlib
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from walt_jax.errors import UserError
from walt_jax.text.t5 import T5Config, T5Encoder

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
TABLE = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one tensor; files have one or both
Shape = tuple[int, ...]


def published_name(ours: str) -> str:
    """transformers' name of a parameter: of "query_3/kernel", "encoder.block.3.layer.0.SelfAttention.q.weight"."""
    whole = {
        "embedding": TABLE[0],
        "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "norm_out/scale": "encoder.final_layer_norm.weight",
    }
    parts = {
        "attention_norm": "0.layer_norm",
        "query": "0.SelfAttention.q",
        "key": "0.SelfAttention.k",
        "value": "0.SelfAttention.v",
        "attention_out": "0.SelfAttention.o",
        "mlp_norm": "1.layer_norm",
        "mlp_gate": "1.DenseReluDense.wi_0",
        "mlp_in": "1.DenseReluDense.wi_1",
        "mlp_out": "1.DenseReluDense.wo",
    }
    if ours in whole:
        return whole[ours]
    part, layer = ours.split("/")[0].rsplit("_", 1)
    return f"encoder.block.{layer}.layer.{parts[part]}.weight"


def load(folder: str | pathlib.Path, config: T5Config, vocab_size: int) -> dict[str, Any]:
    """The encoder's parameters: matrices in the config's dtype, everything else in float32.

    Args:
        folder: as the module's docstring says.
        config: of the encoder.
        vocab_size: rows of its table of embeddings.

    Raises:
        UserError: if a file can't be read, or its tensors don't fit the config.
    """
    names = matched(folder, config, vocab_size)
    flat, dtype = {}, jnp.dtype(config.dtype)
    with _opened(folder) as files:
        for ours, theirs in names.items():
            tensor = files[theirs].get_tensor(theirs)
            tensor = tensor.T if ours.endswith("/kernel") else tensor
            flat[ours] = np.ascontiguousarray(tensor).astype(dtype if tensor.ndim == 2 else np.float32)
    return unflatten_dict(flat, sep="/")


def matched(folder: str | pathlib.Path, config: T5Config, vocab_size: int) -> dict[str, str]:
    """transformers' name of each parameter, once names and shapes are checked.

    Raises:
        UserError: as `load`.
    """
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    model = T5Encoder(config, vocab_size)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), one, one)["params"])
    wanted = {ours: leaf.shape for ours, leaf in flatten_dict(params, sep="/").items()}
    with _opened(folder) as files:
        slices = {name: file.get_slice(name) for name, file in files.items()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        kinds = {name: part.get_dtype() for name, part in slices.items()}
    names = {ours: published_name(ours) for ours in wanted}
    if TABLE[0] not in shapes:
        names["embedding"] = TABLE[1]
    for ours, theirs in names.items():
        shape = wanted[ours][::-1] if ours.endswith("/kernel") else wanted[ours]
        if theirs not in shapes:
            old = theirs.replace("wi_0", "wi") in shapes
            raise UserError(
                f"{folder} lacks {theirs}; "
                + (
                    "it is a T5 1.0: use one of version 1.1."
                    if old
                    else "use a T5 v1.1 encoder of the sizes that config.text.encoder has."
                )
            )
        if shapes[theirs] != shape:
            knobs = "config.text.vocab_size" if ours == "embedding" else "config.text.encoder"
            raise UserError(
                f"{folder} holds {theirs} of shape {list(shapes[theirs])}, and {knobs} asks for {list(shape)}; set "
                "it to that encoder's sizes."
            )
        if kinds[theirs] not in FLOATS:
            raise UserError(f"{folder} holds {theirs} as {kinds[theirs]}; use a file with {', '.join(FLOATS)}.")
    more = sorted(name for name in shapes if name.startswith("encoder.") and name not in {*names.values(), *TABLE})
    if more:
        raise UserError(f"{folder} holds {more[0]}, which config.text.encoder lacks; raise its layers.")
    return names


def digest(folder: str | pathlib.Path) -> str:
    """Identifies an encoder and its vocabulary: a hash of the vocabulary and of the first row of each tensor.

    Raises:
        UserError: if they can't be read.
    """
    hashed = hashlib.sha256(vocabulary_path(folder).read_bytes())
    with _opened(folder) as files:
        for name in sorted(files):
            if not name.startswith(("encoder.", TABLE[0])):
                continue
            part = files[name].get_slice(name)
            hashed.update(f"{name} {part.get_shape()} {part.get_dtype()}".encode())
            hashed.update(np.ascontiguousarray(part[:1]).tobytes())
    return hashed.hexdigest()[:16]


def vocabulary_path(folder: str | pathlib.Path) -> pathlib.Path:
    """The sentencepiece model of the folder.

    Raises:
        UserError: if it has none, or several.
    """
    found = sorted(pathlib.Path(folder).glob("*.model"))
    if len(found) != 1:
        has = f"has {found[0].name} and {found[1].name}" if found else "has no vocabulary"
        raise UserError(f"{folder} {has}; put the published T5's spiece.model there, and no other .model file.")
    return found[0]


@contextlib.contextmanager
def _opened(folder: str | pathlib.Path):
    """{name of a tensor: the open file that holds it}"""
    folder = pathlib.Path(folder)
    try:
        if (folder / INDEX).exists():
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        else:
            names = [FILE]
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(folder / name, framework="numpy")) for name in names]
            yield {tensor: file for file in files for tensor in file.keys()}  # noqa: SIM118 - it is not a dict
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder} holds no T5 that can be read ({type(error).__name__}: {error}); name a folder that "
            "transformers' T5EncoderModel.save_pretrained has written."
        ) from error
