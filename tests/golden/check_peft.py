"""Loads our LoRA file by PEFT itself and compares merged weights. No part of the tests: torch and peft are large.

    PYTHONPATH=tests python tests/golden/check_peft.py write FOLDER   # where walt_jax is installed
    python tests/golden/check_peft.py read FOLDER                     # pip install torch peft, elsewhere

`write` leaves a LoRA with random values, the layers' weights, and these weights as we merge them. `read` makes a torch
module with linear layers of the same names, gives the file to PEFT by its `LoraConfig` from the header, merges, and
compares.
"""

import json
import pathlib
import sys

import numpy as np

HEADER, FILE = "lora_adapter_metadata", "pytorch_lora_weights.safetensors"


def write(folder: pathlib.Path) -> None:
    import jax
    from flax.traverse_util import flatten_dict
    from small_generator import make

    from walt_jax.generation import lora, lora_files
    from walt_jax.generation.latent_diffusion import unboxed

    generator, config = make(), lora.LoraConfig(rank=3, alpha=6.0, targets=("cross_attention", "mlp_in"))
    shapes = jax.eval_shape(generator.model.init, jax.random.key(0))
    pairs, rng = unboxed(lora.fresh(shapes, config, jax.random.key(0))), np.random.default_rng(0)
    pairs = jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.1, leaf.shape)), pairs)
    folder.mkdir(parents=True, exist_ok=True)
    lora_files.write(folder / FILE, pairs, config)
    merged, arrays = flatten_dict(lora.merged(generator.params, pairs, config.scale)), {}
    for path, kernel in lora.targeted(generator.params, config.targets).items():
        name = ".".join(path[1:])
        arrays[f"before.{name}"], arrays[f"after.{name}"] = kernel.T, np.asarray(merged[*path, "kernel"]).T
    np.savez(folder / "weights.npz", **arrays)


def read(folder: pathlib.Path) -> None:
    import torch
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(folder / FILE, framework="pt") as opened:
        header = json.loads(opened.metadata()[HEADER])
    prefix = "transformer."
    config = LoraConfig(**{name.removeprefix(prefix): value for name, value in header.items()})
    tensors = {name.removeprefix(prefix): value for name, value in load_file(folder / FILE).items()}
    weights, model = np.load(folder / "weights.npz"), torch.nn.Module()
    names = [name.removeprefix("before.") for name in weights if name.startswith("before.")]
    for name in names:
        *parents, last = name.split(".")
        place = model
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        before = torch.from_numpy(weights[f"before.{name}"].copy())
        place.add_module(last, torch.nn.Linear(*reversed(before.shape), bias=False))
        getattr(place, last).weight.data = before
    model = inject_adapter_in_model(config, model)
    result = set_peft_model_state_dict(model, tensors)
    missing = [name for name in result.missing_keys if "lora" in name]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    largest = 0.0
    for name in names:
        layer = model.get_submodule(name)
        layer.merge()
        error = np.abs(layer.base_layer.weight.detach().numpy() - weights[f"after.{name}"]).max()
        assert np.abs(weights[f"after.{name}"] - weights[f"before.{name}"]).max() > 0.01
        largest = max(largest, float(error))
    assert largest < 1e-6, largest
    print(f"PEFT took {len(tensors)} tensors of {len(names)} layers; merged weights differ by {largest:.1g} at most")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](pathlib.Path(sys.argv[2]))
