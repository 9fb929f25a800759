"""A train step of DiT-S/2 against diffusers' DiTTransformer2DModel in PyTorch: batch 4, float32, interleaved.

    pip install -e ".[race]"
    python benchmarks/dit_speed.py --out=dit_speed.json

Both predict noise from noisy latents of 32 × 32 × 4 with times and classes, take the gradient of its mean squared
error, and a step of AdamW on all parameters. The models are the same function, as
`tests/denoiser/test_published_weights.py` shows.
"""

import argparse
import json
import os
import pathlib
import platform
import runpy
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import DiTTransformer2DModel

from walt_jax.config import build
from walt_jax.denoiser.dit_block import DiTConfig
from walt_jax.denoiser.layout import Layout
from walt_jax.denoiser.model import Condition, Denoiser
from walt_jax.malloc import keep_freed_memory
from walt_jax.training.state import COMPILER_OPTIONS

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "dit_s_2.py"
CHANNELS, SIDE, RATE = 4, 32, 1e-4


def ours(batch: int):
    """A step, and how many parameters there are."""
    knobs = runpy.run_path(str(CONFIG))["get_config"]().denoiser.to_dict()
    config = build(DiTConfig, {**knobs, "dtype": "float32", "scan": False, "remat": "none"}, "config.denoiser")
    grid = config.grid((1, SIDE, SIDE))
    model, width = Denoiser(config, grid), CHANNELS * 4
    rng = np.random.default_rng(0)
    noisy, noise = (rng.normal(size=(batch, SIDE * SIDE // 4, width)).astype(np.float32) for _ in range(2))
    times = rng.uniform(size=(batch, 1)).astype(np.float32)
    condition = Condition(label=rng.integers(1000, size=(batch, 1)))
    params = jax.jit(model.init)(jax.random.key(0), noisy, times, condition, Layout(grid=grid))["params"]
    params = jax.tree.map(lambda leaf: leaf.unbox(), params, is_leaf=lambda leaf: hasattr(leaf, "unbox"))
    optimizer = optax.adamw(RATE, weight_decay=0.0)
    state = [params, optimizer.init(params)]

    def update(params, moments):
        def loss(params):
            out = model.apply({"params": params}, noisy, times, condition, Layout(grid=grid))
            return jnp.square(out[..., :width] - noise).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    compiled = jax.jit(update, donate_argnums=(0, 1), compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))

    def step():
        *state[:], value = compiled(*state)
        return float(value)

    return step, sum(leaf.size for leaf in jax.tree.leaves(params))


def theirs(batch: int):
    """The same of diffusers."""
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=12,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    # Each block has the embeddings of time and class for itself, all alike in what is published; here they are one.
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    noisy, noise = (torch.randn(batch, CHANNELS, SIDE, SIDE) for _ in range(2))
    times, labels = torch.randint(1000, (batch,)), torch.randint(1000, (batch,))

    def step():
        optimizer.zero_grad()
        out = model(noisy, timestep=times, class_labels=labels).sample
        loss = (out[:, :CHANNELS] - noise).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Times both and writes the figures."""
    keep_freed_memory()  # as `walt_jax.main` does; PyTorch is faster with it as well
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    flags = parser.parse_args()
    rows = {}
    steps = {name: make(flags.batch_size) for name, make in {"walt_jax": ours, "diffusers": theirs}.items()}
    for step, _ in steps.values():
        step(), step()
    seconds = {name: [] for name in steps}
    for _ in range(flags.rounds):
        for name, (step, _) in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    for name, (_, parameters) in steps.items():
        rows[name] = {"parameters": parameters, "seconds_median": statistics.median(seconds[name])}
    ratios = [theirs / own for own, theirs in zip(seconds["walt_jax"], seconds["diffusers"], strict=True)]
    result = {
        **rows,
        "diffusers_seconds_over_walt_jax": statistics.median(ratios),
        "rounds": [min(ratios), max(ratios)],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
    }
    flags.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
