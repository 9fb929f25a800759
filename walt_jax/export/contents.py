"""What an export holds: parameters by name, the config that they belong to, and what reads captions."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError

import walt_jax
from walt_jax.errors import UserError
from walt_jax.generation.codec import Codec, PerFrame
from walt_jax.tokenizer.autoencoder import Tokenizer
from walt_jax.tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig, make_model
from walt_jax.workdir import CONFIG, write_atomically

CARD = "README.md"
CAPTIONS = ("vocabulary.model", "labels.json")
MOST_BYTES = 2**20  # of a config.json
# What a config of a real model stays below: beyond it, it was made to exhaust time or memory.
MOST_PIXELS, MOST_LAYERS = 2**28, 1000

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """An export's config.json.

    Attributes:
        model_type: says whose it is.
        format_version: of names and files.
        walt_jax: the version that wrote it.
        format: how the parameters are stored.
        config: of the run.
        stage: the denoiser's stage that the parameters are of; "" without a denoiser.
        autoencoder: of a run that uses a published autoencoder of images as its tokenizer.
    """

    model_type: Literal["walt_jax"]
    format_version: Literal[1]
    walt_jax: str
    format: Literal["safetensors", "orbax", "stablehlo"]
    config: RunConfig
    stage: str = ""
    autoencoder: AutoencoderKLConfig | None = None

    def __post_init__(self):
        config = self.config
        if config.low_res_from:
            raise ValueError("config.low_res_from needs a second run, which an export does not hold")
        if (self.stage == "") != (config.denoiser is None) or self.stage not in ("", *config.denoiser_stages):
            raise ValueError(f"stage {self.stage!r} is not one of the denoiser's stages")
        if (self.autoencoder is None) == config.takes_autoencoder:
            raise ValueError("autoencoder and config.tokenizer_from do not go together")
        if config.data.frames * config.data.height * config.data.width > MOST_PIXELS:
            raise ValueError(f"a clip of config.data has more than {MOST_PIXELS:,} pixels")
        depths = [config.tokenizer.residual_blocks * len(config.tokenizer.channel_multipliers)]
        depths += [part.layers for part in (config.denoiser, config.text and config.text.encoder) if part]
        if self.autoencoder is not None:
            depths.append(self.autoencoder.layers_per_block * len(self.autoencoder.block_channels))
        if max(depths) > MOST_LAYERS:
            raise ValueError(f"a model of config has more than {MOST_LAYERS:,} layers")

    @property
    def codec(self) -> Codec:
        """Pixels to latents and back."""
        if self.autoencoder is not None:
            return Codec(PerFrame(AutoencoderKL(self.autoencoder)))
        return Codec(Tokenizer(self.config.tokenizer))

    def dump(self) -> str:
        """As JSON; how the run was divided over devices is left out."""
        values = dataclasses.asdict(self)
        for knob in ("mesh", "rules"):
            del values["config"][knob]
        return json.dumps(values, indent=1) + "\n"


@dataclasses.dataclass(frozen=True)
class Contents:
    """A trained run as an export has it.

    Attributes:
        manifest: what config.json holds.
        tensors: parameters by their paths, joined by "/", see `shapes`.
        files: what reads captions, by its file's name.
    """

    manifest: Manifest
    tensors: Tensors
    files: dict[str, bytes]


def contents(run: Run, kind: str) -> Contents:
    """Collects what a format exports: of each model its average over training, where one is kept.

    Raises:
        UserError: if a model has not been trained, or the run needs a second one.
    """
    config = run.config
    if config.low_res_from:
        raise UserError(
            f"{run.workdir} upscales the clips of {config.low_res_from}, and an export holds one run; export that one."
        )
    stage, params = run.trained_denoiser() if config.denoiser else ("", {})
    tokenizer = run.tokenizer()
    tree = {**params, "tokenizer": tokenizer.variables, "latents": {"mean": tokenizer.mean, "std": tokenizer.std}}
    tensors = {name: np.asarray(leaf) for name, leaf in flatten_dict(jax.device_get(tree), sep="/").items()}
    autoencoder = run.codec.tokenizer.config if config.takes_autoencoder else None
    manifest = Manifest("walt_jax", 1, walt_jax.__version__, kind, config, stage, autoencoder)
    paths = [run.workdir / name for name in CAPTIONS]
    return Contents(manifest, tensors, {path.name: path.read_bytes() for path in paths if path.exists()})


def shapes(manifest: Manifest, vocab_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters that a config has, by name: denoiser/…, text/…, tokenizer/params/…, latents/mean and /std."""
    config, codec, key = manifest.config, manifest.codec, jax.random.key(0)
    _, height, width = codec.tokenizer.config.strides
    module = codec.tokenizer.model if isinstance(codec.tokenizer, PerFrame) else codec.tokenizer
    clip = jax.ShapeDtypeStruct((1, 1, height, width, 3), jnp.float32)
    tree = {"tokenizer": jax.eval_shape(module.init, key, clip)}
    if manifest.stage:
        tree |= jax.eval_shape(make_model(config, vocab_size, manifest.stage, codec).init, key)
    channel = jax.ShapeDtypeStruct((config.tokenizer.latent_channels,), jnp.float32)
    return flatten_dict(nn.meta.unbox(tree) | {"latents": {"mean": channel, "std": channel}}, sep="/")


@contextlib.contextmanager
def new_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write to, which gets the name `out` once all is written.

    Raises:
        UserError: if `out` exists and is not an empty folder, or it can't be written to.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out={out} exists; name a folder that does not.")
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out={out} can't be written ({error}); check path and free space.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_common(folder: pathlib.Path, found: Contents, card: str) -> None:
    """Writes config.json, the model card and what reads captions."""
    write_atomically(folder / CONFIG, found.manifest.dump())
    write_atomically(folder / CARD, card)
    for name, content in found.files.items():
        write_atomically(folder / name, content)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object, of at most `MOST_BYTES`, without NaN and infinity.

    Raises:
        UserError: if it is anything else.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}); restore it from a copy.") from error
