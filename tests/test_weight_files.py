"""Weights that others have saved: PyTorch's files equal what PyTorch saved, and pickles run nothing."""

import pathlib
import pickle

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from walt_jax.errors import UserError
from walt_jax.weight_files import read_tensors

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["torch_zip.pt", "torch_legacy.pt", "torch_checkpoint.pt"])
def test_state_dicts_of_pytorch(name):
    expected = load_file(GOLDEN / "torch_files.safetensors")
    tensors, _ = read_tensors(GOLDEN / name)
    assert set(tensors) == set(expected)
    for key, value in expected.items():
        assert tensors[key].dtype == value.dtype
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_nested_dicts_of_arrays(tmp_path, protocol):
    arrays = {"params": {"a/b": {"kernel": np.arange(6.0).reshape(2, 3)}}, "scale": np.float32([1, 2])}
    (tmp_path / "w.ckpt").write_bytes(pickle.dumps(arrays, protocol=protocol))
    tensors, digest = read_tensors(tmp_path / "w.ckpt")
    assert set(tensors) == {"params.a/b.kernel", "scale"}
    np.testing.assert_array_equal(tensors["params.a/b.kernel"], arrays["params"]["a/b"]["kernel"])
    assert len(digest) == 64


def test_safetensors(tmp_path):
    save_file({"a": np.arange(3)}, tmp_path / "w.safetensors")
    assert read_tensors(tmp_path / "w.safetensors")[0]["a"].tolist() == [0, 1, 2]


class Runs:
    """Makes a file when it is unpickled freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


class Builtin:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize("where", [lambda bad: bad, lambda bad: {"a": np.zeros(2), "b": bad}, lambda bad: [bad]])
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_that_calls_something_else_is_refused_before_it_does(tmp_path, where, protocol):
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(where(Runs(tmp_path / "ran")), protocol=protocol))
    with pytest.raises(UserError, match="refused: the pickle wants to call"):
        read_tensors(tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(where(Builtin()), protocol=protocol))
    with pytest.raises(UserError, match=r"call \w+\.eval"):
        read_tensors(tmp_path / "bad.ckpt")


def test_arrays_of_objects_are_refused(tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({"a": np.array([Runs(tmp_path / "ran")], object)}))
    with pytest.raises(UserError):
        read_tensors(tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_program_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="TorchScript file is a program"):
        read_tensors(GOLDEN / "torch_script.pt")


def test_damage_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_tensors(tmp_path / "none.pt")
    whole = {
        name: (GOLDEN / name).read_bytes() for name in ("torch_zip.pt", "torch_legacy.pt", "torch_files.safetensors")
    }
    for name, content in whole.items():
        for part in (
            content[: len(content) // 2],
            content[: len(content) - 3],
            b"",
            b"\x80\x02nonsense",
            b"PK\x03\x04",
        ):
            (tmp_path / name).write_bytes(part)
            with pytest.raises(UserError) as refusal:
                read_tensors(tmp_path / name)
            assert str(refusal.value).startswith(f"The weights {tmp_path / name} can't be read (")
            assert "\n" not in str(refusal.value)
