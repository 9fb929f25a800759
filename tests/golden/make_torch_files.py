"""Writes small state dicts as PyTorch saves them, and what they hold: tests/golden/torch_*.pt, torch_files.safetensors.

pip install torch safetensors && python tests/golden/make_torch_files.py
"""

import collections
import pathlib

import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent


def main() -> None:
    torch.manual_seed(0)
    table = torch.randn(4, 6)
    state = collections.OrderedDict(
        whole=table,
        view=table[1:3, ::2],
        transposed=table.t(),
        scalar=torch.tensor(3.5),
        parameter=torch.nn.Parameter(torch.randn(2, 3)),
        count=torch.tensor([7, -8]),
        half=torch.randn(5).half(),
        brain=torch.randn(5).bfloat16(),
        empty=torch.zeros(0, 3),
    )
    torch.save(state, HERE / "torch_zip.pt")
    torch.save(state, HERE / "torch_legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "epoch": 3, "note": "x"}, HERE / "torch_checkpoint.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(HERE / "torch_script.pt"))
    save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, HERE / "torch_files.safetensors")


if __name__ == "__main__":
    main()
