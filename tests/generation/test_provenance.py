"""The file beside a video says what made it, and which file that is."""

import hashlib
import json

import av
import numpy as np

from walt_jax.generation.sample import Samples


def test_a_file_stands_beside_each_video(tmp_path):
    samples = Samples(tmp_path, 8.0, settings={"steps": 3}, made_by={"model": "demo", "checkpoints": {"video": 7}})
    samples.add(np.zeros((5, 16, 16, 3), np.uint8), "a ball", 4)
    samples.add_stream(np.zeros((5, 16, 16, 3), np.uint8), (5, 16, 16), "a long one", 5)
    for row in samples.rows:
        video = tmp_path / row["file"]
        found = json.loads(video.with_suffix(".json").read_text())
        assert found["sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
        assert found["bytes"] == video.stat().st_size and found["generated"] is True
        assert found["checkpoints"] == {"video": 7} and found["steps"] == 3 and found["prompt"] == row["prompt"]
        with av.open(str(video)) as file:
            assert json.loads(file.metadata["comment"]).items() <= found.items()


def test_without_it_there_is_none(tmp_path):
    samples = Samples(tmp_path, 8.0, tags=False)
    samples.add(np.zeros((5, 16, 16, 3), np.uint8), "a ball", 4)
    assert not list(tmp_path.glob("000*.json"))
