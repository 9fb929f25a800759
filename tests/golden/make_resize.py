"""Writes tests/golden/resize.safetensors: frames resized by PyTorch's `interpolate`.

pip install torch safetensors && python tests/golden/make_resize.py
"""

import pathlib

import torch
from safetensors.torch import save_file


def main() -> None:
    torch.manual_seed(0)
    frames = torch.rand(2, 7, 10, 3)
    answers = {"frames": frames}
    for height, width in ((13, 21), (4, 5), (7, 30)):
        for align in (False, True):
            resized = torch.nn.functional.interpolate(
                frames.permute(0, 3, 1, 2), (height, width), mode="bilinear", align_corners=align
            )
            name = "align_corners" if align else "half_pixel"
            answers[f"{name}_{height}_{width}"] = resized.permute(0, 2, 3, 1).contiguous()
    save_file(answers, pathlib.Path(__file__).with_name("resize.safetensors"))


if __name__ == "__main__":
    main()
