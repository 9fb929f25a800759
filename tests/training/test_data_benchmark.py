"""The pipeline and plain PyAV are timed on the same work."""

import numpy as np
import pytest

from walt_jax.data.media import write_video
from walt_jax.data.pipeline import DataConfig
from walt_jax.data.shapes import ClipShape
from walt_jax.training import data_benchmark as lib


def test_both_get_as_many_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "CLIPS", 9)
    monkeypatch.setattr(lib, "ROUNDS", 2)
    rng = np.random.default_rng(0)
    for index in range(8):
        write_video(tmp_path / f"{index}.mp4", rng.integers(0, 256, (20, 16, 24, 3), np.uint8), 10)
    shapes = (ClipShape(5, 16, 16, stride=2), ClipShape(3, side=16, unit=(8, 8)))
    rows = lib.benchmark_decoding(DataConfig(str(tmp_path), 5, 16, 16, fps=10.0), shapes, 0, np.prod)
    assert [row["name"] for row in rows] == ["decode_pipeline", "decode_bare_pyav"]
    frames = [row["frames_per_second"] * row["seconds_median"] for row in rows]
    clips = [row["clips_per_second"] * row["seconds_median"] for row in rows]
    assert frames[0] == pytest.approx(frames[1]) and 6 * 3 <= frames[0] <= 6 * 5
    assert clips == pytest.approx([6, 6])  # the hash of the names holds out two of eight
    pixels = rows[0]["tokens_per_second"] * rows[0]["seconds_median"] / frames[0]
    assert 8 * 8 <= pixels <= 24 * 24 and "tokens_per_second" not in rows[1]
    assert all(row["threads"] == 2 and row["seconds_median"] > 0 for row in rows)
