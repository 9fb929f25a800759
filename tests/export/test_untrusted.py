"""Files that others made: whatever is wrong with them is one sentence, and nothing outside of their folder is read."""

import json
import os
import pathlib
import pickle
import shutil
import struct

import jax
import numpy as np
import pytest

import walt_jax
from walt_jax.errors import UserError
from walt_jax.export import orbax_files, safetensors_files

TENSORS = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
WANTED = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}


def header(path: pathlib.Path, change) -> None:
    """Rewrites a safetensors file's header; `change` returns (header, its stated length or None)."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    values, stated = change(json.loads(content[8 : 8 + length]))
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", stated or len(text)) + text + content[8 + length :])


def with_b(**changes):
    return lambda values: ({**values, "b": {**values["b"], **changes}}, None)


HEADERS = {
    "a length beyond the file": lambda values: (values, 2**40),
    "a huge length": lambda values: (values, 2**63),
    "a huge shape": with_b(shape=[2**40, 2**40]),
    "a negative shape": with_b(shape=[-4]),
    "overlapping offsets": with_b(data_offsets=[0, 16]),
    "offsets beyond the file": with_b(data_offsets=[24, 2**40]),
    "another shape": with_b(shape=[2, 2]),
    "another type": with_b(dtype="I32"),
    "no such type": with_b(dtype="PICKLE"),
    "a tensor too many": lambda values: (
        {**values, "c": {**values["b"], "data_offsets": [40, 40], "shape": [0]}},
        None,
    ),
    "a tensor too few": lambda values: ({name: value for name, value in values.items() if name != "b"}, None),
    "no tensors": lambda values: ([], None),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header(change, tmp_path):
    safetensors_files.write(tmp_path, TENSORS)
    assert refuses_nothing(safetensors_files.read, tmp_path)
    header(tmp_path / safetensors_files.FILE, change)
    assert "model.safetensors" in refusal(safetensors_files.read, tmp_path)


def refuses_nothing(read, folder) -> bool:
    found = read(folder, WANTED)
    return found.keys() == TENSORS.keys() and all((found[name] == TENSORS[name]).all() for name in TENSORS)


def refusal(read, folder) -> str:
    """The sentence; it names a remedy."""
    with pytest.raises(UserError) as error:
        read(folder, WANTED)
    assert any(remedy in str(error.value) for remedy in ("restore", "copy the file"))
    return str(error.value)


@pytest.mark.parametrize("length", [0, 7, 20, -1])
def test_a_truncated_file(length, tmp_path):
    safetensors_files.write(tmp_path, TENSORS)
    path = tmp_path / safetensors_files.FILE
    path.write_bytes(path.read_bytes()[:length])
    assert "damaged" in refusal(safetensors_files.read, tmp_path)


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 30)
    files = safetensors_files.write(tmp_path, TENSORS)
    assert files[1:] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / files[0]).read_text())
    assert index["metadata"]["total_size"] == 40 and index["weight_map"] == {"a/kernel": files[1], "b": files[2]}
    assert refuses_nothing(safetensors_files.read, tmp_path)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/dev/zero", "link.safetensors", "pipe", "none", 3, ["x"]])
def test_an_index_that_leads_elsewhere(place, tmp_path, monkeypatch):
    folder = tmp_path / "export"
    folder.mkdir()
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 30)
    files = safetensors_files.write(folder, TENSORS)
    shutil.copy(folder / files[2], tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    os.mkfifo(folder / "pipe")
    index = json.loads((folder / files[0]).read_text())
    index["weight_map"]["b"] = place
    (folder / files[0]).write_text(json.dumps(index))
    refusal(safetensors_files.read, folder)


def test_an_index_of_something_else(tmp_path):
    safetensors_files.write(tmp_path, TENSORS)
    index = tmp_path / safetensors_files.INDEX
    for text in (
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a/kernel": "model.safetensors"}}',
        "[" * 10**5,
    ):
        index.write_text(text)
        assert "index.json" in refusal(safetensors_files.read, tmp_path)


def test_an_orbax_folder_with_files_gone(tmp_path):
    orbax_files.write(tmp_path, TENSORS)
    assert refuses_nothing(orbax_files.read, tmp_path)
    for path in sorted(path for path in (tmp_path / orbax_files.FOLDER).rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        try:
            assert refuses_nothing(orbax_files.read, tmp_path)  # a file that nothing needs
        except UserError as error:
            assert orbax_files.FOLDER in str(error) and "restore" in str(error)
        path.write_bytes(content)
    outside = tmp_path / "elsewhere"
    (tmp_path / orbax_files.FOLDER / "_METADATA").rename(outside)
    (tmp_path / orbax_files.FOLDER / "_METADATA").symlink_to(outside)
    assert "leads out" in refusal(orbax_files.read, tmp_path)


def test_orbax_with_other_arrays(tmp_path):
    orbax_files.write(tmp_path, {**TENSORS, "b": np.ones(5, np.float32)})
    assert "[5]" in refusal(orbax_files.read, tmp_path)


@pytest.fixture(scope="module")
def manifest(tiny_run) -> dict:
    """An export's config.json."""
    from walt_jax.config import build
    from walt_jax.export.contents import Manifest
    from walt_jax.training.run_config import RunConfig

    knobs = json.loads((tiny_run / "config.json").read_text())
    config = build(RunConfig, knobs, "config")
    return json.loads(Manifest("walt_jax", 1, "0", "safetensors", config, "denoiser").dump())


def changed(values: dict, path: str, value) -> dict:
    name, _, rest = path.partition(".")
    return {**values, name: changed(values[name], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model_type", "bert", "another program"),
        ("model_type", ["walt_jax"], "another program"),
        ("format_version", 2, "format_version"),
        ("format", "pickle", "pickle"),
        ("format", {}, "format"),
        ("more", 1, "more"),
        ("stage", "tokenizer", "stage"),
        ("stage", "", "stage"),
        ("autoencoder", {}, "autoencoder"),
        ("config", None, "config"),
        ("config.data.fps", float("nan"), "NaN"),
        ("config.data.height", float("inf"), "Infinity"),
        ("config.data.frames", 2**40 + 1, "pixels"),
        ("config.data.heigth", 16, "heigth"),
        ("config.denoiser.layers", 2**40, "layers"),
        ("config.denoiser.dim", "32", "dim"),
        ("config.tokenizer.residual_blocks", 10**9, "layers"),
        ("config.low_res_from", "elsewhere", "low_res_from"),
        ("config.tokenizer_from", "/etc/x.safetensors", "tokenizer_from"),
    ],
)
def test_a_config_that_does_not_fit(path, value, words, manifest, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed(manifest, path, value)))
    with pytest.raises(UserError, match=words) as error:
        walt_jax.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5, "\xff\xfe", '{"a": ' + "1" * 2**20 + "}"])
def test_a_config_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        walt_jax.load(tmp_path)


def test_what_is_no_export(manifest, tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "config.json" / "x"):
        with pytest.raises(UserError, match="neither a run nor an export"):
            walt_jax.load(path)
    with pytest.raises(UserError, match="remote"):
        walt_jax.load("s3://bucket/export")
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"vocabulary\.model"):
        walt_jax.load(tmp_path)
    (tmp_path / "vocabulary.model").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match=r"vocabulary\.model"):
        walt_jax.load(tmp_path)
    (tmp_path / "vocabulary.model").unlink()
    (tmp_path / "vocabulary.model").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="leads out"):
        walt_jax.load(tmp_path)
