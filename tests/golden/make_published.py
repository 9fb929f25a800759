"""Makes published_*.safetensors: small random models of diffusers, and what they answer.

    pip install torch diffusers && python tests/golden/make_published.py

`dit_original` has the weights of `dit` under the names of facebookresearch/DiT, and what the model answers with DiT's
frequencies, 10000^(-i/128), where diffusers has 10000^(-i/127).
"""

import pathlib

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel
from diffusers.models.embeddings import Timesteps
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
STEPS = torch.tensor([0, 500, 999])


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """As the files have them, 16 bits; what is computed with them has 64."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model.double().eval()


def save(tensors: dict[str, np.ndarray], name: str) -> None:
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, HERE / name)


def halves(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().half().numpy() for name, value in model.named_parameters()}


def dit() -> None:
    model = rounded(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=5,
            norm_eps=1e-6,
        )
    )
    # As the class makes them, embeddings differ from block to block.
    image = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.tensor([0, 4, 5])
    given = {"input.image": image.float().numpy(), "input.labels": labels.numpy(), "input.steps": STEPS.numpy()}
    with torch.no_grad():
        output = model(image, timestep=STEPS, class_labels=labels).sample.float().numpy()
    save({**halves(model), **given, "output": output}, "published_dit_each.safetensors")
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())

    def answer():
        with torch.no_grad():
            return model(image, timestep=STEPS, class_labels=labels).sample.float().numpy()

    save({**halves(model), **given, "output": answer()}, "published_dit.safetensors")
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    save({**original(halves(model)), **given, "output": answer()}, "published_dit_original.safetensors")


def original(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of facebookresearch/DiT."""
    renamed = {}
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    for block in range(2):
        there, here = f"transformer_blocks.{block}", f"blocks.{block}"
        names[f"{there}.norm1.linear"] = f"{here}.adaLN_modulation.1"
        names[f"{there}.attn1.to_out.0"] = f"{here}.attn.proj"
        names[f"{there}.ff.net.0.proj"] = f"{here}.mlp.fc1"
        names[f"{there}.ff.net.2"] = f"{here}.mlp.fc2"
        for kind in ("weight", "bias"):
            parts = [weights[f"{there}.attn1.to_{part}.{kind}"] for part in "qkv"]
            renamed[f"{here}.attn.qkv.{kind}"] = np.concatenate(parts)
    for there, here in names.items():
        for kind in ("weight", "bias"):
            renamed[f"{here}.{kind}"] = weights[f"{there}.{kind}"]
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    renamed["y_embedder.embedding_table.weight"] = weights[table]
    return renamed


def latte() -> None:
    model = rounded(
        LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=3,
            out_channels=6,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            caption_channels=5,
            cross_attention_dim=24,
            video_length=3,
            attention_bias=True,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )
    )
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(3, 3, 3, 8, 8, generator=generator).double()
    text = torch.randn(3, 4, 5, generator=generator).double()
    with torch.no_grad():
        output = model(video, timestep=STEPS, encoder_hidden_states=text).sample.float().numpy()
    given = {"input.video": video.float().numpy(), "input.text": text.float().numpy(), "input.steps": STEPS.numpy()}
    save({**halves(model), **given, "output": output}, "published_latte.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    dit()
    latte()
    for path in sorted(HERE.glob("published_*.safetensors")):
        print(path.name, path.stat().st_size)
