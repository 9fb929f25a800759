"""Papers' protocols on a small model with random parameters and the stand-in network: numbers, names, resuming."""

import dataclasses
import json

import numpy as np
import pytest
import small_generator

from walt_jax.data.pipeline import Data, DataConfig, Mixture
from walt_jax.data.shapes import ClipShape
from walt_jax.errors import UserError
from walt_jax.evaluation import distances, measure_protocol, random_features, real_clips
from walt_jax.evaluation.config import EvaluationConfig
from walt_jax.evaluation.features import features_of
from walt_jax.evaluation.frechet import frechet_distance, moments
from walt_jax.evaluation.kernel_distance import kernel_distance
from walt_jax.evaluation.measure_protocol import Measurement, merge_into_report
from walt_jax.evaluation.paper_protocols import PAPER_PROTOCOLS
from walt_jax.evaluation.real_clips import RealClips, Sums, reference_of, shrunk_to
from walt_jax.generation.request import Request

pytestmark = pytest.mark.usefixtures("quick_compilation")
DATA = DataConfig("drawn", 9, 16, 16)
SHAPE = (ClipShape(9, 16, 16),)


@pytest.fixture(autouse=True)
def without_weights(monkeypatch):
    monkeypatch.setattr(distances, "find_weights", lambda network, given: None)


@pytest.fixture(scope="module")
def generator():
    return small_generator.make()


@pytest.fixture
def run(generator, tmp_path):
    def make(name, **changes):
        paper = dataclasses.replace(PAPER_PROTOCOLS[name], **{"clip": (9, 16, 16), "steps": None, **changes})
        config = EvaluationConfig(8, seed=7)
        source = Data(DATA).source
        return Measurement(
            paper, tmp_path, "me", generator.model.codec, generator.tokenizer, generator, DATA, source, config
        )

    return make


def stand_in(clips):
    return features_of(random_features.random_detector(), random_features.RANDOM_PROTOCOL, clips)


def by_name(metrics):
    return {metric["name"]: metric for metric in metrics}


def test_samples_of_each_class_in_turn_against_real_clips_fold_by_fold(run, generator):
    small = run("ucf101_walt", samples=3, folds=2, real=5, guidance=2.0)
    found = by_name(measure_protocol.measure_protocol(small))
    metric = found["like_ucf101_walt_frechet_random_features"]
    assert metric["differences"] == ["a stand-in network, because there are no weights of the protocol's"]
    source = Data(DATA).source("train", SHAPE)
    captions = sorted(set(source.captions))
    samples = [generator.generate([Request(captions[number], number)])[0] for number in range(6)]
    order = np.random.default_rng([7, 0]).permutation(len(source))[:5]
    real = [source.sample(int(i), np.random.default_rng([7, n]))["video"] for n, i in enumerate(order)]
    against = moments(stand_in(real), 1)
    expected = [frechet_distance(moments(stand_in(samples[at : at + 3]), 1), against) for at in (0, 3)]
    assert metric["value"] == pytest.approx(np.mean(expected), rel=1e-3)
    assert metric["folds"]["values"] == pytest.approx(expected, rel=1e-3)
    assert metric["folds"]["standard_deviation"] == pytest.approx(np.std(expected), rel=1e-2)
    kernel = [kernel_distance(stand_in(samples[at : at + 3]), stand_in(real)) for at in (0, 3)]
    assert found["like_ucf101_walt_kernel_random_features"]["value"] == pytest.approx(np.mean(kernel), rel=1e-3)


def test_a_paper_s_name_stands_only_where_all_is_as_in_the_paper(run, monkeypatch):
    monkeypatch.setitem(distances.PROTOCOLS, "fvd_tf1", random_features.RANDOM_PROTOCOL)
    monkeypatch.setitem(distances.STAND_INS, "fvd_tf1", None)
    whole = run("ucf101_walt", samples=2, folds=1, real=2, guidance=2.0, distances=("frechet_random_features",))
    assert whole.differences(2) == []
    (metric, _) = measure_protocol.measure_protocol(whole)
    assert metric["name"] == "ucf101_walt_frechet_random_features" and metric["open"] == whole.paper.open
    config = dataclasses.replace(whole.config, protocol_samples=3)
    other = dataclasses.replace(whole, config=config, data=dataclasses.replace(DATA, frames=5))
    assert other.differences(1) == [
        "clips of 5 × 16 × 16, the protocol's have 9 × 16 × 16",
        "1 × 3 samples, the protocol has 1 × 2",
        "1 real clips, the protocol has 2",
    ]
    paper = dataclasses.replace(whole.paper, steps=50, guidance=1.0)
    assert dataclasses.replace(whole, paper=paper).differences(2) == [
        "2 sampling steps, the paper has 50",
        "guidance 2, the paper has 1",
    ]


def test_a_stopped_command_samples_only_what_is_missing(run, monkeypatch):
    small = run("ucf101_walt", samples=11, folds=1, real=4)
    made, whole = [], measure_protocol._made

    def counting(run, real, numbers):
        if len(made) == 1:
            made.append(())
            raise KeyboardInterrupt
        made.append(tuple(numbers))
        return whole(run, real, numbers)

    monkeypatch.setattr(measure_protocol, "_made", counting)
    with pytest.raises(KeyboardInterrupt):
        measure_protocol.measure_protocol(small)
    before = measure_protocol.measure_protocol(small)
    assert [number for some in made for number in some] == list(range(11))
    assert measure_protocol.measure_protocol(small) == before and len(made) == 3
    # Other models, and other sampling, are sampled anew.
    measure_protocol.measure_protocol(dataclasses.replace(small, identity="other"))
    assert [number for some in made[3:] for number in some] == list(range(11))


def test_frames_are_predicted_of_real_clips(run, generator, monkeypatch):
    asked = []
    whole = type(generator).generate

    def generate(self, requests, bar=None, watch=None):
        asked.extend(requests)
        return whole(self, requests, bar, watch)

    monkeypatch.setattr(type(generator), "generate", generate)
    small = run("k600_walt", samples=2, folds=1, real=3, measured=(8, 8))
    (metric, _) = measure_protocol.measure_protocol(small)
    assert metric["reference_count"] == 3 and "all shrunk to 8 × 8 pixels" in metric["protocol"]
    real = RealClips(Data(DATA).source("held_out", SHAPE), 3, 7)
    for number, request in enumerate(asked):
        assert request.seed == number
        until = request.given.until
        assert (until[:2] == 0).all() and (until[2:] > 1).all()  # 5 frames are two latent ones
        latents = generator.model.codec.encode(generator.tokenizer, real.clip(number)[None])[0][0]
        np.testing.assert_allclose(request.given.latents[:2], latents[:2], atol=1e-4)


def test_reconstructions_against_their_originals(run, generator):
    small = run("rfvd_ucf", samples=4, real=4)
    (metric, _) = measure_protocol.measure_protocol(dataclasses.replace(small, generator=None))
    real = RealClips(Data(DATA).source("train", SHAPE), 4, 7)
    clips = [real.clip(number) for number in range(4)]
    codec = generator.model.codec
    again = np.asarray(codec.decode(generator.tokenizer, codec.encode(generator.tokenizer, np.stack(clips))[0])[0])
    expected = frechet_distance(moments(stand_in(list(again)), 1), moments(stand_in(clips), 1))
    assert metric["value"] == pytest.approx(expected, rel=1e-3)
    assert metric["name"] == "like_rfvd_ucf_frechet_random_features"


def test_a_run_that_a_protocol_does_not_suit_is_told_in_a_sentence(run, generator):
    for small, words in (
        (dataclasses.replace(run("ucf101_walt"), generator=None), "trains only a tokenizer; rfvd_ucf measures those"),
        (dataclasses.replace(run("k600_walt"), data=dataclasses.replace(DATA, frames=5)), "observes 5 frames"),
    ):
        with pytest.raises(UserError, match=words):
            measure_protocol.measure_protocol(small)


def test_numbers_are_added_to_the_report_in_place_of_earlier_ones(tmp_path):
    path = tmp_path / "evaluate.json"
    merge_into_report(path, [{"name": "a", "value": 1}])
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": [3]}))
    merge_into_report(path, [{"name": "b", "value": 2}])
    merge_into_report(path, [{"name": "a", "value": 3}])
    assert json.loads(path.read_text()) == {
        "metrics": [{"name": "b", "value": 2}, {"name": "a", "value": 3}],
        "prompts": [3],
    }


def test_sums_give_the_moments_of_all_features(tmp_path):
    rng = np.random.default_rng(0)
    features = (1000 + rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))).astype(np.float32)
    sums = Sums(6)
    for part in np.split(features, [1, 40, 41, 200]):
        sums.add(part)
        sums.save(tmp_path / "s.npz")
        sums = Sums.load(tmp_path / "s.npz", 6)
    for ddof in (0, 1):
        expected = moments(features, ddof)
        found = sums.reference(ddof).moments
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-9)
        assert found.count == 300
    np.testing.assert_array_equal(sums.kept, features)
    (tmp_path / "s.npz").write_bytes(b"PK damaged")
    assert Sums.load(tmp_path / "s.npz", 6) is None and Sums.load(tmp_path / "none.npz", 6) is None


def test_statistics_of_real_clips_are_kept_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(real_clips, "CHUNK", 4)
    source = Data(DATA).source("train", SHAPE)
    real, read = RealClips(source, 10, 1), []
    whole = RealClips.clips

    def counting(self, numbers):
        if len(read) == 1:
            read.append(())
            raise KeyboardInterrupt
        read.append(tuple(numbers))
        return whole(self, numbers)

    monkeypatch.setattr(RealClips, "clips", counting)
    rest = (random_features.random_detector(), random_features.RANDOM_PROTOCOL, 9, None, tmp_path, "clips")
    with pytest.raises(KeyboardInterrupt):
        reference_of(real, *rest)
    found, digest = reference_of(real, *rest)
    assert [number for some in read for number in some] == list(range(10))
    expected = moments(stand_in([real.clip(number) for number in range(10)]), 1)
    np.testing.assert_allclose(found.moments.mean, expected.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.moments.covariance, expected.covariance, rtol=1e-3, atol=1e-5)
    again, same = reference_of(real, *rest)
    assert len(read) == 4 and same == digest and again.moments.count == 10
    for other in (dataclasses.replace(real, count=9), dataclasses.replace(real, seed=2)):
        assert other.digest() != real.digest()
    assert RealClips(Data(DATA).source("held_out", SHAPE), 10, 1).digest() != real.digest()


def test_each_clip_comes_once_before_any_comes_again():
    source = Data(DATA).source("held_out", SHAPE)
    seen = []
    one = Mixture((_Noted(source, seen),), (1.0,))
    real = RealClips(one, 3 * len(source), 0)
    for number in range(2 * len(source)):
        real.clip(number)
    assert sorted(seen[: len(source)]) == sorted(seen[len(source) :]) == list(range(len(source)))


class _Noted:
    """A source that notes which clips are taken."""

    def __init__(self, source, seen):
        self._source, self._seen = source, seen

    def __len__(self):
        return len(self._source)

    def sample(self, index, rng):
        self._seen.append(index)
        return self._source.sample(index, rng)


def test_clips_are_shrunk_to_the_measured_size():
    clip = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    assert shrunk_to(clip, None) is clip
    found = shrunk_to(clip, (8, 8))
    # Half the size by half-pixel centres: the mean of squares of 2 × 2.
    np.testing.assert_allclose(found, clip.reshape(2, 8, 2, 8, 2, 3).mean(axis=(2, 4)), atol=1e-4)
