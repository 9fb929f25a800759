"""Opens a workdir, or an export of one, for `walt_jax.load`. Nothing is unpickled."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from walt_jax.api import TrainedModel
from walt_jax.config import build
from walt_jax.data.pipeline import Source
from walt_jax.errors import UserError
from walt_jax.export import orbax_files, safetensors_files
from walt_jax.export.contents import CAPTIONS, Manifest, read_json, shapes
from walt_jax.export.untrusted import inside
from walt_jax.generation import lora_files
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.generator import Generator
from walt_jax.parallel.mesh import make_mesh
from walt_jax.remote import is_remote
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig, make_model
from walt_jax.training.run_data import RunData
from walt_jax.training.run_text import RunText
from walt_jax.workdir import CONFIG, folder_of, read_config

READ = {"safetensors": safetensors_files.read, "stablehlo": safetensors_files.read, "orbax": orbax_files.read}


def load(path: str | pathlib.Path, lora: str | Sequence[str] = (), int8: bool = False) -> TrainedModel:
    """The trained model of a workdir, or of an export of the formats `READ`; arguments as those of `walt_jax.load`.

    Raises:
        UserError: if the folder holds neither, or what it holds is damaged or does not fit together.
    """
    loras = [lora] if isinstance(lora, str) else list(lora)
    folder = folder_of(str(path), "path")
    if not (folder / CONFIG).exists():
        raise UserError(
            f"{folder} is neither a run nor an export, for it has no {CONFIG}; name a --workdir of training, or a "
            "folder that --mode=export --format=safetensors or orbax has written."
        )
    knobs = read_config(folder) if is_remote(folder) else read_json(inside(folder, CONFIG))
    if "model_type" in knobs or "stages" not in knobs:
        if is_remote(folder):
            raise UserError(f"{folder} is an export, which is read from a local folder; copy it to this machine.")
        return _exported(folder, knobs, loras, int8)
    knobs.pop("mesh", None)  # the devices here may be others than those that trained the run
    run = Run(build(RunConfig, knobs, f"{folder / CONFIG}: config"), folder, loras)

    def generator() -> Generator:
        return run.generator().in_int8() if int8 else run.generator()

    return TrainedModel(run.config, run.codec, run.mesh, run.tokenizer, generator, run.data.unseen)


def _exported(folder: pathlib.Path, knobs: dict[str, Any], loras: Sequence[str], int8: bool) -> TrainedModel:
    if knobs.get("model_type") != "walt_jax":
        raise UserError(f"{folder / CONFIG} is of another program's model; name a folder that walt_jax has written.")
    try:
        manifest = build(Manifest, knobs, str(folder / CONFIG))
        config, codec = manifest.config, manifest.codec
        present = [
            inside(folder, name) for name in CAPTIONS if (folder / name).is_symlink() or (folder / name).exists()
        ]
        text = RunText(config, folder)
        if manifest.stage and not present:
            raise UserError(f"{folder} lacks {' and '.join(CAPTIONS)}; restore the one that it had from a copy.")
        vocab_size = text.vocab_size() if manifest.stage else 0
        wanted = shapes(manifest, vocab_size)
    except MemoryError as error:
        raise UserError(f"{folder / CONFIG} asks for more memory than there is; restore it from a copy.") from error
    params = unflatten_dict(READ[manifest.format](folder, wanted), sep="/")
    variables, latents = params.pop("tokenizer"), params.pop("latents")
    chosen = [lora_files.Chosen.parse(lora) for lora in loras]
    tokenizer = jax.device_put(TrainedTokenizer(variables, latents["mean"], latents["std"]))

    def generator() -> Generator:
        if not manifest.stage:
            raise UserError("This model is only a tokenizer, which can't sample; it can reconstruct.")
        model = make_model(config, vocab_size, manifest.stage, codec)
        captions = text.frozen() or text.captions()
        packed = config.stages[manifest.stage].pack is not None
        changed = lora_files.with_loras(jax.device_put(params), chosen)
        call = config.call_frames(manifest.stage)
        whole = Generator(model, changed, tokenizer, captions, config.sampling, packed=packed, call=call)
        return whole.in_int8() if int8 else whole

    def unseen() -> Source:
        return RunData(config, folder, codec, text, lambda: None, lambda: mesh).unseen()

    mesh = make_mesh(config.mesh, jax.devices())
    return TrainedModel(config, codec, mesh, lambda: tokenizer, generator, unseen)
