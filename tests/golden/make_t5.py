"""Makes t5/: a small random T5 v1.1 encoder as transformers writes it, in several files, and its answer.

pip install torch transformers && python tests/golden/make_t5.py
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

HERE = pathlib.Path(__file__).parent / "t5"


def main() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=320, d_model=12, d_kv=4, num_heads=2, num_layers=2, d_ff=20, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As the files have them, 16 bits; what is computed with them has 64.
            parameter.copy_((1 + 0.3 * torch.randn_like(parameter) if "norm" in name else parameter).half())
    half = {name: value.half() for name, value in model.state_dict().items()}
    model = model.double().eval()
    model.save_pretrained(HERE, state_dict=half, max_shard_size="8KB")
    for name in ("config.json", "generation_config.json"):
        (HERE / name).unlink(missing_ok=True)
    # Distances beyond the last bucket, and padding.
    ids = torch.randint(2, 320, (2, 140), generator=torch.Generator().manual_seed(1))
    ids[0, -1], ids[1, 30], ids[1, 31:] = 1, 1, 0
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    save_file({"ids": ids.int(), "output": output.float()}, HERE / "answer.safetensors")


if __name__ == "__main__":
    main()
