"""Writes tests/golden/vjepa.safetensors: features of the package vjepa with random weights, and JEDi.

    pip install torch safetensors && pip install --no-deps vjepa && python tests/golden/make_vjepa.py

A small network, put together as oooolga/JEDi does it. Weights come from `random_state` and clips from `clips`,
which the test calls too, so the file holds only the answers.
"""

import pathlib
import zlib

import numpy as np

WIDTH, LAYERS, HEADS, SIDE, FRAMES = 48, 3, 4, 32, 4


def random_state() -> dict[str, np.ndarray]:
    """Tensors by the names of Meta's two checkpoints, each drawn with a seed of its name."""
    d = WIDTH

    def norm(name):
        return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

    def linear(name, inside, out):
        return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}

    def rest(name):
        return {
            **norm(f"{name}.norm1"), **norm(f"{name}.norm2"),
            **linear(f"{name}.mlp.fc1", d, 4 * d), **linear(f"{name}.mlp.fc2", 4 * d, d),
        }  # fmt: skip

    encoder = {"patch_embed.proj.weight": (d, 3, 2, 16, 16), "patch_embed.proj.bias": (d,), "pos_embed": (1, 8, d)}
    for number in range(LAYERS):
        block = f"blocks.{number}"
        encoder |= rest(block) | linear(f"{block}.attn.qkv", d, 3 * d) | linear(f"{block}.attn.proj", d, d)
    encoder |= norm("norm")
    block = "pooler.cross_attention_block"
    pooler = {"pooler.query_tokens": (1, 1, d), **rest(block)}
    pooler |= linear(f"{block}.xattn.q", d, d) | linear(f"{block}.xattn.kv", d, 2 * d)
    pooler |= linear(f"{block}.xattn.proj", d, d) | linear("linear", d, 10)
    shapes = {f"target_encoder.module.backbone.{name}": shape for name, shape in encoder.items()}
    shapes |= {f"classifier.module.{name}": shape for name, shape in pooler.items()}
    state = {}
    for name, shape in shapes.items():
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        if ".norm" in name and name.endswith("weight"):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) > 1 and name.endswith("weight"):
            value = 1.5 * rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        else:
            value = 0.3 * rng.normal(size=shape)
        state[name] = value.astype(np.float32)
    return state


def clips() -> np.ndarray:
    """Five, float32 [5, 4, 32, 32, 3], as if prepared."""
    return np.random.RandomState(0).normal(size=(5, FRAMES, SIDE, SIDE, 3)).astype(np.float32)


def main() -> None:
    import functools

    import torch
    from safetensors.numpy import save_file
    from vjepa.models.attentive_pooler import AttentiveClassifier
    from vjepa.models.vision_transformer import VisionTransformer

    encoder = VisionTransformer(
        SIDE, 16, FRAMES, 2, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, uniform_power=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    classifier = AttentiveClassifier(embed_dim=WIDTH, num_heads=HEADS, depth=1, num_classes=10)
    state = {name: torch.tensor(value) for name, value in random_state().items()}
    for network, prefix in ((encoder, "target_encoder.module.backbone."), (classifier, "classifier.module.")):
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        network.load_state_dict(own)  # strict: no name is missing or too many
        network.eval()
    with torch.no_grad():
        tokens = encoder(torch.tensor(clips()).permute(0, 4, 1, 2, 3))
        features = classifier.pooler(tokens).squeeze(1).numpy()
    one, other = features[:2], features[2:]

    def kernel(x, y):
        """scikit-learn's polynomial kernel, degree 2 and coef0 0, which JEDi calls."""
        return np.mean([[(a @ b / WIDTH) ** 2 for b in y] for a in x])

    jedi = 100 * (kernel(one, one) + kernel(other, other) - 2 * kernel(one, other))
    answers = {"features": features, "jedi": np.array([jedi])}
    save_file(answers, pathlib.Path(__file__).with_name("vjepa.safetensors"))
    print(features.shape, float(features.std()), jedi)


if __name__ == "__main__":
    main()
