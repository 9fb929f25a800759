"""Writes tests/golden/c3d.safetensors: logits of C3D in PyTorch with random weights, by TGANv2's preparation.

    pip install torch safetensors && python tests/golden/make_c3d.py

The network is written here anew. Weights come from `random_state` and the clip from `clip`, which the test calls too,
so the file holds only the answers: of a network of 4 channels and of the whole one of 64.
"""

import pathlib
import zlib

import numpy as np

FACTORS = {"1a": 1, "2a": 2, "3a": 4, "3b": 4, "4a": 8, "4b": 8, "5a": 8, "5b": 8}


def random_state(width: int) -> dict[str, np.ndarray]:
    """Tensors by TGANv2's names, each drawn with a seed of its name; activations keep their size through the layers."""
    sizes, into = {"mean": (1, 3, 16, 128, 171)}, 3
    for name, factor in FACTORS.items():
        sizes |= {f"conv{name}/W": (factor * width, into, 3, 3, 3), f"conv{name}/b": (factor * width,)}
        into = factor * width
    for name, (inside, out) in {
        "fc6": (16 * into, 64 * width), "fc7": (64 * width, 64 * width), "fc8": (64 * width, 101),
    }.items():  # fmt: skip
        sizes |= {f"{name}/W": (out, inside), f"{name}/b": (out,)}
    state = {}
    for name, shape in sizes.items():
        rng = np.random.default_rng(zlib.crc32(f"{name} {width}".encode()))
        if name == "mean":
            value = rng.uniform(80, 120, shape)
        elif len(shape) > 1:
            value = rng.standard_normal(shape, np.float32) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            value = 0.1 * rng.standard_normal(shape)
        state[name] = value.astype(np.float32)
    return state


def clip() -> np.ndarray:
    """In 0..255, uint8 [16, 40, 56, 3]: waves of other directions in each colour, and noise."""
    rng = np.random.RandomState(0)
    t, y, x = np.meshgrid(np.arange(16), np.arange(40), np.arange(56), indexing="ij")
    waves = np.stack([np.sin(0.3 * x + 0.2 * k * y - 0.4 * t) for k in range(3)], -1)
    return np.clip(120 + 80 * waves + 15 * rng.normal(size=(16, 40, 56, 3)), 0, 255).astype(np.uint8)


def main() -> None:
    import torch
    from safetensors.numpy import save_file
    from torch.nn import functional as F

    answers = {}
    for width in (4, 64):
        state = {name: torch.tensor(value) for name, value in random_state(width).items()}
        frames = torch.tensor(clip()[..., [2, 1, 0]].astype(np.float32)).permute(0, 3, 1, 2)
        x = F.interpolate(frames, (112, 112), mode="bilinear", align_corners=True)
        x = x.permute(1, 0, 2, 3)[None] - state["mean"][..., 8:120, 8:120]
        for name in FACTORS:
            x = F.relu(F.conv3d(x, state[f"conv{name}/W"], state[f"conv{name}/b"], padding=1))
            if name not in ("3a", "4a", "5a"):
                x = F.max_pool3d(x, (1, 2, 2) if name == "1a" else 2, ceil_mode=True)
        x = x.flatten(1)
        for name in ("fc6", "fc7"):
            x = F.relu(F.linear(x, state[f"{name}/W"], state[f"{name}/b"]))
        answers[f"logits_{width}"] = F.linear(x, state["fc8/W"], state["fc8/b"]).numpy()
    save_file(answers, pathlib.Path(__file__).with_name("c3d.safetensors"))
    print({name: (answer.shape, float(answer.std())) for name, answer in answers.items()})


if __name__ == "__main__":
    main()
