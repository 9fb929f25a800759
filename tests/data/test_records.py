"""An ArrayRecord data set is a source like the folder that it was made from."""

import collections
import io
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from walt_jax.data import store as store_lib
from walt_jax.data.clips import StoredClips
from walt_jax.data.media import write_video
from walt_jax.data.pipeline import Data, DataConfig
from walt_jax.data.records import Records
from walt_jax.data.shapes import ClipShape
from walt_jax.errors import UserError

SHAPES = (ClipShape(5, 16, 16),)


def encoded(folder, number):
    path = folder / f"{number}.mp4"
    write_video(path, np.full((9, 16, 16, 3), 20 * number, np.uint8), 8)
    return path.read_bytes()


def write(folder, out, features, splits):
    """Examples into a data set, as TFDS does it."""

    class Clips(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {name: self._generate_examples(examples) for name, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    builder = Clips(data_dir=out, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twelve clips of four videos, each of one grey, as `--mode=prepare` writes them; one is broken."""
    folder = tmp_path_factory.mktemp("files")
    features = {
        "video": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "source": tfds.features.Text(),
    }
    examples = [
        {"video": encoded(folder, n), "captions": [f"grey {n}", f"shade {n}"], "source": f"{n % 4}.mp4"}
        for n in range(12)
    ]
    examples.append({"video": b"no video", "captions": [], "source": "0.mp4"})
    return write(folder, tmp_path_factory.mktemp("records"), features, {"train": examples})


def test_examples_are_clips_with_their_captions(scenes):
    with pytest.raises(UserError, match=r"1 of 13 examples in .* first being train/\d+ \(not a video"):
        Records(scenes)
    store = Records(scenes, max_bad_fraction=0.1)
    parts = {split: StoredClips(store, split, SHAPES, 8.0) for split in ("train", "held_out")}
    assert {len(part) for part in parts.values()} == {9, 3}  # of four sources one is held out, with all of its clips
    sources = {split: {row.group for row in part._rows} for split, part in parts.items()}
    assert not sources["train"] & sources["held_out"]
    rng = np.random.default_rng(0)
    seen = collections.Counter()
    for part in parts.values():
        for index in range(len(part)):
            for _ in range(20):
                clip = part.sample(index, rng)
                number = round(clip["video"].mean() / 20)
                assert clip["video"].shape == (5, 16, 16, 3)
                word, named = clip["caption"].split()
                assert int(named) == number
                seen[word] += 1
    assert abs(seen["grey"] - 120) < 4 * np.sqrt(60)
    assert len(store.skipped) == 1


def test_examples_are_checked_in_parallel_with_equal_results(scenes, monkeypatch):
    look, threads = Records.look, set()

    def uneven(self, content):
        threads.add(threading.get_ident())
        time.sleep(0.1 if len(threads) % 2 else 0.01)  # so that they don't end as they began
        return look(self, content)

    monkeypatch.setattr(Records, "look", uneven)
    several = Records(scenes, max_bad_fraction=0.1)
    assert 1 < len(threads) <= store_lib.CHECK_THREADS
    monkeypatch.setattr(store_lib, "CHECK_THREADS", 1)
    threads.clear()
    one = Records(scenes, max_bad_fraction=0.1)
    assert len(threads) == 1
    assert several.rows == one.rows and several.reasons == one.reasons
    assert list(several.info.items()) == list(one.info.items())
    numbers = [int(row.file.rsplit("/", 1)[1]) for row in several.rows]
    assert numbers == sorted(numbers) and len(numbers) == 12


def test_a_config_takes_a_data_set_for_a_source(scenes):
    data = Data(DataConfig(f"{scenes}*2, drawn", 5, 16, 16, max_bad_fraction=0.1))
    mixture = data.source("train", SHAPES)
    assert isinstance(mixture.sources[0].store, Records)
    assert mixture.weights == (2.0, 1.0)
    assert data.skipped[0]["file"].startswith(f"{scenes}/train/")


def test_images_labels_and_the_data_sets_own_splits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    features = {
        "image": tfds.features.Image(shape=(16, 16, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    examples = []
    for number, image in enumerate(pixels):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "png")
        examples.append({"image": io.BytesIO(content.getvalue()), "label": number % 2})
    path = write(tmp_path, tmp_path / "out", features, {"train": examples[:4], "test": examples[4:]})
    store = Records(path, {"label": 1.0})
    train, held_out = (StoredClips(store, split, (ClipShape(1, 16, 16),), 8.0) for split in ("train", "held_out"))
    rng, seen = np.random.default_rng(0), set()
    for part, numbers in ((train, range(4)), (held_out, range(4, 6))):  # TFDS shuffles the examples of a split
        for index in range(len(part)):
            clip = part.sample(index, rng)
            (number,) = (n for n in numbers if (pixels[n] == clip["video"][0]).all())
            assert clip["caption"] == ("cat", "dog")[number % 2]
            seen.add(number)
    assert seen == set(range(6))


def test_data_sets_without_clips_are_refused(tmp_path):
    path = write(tmp_path, tmp_path / "out", {"sound": tfds.features.Text()}, {"train": [{"sound": "a"}]})
    with pytest.raises(UserError, match="has neither a feature video nor image; it has sound"):
        Records(path)
