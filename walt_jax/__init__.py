"""walt_jax: MAGVIT-v2's causal video tokenizer and W.A.L.T's windowed latent video diffusion in JAX/Flax.

run = walt_jax.load("runs/demo")
run.sample("a blue square moving up", seed=1)
"""

import typing

if typing.TYPE_CHECKING:
    import pathlib
    from collections.abc import Sequence

    from walt_jax.api import TrainedModel
    from walt_jax.generation.asking import Condition as Condition

__version__ = "0.1.0"


def load(path: "str | pathlib.Path", lora: "str | Sequence[str]" = (), int8: bool = False) -> "TrainedModel":
    """Opens a trained model: a workdir, or a folder that `--mode=export` has written as safetensors or Orbax.

    Args:
        path: the folder.
        lora: "PATH[:WEIGHT]" of a LoRA that changes the model, or of several, as --lora takes them.
        int8: whether it samples with weights of 8 bits.

    Raises:
        UserError: if the folder holds neither, or what it holds is damaged; if a LoRA does not fit.
    """
    from walt_jax.export.load import load  # imported here: walt_jax without it takes no time to import

    return load(path, lora, int8)


def __getattr__(name: str) -> typing.Any:
    if name == "Condition":
        from walt_jax.generation.asking import Condition

        return Condition
    raise AttributeError(f"module 'walt_jax' has no attribute {name!r}")
