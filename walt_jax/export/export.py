"""Writes a trained run in one of the formats."""

import pathlib

import safetensors.numpy

from walt_jax.export import diffusers_files, orbax_files, safetensors_files, stablehlo
from walt_jax.export.card import card
from walt_jax.export.contents import CARD, contents, new_folder, write_common
from walt_jax.training.run import Run
from walt_jax.workdir import write_atomically


def export(run: Run, kind: str, out: pathlib.Path) -> str:
    """Writes a run.

    Args:
        run: trained.
        kind: "safetensors", "orbax", "stablehlo" or "diffusers".
        out: a folder that does not exist yet. A name that ends in .safetensors is a file with the published layout of
            DiT or Latte, whatever the kind.

    Returns:
        What was written, in words.

    Raises:
        UserError: if nothing has been trained, the format has no place for the model, or `out` can't be written.
    """
    if out.suffix == ".safetensors":
        tensors = diffusers_files.tensors(run)
        write_atomically(out, safetensors.numpy.save(tensors))
        return f"wrote {sum(tensor.size for tensor in tensors.values()):,} parameters to {out}"
    with new_folder(out) as folder:
        if kind == "diffusers":
            count = diffusers_files.write(folder, run)
            write_atomically(folder / CARD, card(run, kind, count))
        else:
            found = contents(run, kind)
            count = sum(tensor.size for tensor in found.tensors.values())
            write = orbax_files.write if kind == "orbax" else safetensors_files.write
            write(folder, found.tensors)
            if kind == "stablehlo":
                stablehlo.write(folder, found, run.text.vocab_size() if run.config.denoiser else 0)
            write_common(folder, found, card(run, kind, count))
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
    return f"wrote {count:,} parameters to {out}: {names}"
