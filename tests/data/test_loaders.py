"""The benchmark of loaders: all read the same windows, and its report is complete."""

import json
import pathlib
import runpy

import numpy as np
import pytest

from walt_jax.data.media import write_video
from walt_jax.data.pipeline import Clips, Data, DataConfig
from walt_jax.data.shapes import ClipShape

pytest.importorskip("torch", reason='torch is not installed: pip install -e ".[race]"')

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks/loaders.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten clips in which each frame has a grey of its own, and one that is too short."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(10):
        levels = (np.arange(24, dtype=np.uint8) * 10)[:, None, None, None]
        write_video(folder / f"{index}.mp4", np.broadcast_to(levels, (24, 32, 32, 3)), 8)
    write_video(folder / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    return folder


def test_all_read_the_same_windows(folder):
    loaders = runpy.run_path(str(SCRIPT))
    config, shape = DataConfig(str(folder), 5, 16, 16, cache_bytes=0), ClipShape(5, 16, 16)
    work = loaders["choose"](config, shape, clips=100, batch_size=2)
    assert len(work.windows) == len(work.numbers) >= 6 and len(work.windows) % 2 == 0
    assert not any("short" in window.path for window in work.windows)
    assert len({window.start for window in work.windows}) > 1
    clips = Clips(Data(config).source("train", (shape,)), loaders["SEED"])
    dataset = loaders["TorchWindows"](work.windows, 5, 16, 8.0)
    for place, number in enumerate(work.numbers):
        own, other = clips[number]["video"], dataset[place].permute(0, 2, 3, 1).numpy()
        assert own.shape == other.shape == (5, 16, 16, 3)
        assert np.abs(own.astype(int) - other).max() <= 2
    rivals = [loaders["pyav"](work), loaders["torch_loader"](work, 0), loaders["ours"](work, config)]
    assert {run() for run in rivals} == {5 * len(work.windows)}


def test_what_it_writes(folder, tmp_path, capsys):
    flags = f"--data={folder} --out={tmp_path / 'out.json'} --frames=5 --side=16 --batch_size=2 --rounds=2 --epochs=2"
    runpy.run_path(str(SCRIPT))["main"]([*flags.split(), "--workers", "0", "1"])
    result = json.loads((tmp_path / "out.json").read_text())
    names = ["torch, 0 workers", "torch, 1 workers", "pyav", "ours", "ours, cached"]
    assert [row["name"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row["seconds_fastest"] <= row["seconds_median"] <= row["seconds_slowest"]
        assert row["frames_per_second"] == pytest.approx(5 * row["clips_per_second"])
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 2 * row["clips_per_second"])
        assert row["ours_over_it_least"] <= row["ours_over_it"] <= row["ours_over_it_most"]
    assert result["rows"][3]["ours_over_it"] == 1
    assert len(result["resident_bytes_after_epochs"]) == 3
    assert all(entry["decoders"] > 0 for entry in result["resident_bytes_after_epochs"])
    assert "| ours, cached |" in capsys.readouterr().out
