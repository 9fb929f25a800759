"""Files of what was asked for: long videos, whole and stopped."""

import json

import numpy as np
import pytest
from small_generator import make

from walt_jax.data.video import read_clip
from walt_jax.generation import cascade
from walt_jax.generation.ask_files import sample_files
from walt_jax.generation.asking import Ask
from walt_jax.generation.long_video import Segment

pytestmark = pytest.mark.usefixtures("quick_compilation")
PIXELS = (9, 16, 16)
FRAMES = 21
TOTAL = 1 + (FRAMES - 1) // 4


@pytest.fixture(scope="module")
def generator():
    return make()


@pytest.mark.parametrize("before", [0, 2])
def test_a_long_video_that_is_stopped(generator, tmp_path, monkeypatch, before):
    """Before its first frame nothing is left of it; after, its frames and latents are, marked as incomplete."""

    def segments(generator, request, keep):
        for frame in range(before):
            latents = np.full((1, *generator.shape(request.size)[1:]), frame, np.float32)
            keep([frame], latents)
            yield Segment(latents, np.zeros((4 if frame else 1, 16, 16, 3), np.uint8))
        raise KeyboardInterrupt

    monkeypatch.setattr(cascade, "segments", segments)
    with pytest.raises(KeyboardInterrupt):
        sample_files(generator, Ask(8.0, frames=FRAMES), PIXELS, [("a", 1), ("b", 2)], "", tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    if not before:
        assert not left
        return
    assert left == {"000_a_seed1.mp4", "latents/000_a_seed1.npy", "samples.json", "contact_sheet.png"}
    assert read_clip(tmp_path / "000_a_seed1.mp4").shape == (5, 16, 16, 3)
    [row] = json.loads((tmp_path / "samples.json").read_text())
    assert row["num_frames"] == 5 and row["complete"] is False
    latents = np.load(tmp_path / row["latents"])
    assert len(latents) == TOTAL and (latents[1] == 1).all() and np.isnan(latents[before:]).all()
