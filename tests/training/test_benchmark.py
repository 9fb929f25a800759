"""A benchmark's rows say what they should; what the figures are is the machine's affair."""

import json
import pathlib
import runpy

import jax
import pytest

from walt_jax.config import build
from walt_jax.training import benchmark as lib
from walt_jax.training.run_config import RunConfig

pytestmark = pytest.mark.slow  # compiles nine programs
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def rows(quick_compilation):
    knobs = runpy.run_path(str(CONFIGS / "walt_tiny.py"))["get_config"]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "ROUNDS", 2)
        patch.setattr(lib, "PACKS_OF", (64,))
        patch.setattr(lib, "CLIPS_OF", (64,))
        patch.setattr(lib, "on_cpu", lambda: False)  # for both routes of attention
        return {row["name"]: row for row in lib.benchmark(build(RunConfig, knobs, "config"))}


def test_each_part_is_there(rows):
    assert list(rows) == [
        "matmul 2048³ float32",
        "tokenizer_train_step",
        "denoiser_train_step",
        "denoiser_train_step_full_attention",
        "denoiser_train_step_packed_equal",
        "denoiser_train_step_packed_mixed",
        "denoiser_sampling_step",
        "attention_pack_of_64_tokens",
        "attention_pack_of_64_tokens_plain",
        "full_attention_of_64_tokens",
        "full_attention_of_64_tokens_plain",
        "read_latents",
    ]
    json.dumps(list(rows.values()))


def test_rates_follow_from_seconds(rows):
    product = rows["matmul 2048³ float32"]
    assert product["flops"] == 2 * 2048**3 and product["mfu"] == pytest.approx(1)
    for name, row in rows.items():
        if name == "read_latents":  # has no FLOPs; see `test_latents_benchmark`
            continue
        assert 0 < row["seconds_fastest"] <= row["seconds_median"]
        assert row["peak_flops_per_second"] == pytest.approx(product["flops"] / product["seconds_median"])
        assert row["device"] == jax.devices()[0].device_kind
        if "mfu" in row:
            assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds_median"])
            assert row["mfu"] == pytest.approx(row["flops_per_second"] / row["peak_flops_per_second"])
        if "optimizer_flops" in row:
            products = (row["flops"] + row["optimizer_flops"]) / row["peak_flops_per_second"]
            assert row["seconds_over_products"] == pytest.approx(row["seconds_median"] / products)
    assert {name for name, row in rows.items() if "optimizer_flops" in row} == {
        name for name, row in rows.items() if "train_step" in name and "flops" in row
    }


def test_tokens_are_counted(rows):
    # 4 clips of 2 × 2 × 2 tokens: 5 × 16 × 16 pixels, strides of 4, patches of 2 × 2
    for name in ("denoiser_train_step", "denoiser_train_step_packed_equal", "denoiser_sampling_step"):
        row = rows[name]
        assert row["tokens_per_second"] * row["seconds_median"] == pytest.approx(32)
        assert row["tokens_valid_fraction"] == 1
    assert rows["denoiser_train_step_packed_equal"]["flops"] == rows["denoiser_train_step"]["flops"]
    mixed = rows["denoiser_train_step_packed_mixed"]
    assert 0.5 < mixed["tokens_valid_fraction"] <= 1 and "flops" not in mixed
    layer = rows["attention_pack_of_64_tokens"]
    assert all(row["temporary_bytes"] > 0 for name, row in rows.items() if "attention_of" in name or "pack_of" in name)
    assert layer["attention_scores_computed_over_needed"] >= 1
    assert layer["tokens_per_second"] * layer["seconds_median"] == pytest.approx(64 * layer["tokens_valid_fraction"])
