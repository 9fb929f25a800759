"""Tensors of a file that others have written, read without running any of it.

Reads safetensors; PyTorch's `torch.save` of a state dict, in its zip and its older form; NumPy's `.npz`; and pickles
of nested dicts of NumPy arrays. A pickle is a program: each of its globals that is not on the list here is refused
before it is called.
"""

import collections
import hashlib
import io
import pathlib
import pickle
import zipfile
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load

from walt_jax.errors import UserError, reason_of

Tensors = dict[str, np.ndarray]
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of PyTorch's older form
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Refused(pickle.UnpicklingError):
    """A pickle names something that is not on the list."""


def read_tensors(path: str | pathlib.Path) -> tuple[Tensors, str]:
    """Reads all tensors of a file.

    Args:
        path: its content says what format it has, whatever its name is.

    Returns:
        (tensors, sha256): names of nested dicts are joined by dots; the digest of the file's bytes in hexadecimal.

    Raises:
        UserError: if the file can't be read, has another format, or wants to run something else.
    """
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"The weights {path} can't be read ({error.strerror}); name a file that is there.") from error
    try:
        tensors = _parse(content)
    except _Refused as error:
        raise UserError(
            f"The weights {path} are refused: the pickle wants to call {error}, which no tensors need; save them as "
            "safetensors."
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(
            f"The weights {path} can't be read ({reason_of(error)}); give safetensors, a state dict of torch.save, or "
            "a pickle of NumPy arrays."
        ) from error
    return tensors, hashlib.sha256(content).hexdigest()


def _parse(content: bytes) -> Tensors:
    if zipfile.is_zipfile(io.BytesIO(content)) and content[:2] == b"PK":
        if all(name.endswith(".npy") for name in zipfile.ZipFile(io.BytesIO(content)).namelist()):
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return dict(arrays)
        return _flat(_torch_zip(content))
    if content[:1] == b"\x80":  # a pickle's protocol
        stream = io.BytesIO(content)
        first = _NumPyUnpickler(stream).load()
        return _flat(_torch_legacy(stream)) if first == LEGACY_MAGIC else _flat(first)
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"neither safetensors nor a pickle: {error}") from error


def _flat(value: Any) -> Tensors:
    """A nested dict of arrays as one; a checkpoint's "state_dict" alone, where there is one."""
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, and not a dict of tensors")
    flat = flatten_dict(value)  # names may be numbers, in an optimizer's state for one
    return {".".join(map(str, names)): tensor for names, tensor in flat.items() if isinstance(tensor, np.ndarray)}


class _NumPyUnpickler(pickle.Unpickler):
    """Reads dicts of NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 has moved the first two, and reads both names.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return _from_buffer
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):  # how older pickles have bytes
            return _latin1
        raise _Refused(f"{module}.{name}")


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """An empty array, whose state the pickle sets next."""
    if kind is not np.ndarray:
        raise _Refused(f"the type {kind}")
    return np.ndarray.__new__(np.ndarray, shape, code)


def _from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"the encoding {encoding!r}")
    return text.encode("latin1")


class _Storage:
    """The elements of a PyTorch storage; in the older form they come after the pickle, so a tensor is made last."""

    def __init__(self, dtype: Any, values: np.ndarray | None = None):
        self.dtype, self.values = np.dtype(dtype), values


class _Tensor:
    """A view of a storage."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        values = self.storage.values
        if len(self.shape) != len(self.strides) or min([*self.shape, *self.strides, self.offset], default=0) < 0:
            raise ValueError("a tensor's shape and strides don't match")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and last >= len(values):
            raise ValueError("a tensor is larger than its storage")
        steps = [step * values.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, steps).copy()


class _TorchUnpickler(_NumPyUnpickler):
    """Reads a state dict, whose storages are named in the pickle and lie outside of it."""

    storage: Any  # a function of (type, key, count) that gives a _Storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or pid[0] != "storage":
            raise _Refused(f"the storage {str(pid)[:40]}")
        return self.storage(pid[1], pid[2], pid[4])


def _made(value: Any) -> Any:
    """A dict's tensors as arrays."""
    if isinstance(value, dict):
        return {key: _made(inner) for key, inner in value.items()}
    return value.array() if isinstance(value, _Tensor) else value


def _torch_zip(content: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if not pickles or any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError("a zip that is not of torch.save; a TorchScript file is a program, save its state_dict()")
        folder = pickles[0].removesuffix("data.pkl")

        def storage(dtype: Any, key: str, count: int) -> _Storage:
            return _Storage(dtype, np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count))

        reader = _TorchUnpickler(io.BytesIO(archive.read(pickles[0])))
        reader.storage = storage
        return _made(reader.load())


def _torch_legacy(stream: BinaryIO) -> Any:
    """The rest after the magic number: version, system, pickle, keys of storages, and their elements."""
    storages: dict[str, _Storage] = {}
    for _ in range(2):
        _NumPyUnpickler(stream).load()
    reader = _TorchUnpickler(stream)
    reader.storage = lambda dtype, key, count: storages.setdefault(key, _Storage(dtype))
    value = reader.load()
    for key in _NumPyUnpickler(stream).load():
        count = int.from_bytes(stream.read(8), "little")
        storage = storages[key]
        storage.values = np.frombuffer(stream.read(count * storage.dtype.itemsize), storage.dtype, count)
    return _made(value)
