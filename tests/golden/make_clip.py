"""Writes tests/golden/clip/: a small CLIP with random weights as transformers saves it, and what transformers makes.

    pip install torch torchvision transformers safetensors && python tests/golden/make_clip.py

The vocabulary has all bytes and a few merges; `answers.safetensors` has ids, prepared pictures and embeddings.
"""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).with_name("clip")
CAPTIONS = (
    "a red circle moving left",
    "  A Red\tCIRCLE, isn't it?!  ",
    "12 naïve cafés — über 3½ ¶",
    "e\u0301 日本語 🙂🙂 it's we'll",
    "",
    "moving left " * 12,
)
WORDS = ("red", "circle", "moving", "left", "the", "re", "it", "is")


def pictures() -> list[np.ndarray]:
    """In 0..255: of three sizes, waves and noise."""
    rng, found = np.random.RandomState(0), []
    for height, width in ((32, 32), (45, 61), (90, 40)):
        y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        waves = np.stack([np.sin(0.1 * x + 0.07 * k * y) for k in range(3)], -1)
        found.append(np.clip(127 + 90 * waves + 20 * rng.normal(size=waves.shape), 0, 255).astype(np.uint8))
    return found


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Pieces and merges: bytes, bytes at the end of a word, and each word's prefixes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    pieces, merges = characters + [c + "</w>" for c in characters], []
    for word in WORDS:
        for length in range(1, len(word)):
            end = "</w>" if length == len(word) - 1 else ""
            merge = f"{word[:length]} {word[length]}{end}"
            if merge not in merges:
                merges.append(merge)
                pieces.append(merge.replace(" ", ""))
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def main() -> None:
    import torch
    import transformers
    from safetensors.numpy import save_file

    ids, merges = vocabulary()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (FOLDER / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    end = ids["<|endoftext|>"]
    sizes = {"num_hidden_layers": 2, "intermediate_size": 40}
    config = transformers.CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(ids),
            "hidden_size": 24,
            "num_attention_heads": 3,
            "max_position_embeddings": 20,
            "eos_token_id": end,
            "bos_token_id": end - 1,
            "pad_token_id": end,
        },
        vision_config={**sizes, "hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # larger than at the start of training, or attention would be uniform
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
    model.save_pretrained(FOLDER)
    tokenizer = transformers.CLIPTokenizer(
        vocab=str(FOLDER / "vocab.json"), merges=str(FOLDER / "merges.txt"), model_max_length=20
    )
    encoded = tokenizer(list(CAPTIONS), padding="max_length", truncation=True, return_tensors="pt")
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    prepared = torch.cat(
        [torch.as_tensor(np.asarray(processor(picture).pixel_values[0]))[None] for picture in pictures()]
    )
    with torch.no_grad():
        out = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, pixel_values=prepared)
    answers = {
        "ids": encoded.input_ids.numpy().astype(np.int32),
        "prepared": prepared.permute(0, 2, 3, 1).contiguous().numpy(),
        "pictures": out.image_embeds.numpy(),
        "texts": out.text_embeds.numpy(),
    }
    save_file(answers, FOLDER / "answers.safetensors")
    print(type(processor), {name: (answer.shape, float(answer.std())) for name, answer in answers.items()})
    print(answers["ids"])


if __name__ == "__main__":
    main()
