"""From a config file's knobs to dataclasses: what fits is converted, and every mistake is named with its remedy."""

import dataclasses
import itertools
import json
import pathlib
import re
import runpy
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from walt_jax.config import Fraction, Positive, build
from walt_jax.data import prepare_config
from walt_jax.errors import UserError
from walt_jax.main import parse
from walt_jax.training.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Part:
    width: int
    rate: float = 0.5

    def __post_init__(self):
        if self.width == 13:
            raise ValueError(f"width={self.width} brings bad luck")


@dataclasses.dataclass(frozen=True)
class Whole:
    name: str
    part: Part
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    windows: tuple[tuple[int | None, int | None], ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    flag: bool = False
    other: Part | None = None


KNOBS = {"name": "run", "part": {"width": 3}}


def whole(**changed):
    return build(Whole, {**KNOBS, **changed}, "config")


def sentence(**changed):
    with pytest.raises(UserError) as caught:
        whole(**changed)
    message = str(caught.value)
    assert message.startswith("config")
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message


def test_knobs_become_fields_and_the_rest_has_its_default():
    assert whole() == Whole("run", Part(3))
    assert whole(part={"width": 3, "rate": 0.1}, limit=7, flag=True) == Whole("run", Part(3, 0.1), limit=7, flag=True)


@pytest.mark.parametrize("mapping", [dict, ConfigDict])
def test_groups_may_be_any_mapping_and_keep_their_order(mapping):
    built = whole(parts=mapping({"second": {"width": 2}, "third": {"width": 3}}), part=mapping({"width": 1}))
    assert built.part == Part(1)
    assert list(built.parts.items()) == [("second", Part(2)), ("third", Part(3))]


@given(st.lists(st.lists(st.none() | st.integers(0), min_size=2, max_size=2)))
def test_lists_become_tuples_of_any_length(windows):
    """JSON has no tuples."""
    expected = tuple(tuple(window) for window in windows)
    assert whole(windows=windows).windows == expected
    assert whole(windows=expected).windows == expected


def test_none_is_taken_where_it_may_be():
    built = whole(limit=None, other=None, windows=((None, 1),))
    assert (built.limit, built.other, built.windows) == (None, None, ((None, 1),))
    assert whole(other={"width": 4}).other == Part(4)
    assert "config.name is None; it should be of type str" in sentence(name=None)
    assert "config.part is None; it should be a group of knobs (width, rate)" in sentence(part=None)
    assert "config.part.width is None; it should be of type int" in sentence(part={"width": None})


def test_whole_numbers_are_taken_for_real_ones_and_are_made_so():
    built = whole(part={"width": 3, "rate": 1}, pair=(1, 2))
    assert (type(built.part.rate), type(built.pair[1]), type(built.pair[0])) == (float, float, int)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": 3}, "config.name is 3; it should be of type str"),
        ({"part": {"width": 3.0}}, "config.part.width is 3.0; it should be of type int"),
        ({"part": {"width": "3"}}, "config.part.width is '3'; it should be of type int"),
        ({"part": {"width": True}}, "config.part.width is True; it should be of type int"),
        ({"part": {"width": 3, "rate": True}}, "config.part.rate is True; it should be of type float"),
        ({"part": {"width": 3, "rate": "fast"}}, "config.part.rate is 'fast'; it should be of type float"),
        ({"flag": 1}, "config.flag is 1; it should be of type bool"),
        ({"limit": "7"}, "config.limit is '7'; it should be of type int"),
        ({"part": 3}, "config.part is 3; it should be a group of knobs (width, rate)"),
        ({"parts": [1]}, "config.parts is [1]; it should be a group of named entries"),
        ({"parts": {"second": {"width": "x"}}}, "config.parts.second.width is 'x'; it should be of type int"),
        ({"windows": 3}, "config.windows is 3; it should be a list"),
        ({"windows": "ab"}, "config.windows is 'ab'; it should be a list"),
        ({"windows": [[1, 2], [1]]}, "config.windows[1] has 1 entries; it should have 2"),
        ({"windows": [[1, "2"]]}, "config.windows[0][1] is '2'; it should be of type int"),
        ({"pair": [1]}, "config.pair has 1 entries; it should have 2"),
        ({"pair": [1.5, 2]}, "config.pair[0] is 1.5; it should be of type int"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_place_and_the_right_one(changed, message):
    assert message in sentence(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nmae": "run"}, "config.nmae is read by nothing; did you mean 'name'?"),
        ({"part": {"width": 3, "rte": 0.1}}, "config.part.rte is read by nothing; did you mean 'rate'?"),
        (
            {"parts": {"second": {"width": 2, "xyz": 1}}},
            "config.parts.second.xyz is read by nothing; it has width, rate.",
        ),
    ],
)
def test_a_knob_that_nothing_reads_is_an_error_with_a_suggestion(changed, message):
    assert message in sentence(**changed)


def test_a_missing_knob_is_named():
    with pytest.raises(UserError, match=r"^config\.name is missing; add it to the config file\.$"):
        build(Whole, {"part": {"width": 1}}, "config")
    assert "config.part.width is missing" in sentence(part={})
    assert "config.parts.second.width is missing" in sentence(parts={"second": {"rate": 1.0}})


def test_what_a_dataclass_refuses_is_said_with_its_place():
    assert sentence(part={"width": 13}) == "config.part: width=13 brings bad luck."
    assert sentence(parts={"second": {"width": 13}}) == "config.parts.second: width=13 brings bad luck."


def test_numbers_out_of_their_range_are_named_with_it():
    @dataclasses.dataclass(frozen=True)
    class Bounded:
        count: Positive = 1
        share: Fraction = 0.5
        sizes: tuple[Positive | None, ...] = ()
        kind: Literal["a", "b"] = "a"
        rest: float = 0.0

    def said(**knobs):
        with pytest.raises(UserError) as caught:
            build(Bounded, knobs, "config")
        return str(caught.value)

    assert build(Bounded, {"count": 1, "share": 1, "sizes": [None, 2], "kind": "b"}, "config").share == 1.0
    assert said(count=0) == "config.count is 0; it should be at least 1."
    assert said(share=1.5) == "config.share is 1.5; it should be at least 0 and at most 1."
    assert said(sizes=[1, 0]) == "config.sizes[1] is 0; it should be at least 1."
    assert said(kind="c") == "config.kind is 'c'; choose a or b."
    assert said(rest=-0.1) == "config.rest is -0.1; it should be at least 0."
    assert "config.rest is nan" in said(rest=float("nan"))


CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_each_config_fits(name):
    """And through JSON, as a workdir keeps it."""
    knobs = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    kind = RunConfig
    if name == "prepare":
        kind, knobs.prepare.source = prepare_config.Knobs, "FOLDER"
    built = build(kind, knobs, "config")
    assert build(kind, json.loads(json.dumps(knobs.to_dict())), "config") == built


@pytest.mark.parametrize("name", ["walt_trends", "demo_siblings", "walt_demo_few_steps"])
def test_each_variant_fits_and_differs_from_the_others(name):
    module = runpy.run_path(str(CONFIGS / f"{name}.py"))
    built = [build(RunConfig, module["get_config"](variant), "config") for variant in module["VARIANTS"]]
    assert all(one != other for one, other in itertools.combinations(built, 2))


def parents(path: pathlib.Path) -> list[str]:
    """The names of the configs that a config changes."""
    return re.findall(r'parent\(__file__, "(\w+)"', path.read_text())


def test_a_config_has_one_parent_at_most_and_a_parent_has_none():
    """So that two files show all of a config."""
    found = {path.stem: parents(path) for path in CONFIGS.glob("*.py")}
    assert sum(map(len, found.values())) > 10
    for name, those in found.items():
        assert len(those) <= 1, name
        assert not any(found[parent] for parent in those), name


def test_a_config_finds_its_parent_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knobs = parse([f"--config={CONFIGS / 'walt_xl.py'}"]).config
    assert knobs.denoiser.layers == 28 and knobs.denoiser.heads == 16
