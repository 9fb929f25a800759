"""Writes tests/golden/inception.safetensors: features and logits of pytorch-fid's Inception with random weights.

    pip install torch torchvision pytorch-fid safetensors && python tests/golden/make_inception.py

The weights come from `random_state`, which the test calls too, so the file holds only the answers.
"""

import pathlib
import zlib
from collections.abc import Mapping

import numpy as np


def random_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors of a state dict, each drawn with a seed of its name; activations keep their size through the layers."""
    state = {}
    for name, shape in shapes.items():
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("bn.weight"):
            value = rng.uniform(0.8, 1.2, shape)
        elif len(shape) > 1:
            value = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            value = 0.1 * rng.normal(size=shape)
        state[name] = value.astype(np.float32)
    return state


def images() -> np.ndarray:
    """One in 0..255, uint8 [1, 123, 123, 3]: waves and noise."""
    rng = np.random.RandomState(0)
    y, x = np.meshgrid(np.arange(123), np.arange(123), indexing="ij")
    waves = np.stack([np.sin(0.05 * x + 0.03 * k * y) for k in range(3)], -1)
    return np.clip(127 + 90 * waves + 20 * rng.normal(size=(123, 123, 3)), 0, 255).astype(np.uint8)[None]


def main() -> None:
    import torch
    from pytorch_fid import inception
    from safetensors.numpy import save_file

    def made_up(url, progress):
        return {k: torch.tensor(v) for k, v in random_state(shapes).items()}

    # The package's network before its weights are loaded: it says which tensors there are.
    inception.load_state_dict_from_url = lambda url, progress: {}
    shapes: dict[str, tuple[int, ...]] = {}
    whole = torch.nn.Module.load_state_dict

    def noted(module, state, *rest, **options):
        if not state:
            shapes.update({k: tuple(v.shape) for k, v in module.state_dict().items() if "num_batches" not in k})
            state = made_up("", False)
            options["strict"] = False
        return whole(module, state, *rest, **options)

    torch.nn.Module.load_state_dict = noted
    network = inception.InceptionV3([3], resize_input=False).eval()
    with torch.no_grad():
        features = network(torch.tensor(images()).permute(0, 3, 1, 2) / 255)[0].flatten(1)
    # The score's logits: torch-fidelity leaves the bias of the last layer out.
    fc = random_state(shapes)["fc.weight"]
    answers = {"features": features.numpy(), "logits": features.numpy() @ fc.T}
    save_file(answers, pathlib.Path(__file__).with_name("inception.safetensors"))
    print({name: (answer.shape, float(answer.std())) for name, answer in answers.items()}, len(shapes))


if __name__ == "__main__":
    main()
