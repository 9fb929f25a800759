"""What a run is made of: a config file's knobs, and the modules that they describe."""

import collections
import dataclasses
import functools
import math
import pathlib
import statistics
from typing import Annotated, Any

from walt_jax.config import Positive, Range
from walt_jax.data.pipeline import DataConfig
from walt_jax.data.shapes import ClipShape, ShapeConfig
from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.layout import Grid
from walt_jax.denoiser.model import AnyDenoiserConfig, Denoiser
from walt_jax.denoiser.published_weights import Tubelets
from walt_jax.denoiser.windows import Window
from walt_jax.diffusion.motion_error import NO_MOTION
from walt_jax.diffusion.objective import DiffusionConfig
from walt_jax.errors import UserError
from walt_jax.evaluation.config import EvaluationConfig
from walt_jax.evaluation.distances import FEWEST_FRAMES, PROTOCOLS
from walt_jax.generation.codec import Codec, PerFrame
from walt_jax.generation.latent_diffusion import LatentDiffusion, SamplingConfig
from walt_jax.generation.schedules import AUTOREG, check_name
from walt_jax.parallel.mesh import MeshConfig
from walt_jax.parallel.rules import Rules
from walt_jax.text.t5 import T5Config, T5Encoder
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.autoencoder_kl import AutoencoderKL
from walt_jax.tokenizer.autoencoder_kl_weights import load_weights
from walt_jax.tokenizer.inflation import Placement
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.tokenizer.perceptual import load_features
from walt_jax.training.few_steps import DistillationTask, MeanVelocityTask
from walt_jax.training.loop import StageConfig
from walt_jax.training.lora_task import LoraTask
from walt_jax.training.pack_batches import most_kept
from walt_jax.training.tasks import ConditioningConfig, DenoiserTask, Task
from walt_jax.training.tokenizer_task import TokenizerTask
from walt_jax.workdir import CONFIG


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How captions are read.

    Attributes:
        vocab_size: at most this many sentencepiece pieces, trained on the captions; with `pretrained`, the rows of its
            table of embeddings, of which T5 has some that no piece of its vocabulary uses.
        length: tokens of a caption; what is longer is cut.
        encoder: of the token embeddings, trained with the denoiser.
        pretrained: the folder of a published T5, of `encoder`'s shape, which reads captions in its place and is not
            trained, see `text.t5_weights`.
    """

    vocab_size: Positive
    length: Positive
    encoder: T5Config
    pretrained: str = ""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of; a config file's knobs are these fields.

    Without `denoiser`, `diffusion` and `sampling` only a tokenizer is trained. `text` is set where the
    denoiser attends to text; a denoiser with `classes` takes each distinct caption as a class. `inflation` says which
    tap of a video kernel an image kernel becomes, where a stage on images only is followed by one on video.
    `tokenizer_from` is the workdir of a run whose trained tokenizer this one takes, or a `.safetensors` of Stable
    Diffusion's autoencoder of images, see `tokenizer.autoencoder_kl`; stages of the tokenizer are then left out.
    `init_from` is what the first stage of each task starts from: the workdir of another run, of whose trained
    parameters what fits by path and shape is taken, see `training.init_from`, and whose denoiser a stage with `lora`
    changes; or, of the denoiser, a `.safetensors` of
    a published DiT or Latte, see `denoiser.published_weights`, which also says what `tubelets` are. `normalise_latents`
    says whether the denoiser gets each channel of the latents with mean 0 and variance 1 over training clips, or as the
    tokenizer outputs them.
    `low_res_from` is for super-resolution, where `denoiser.upscale` is above 1: the workdir of the base run, whose
    tokenizer makes the low-resolution latents that the denoiser is conditioned on. `mesh` and `rules` say how all of it
    is divided over the devices, see `parallel`: (logical axis, mesh axis or axes or None) rows that precede the default
    table. Neither changes what is computed, but for rounding. `peak_flops_per_second` is that of a device, of which the
    log's MFU is a fraction; 0 takes it from `parallel.hardware`, and logs no MFU for devices that are not there.
    """

    seed: Annotated[int, Range(0, 2**31 - 1)]
    data: DataConfig
    tokenizer: TokenizerConfig
    stages: dict[str, StageConfig]
    evaluation: EvaluationConfig
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    inflation: Placement = "last"
    tokenizer_from: str = ""
    init_from: str = ""
    tubelets: Tubelets = "central"
    low_res_from: str = ""
    normalise_latents: bool = True
    text: TextConfig | None = None
    denoiser: AnyDenoiserConfig | None = None
    diffusion: DiffusionConfig | None = None
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    sampling: SamplingConfig | None = None
    peak_flops_per_second: float = 0.0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rules: Rules = ()

    def __post_init__(self):
        tasks = [stage.task for stage in self.stages.values()]
        if self.tokenizer_from:
            if self.denoiser is None or "denoiser" not in tasks:
                raise ValueError("tokenizer_from is for runs that train a denoiser, and no stage of this one does")
            tasks = ["tokenizer", *(task for task in tasks if task == "denoiser")]
        wanted = {"tokenizer"} if self.denoiser is None else {"tokenizer", "denoiser"}
        if sorted(tasks, reverse=True) != tasks or set(tasks) != wanted:
            also = "" if self.denoiser is None else " and then at least one for the denoiser"
            raise ValueError(f"stages are at least one for the tokenizer{also}")
        groups = {name: getattr(self, name) is not None for name in ("denoiser", "diffusion", "sampling")}
        if len(set(groups.values())) > 1:
            missing = next(name for name, there in groups.items() if not there)
            raise ValueError(f"{missing} is missing; denoiser, diffusion and sampling go together")
        self._check_text()
        if self.starts_from_file and self.denoiser is None:
            raise ValueError("init_from names a denoiser, and no stage of this run trains one")
        shape = self.tokenizer.latent_shape(self.data.frames, self.data.height, self.data.width)
        for name, stage in self.stages.items():
            for size in self.batch_sizes(name):
                if size % stage.accumulate:
                    raise ValueError(
                        f"stages.{name}.accumulate={stage.accumulate} does not divide batches of {size} clips"
                    )
            for kind, changed in stage.shapes.items():
                try:
                    self.latent_shapes(self.clip_shape(changed))
                except ValueError as error:
                    raise ValueError(f"stages.{name}.shapes.{kind}: {error}") from error
        tokenizers = [name for name in self.trained_stages if self.stages[name].task == "tokenizer"]
        if tokenizers and self.makes_images(tokenizers[-1]):
            raise ValueError(
                f"stages.{tokenizers[-1]} is the tokenizer's last stage and has only images; add a stage on video, "
                "or make a tokenizer of images: tokenizer.taps=1, no stride in time, data.frames=1"
            )
        if self.tokenizer.block_transform and any(map(self.makes_images, tokenizers)):
            raise ValueError("tokenizer.block_transform can't be inflated from images; leave their stage out, or it")
        if self.denoiser is not None:
            self._check_denoiser(shape)
        self._check_distances()

    def _check_distances(self) -> None:
        frames, names = self.data.frames, self.evaluation.distances
        for name in names:
            fewest = FEWEST_FRAMES.get(PROTOCOLS[name].network, 1)
            if frames < fewest:
                raise ValueError(
                    f"evaluation.distances names {name}, whose network needs {fewest} frames, and clips have "
                    f"{frames}: leave it out, or set data.frames to {fewest} or more"
                )

    @property
    def pretrained_text(self) -> TextConfig | None:
        """How captions are read, where what reads them is published and not trained."""
        return self.text if self.text is not None and self.text.pretrained else None

    @property
    def takes_autoencoder(self) -> bool:
        """Whether the tokenizer is a published autoencoder of images."""
        return self.tokenizer_from.endswith(".safetensors")

    @property
    def starts_from_file(self) -> bool:
        """Whether the denoiser starts from a published one."""
        return self.init_from.endswith(".safetensors")

    @property
    def trained_stages(self) -> list[str]:
        """The names of the stages that are run: not the tokenizer's, where another run has trained it."""
        return [name for name, stage in self.stages.items() if not (self.tokenizer_from and stage.task == "tokenizer")]

    def makes_images(self, stage: str) -> bool:
        """Whether a stage trains the tokenizer of images that the next one inflates."""
        config = self.stages[stage]
        return config.task == "tokenizer" and config.of_images and self.tokenizer.taps > 1

    def _check_text(self) -> None:
        denoiser = self.denoiser
        reads_text = denoiser is not None and denoiser.reads_text
        if self.text is not None and not reads_text:
            raise ValueError("there is text, and no denoiser.cross_attention to read it: give both or neither")
        if self.text is None and denoiser is not None and denoiser.cross_attention:
            raise ValueError("denoiser.cross_attention reads text, and there is none: give both or neither")

    def _check_denoiser(self, shape: tuple[int, ...]) -> None:
        denoiser, conditioning = self.denoiser, self.conditioning
        if denoiser.classes and self.text is not None:
            raise ValueError("denoiser.classes and text exclude each other: a caption is a class, or a text")
        if (self.diffusion.self_conditioning > 0) != denoiser.self_conditioning:
            raise ValueError(
                f"denoiser.self_conditioning is {denoiser.self_conditioning} and its probability, "
                f"diffusion.self_conditioning, {self.diffusion.self_conditioning:g}; one asks for the other"
            )
        if bool(conditioning.frames) != denoiser.frame_prediction or bool(conditioning.frames) != (
            conditioning.probability > 0
        ):
            raise ValueError("denoiser.frame_prediction, conditioning.frames and its probability go together")
        if conditioning.frames and (denoiser.patch_size[0] > 1 or min(conditioning.frames) >= shape[0]):
            raise ValueError(
                f"conditioning.frames {conditioning.frames} should have fewer than the {shape[0]} latent frames, and "
                "denoiser.patch_size should be 1 in time"
            )
        self._check_groups()
        if self.sampling.low_res_noise > conditioning.low_res_noise:
            raise ValueError(
                f"sampling.low_res_noise is {self.sampling.low_res_noise:g}, more than conditioning.low_res_noise, "
                f"{conditioning.low_res_noise:g}, with which the model was trained"
            )
        if self.sampling.guidance.channels > shape[3]:
            raise ValueError(f"sampling.guidance.channels is more than the latents' {shape[3]}")
        if self.sampling.first_block_cache and (denoiser.skips or denoiser.condition_by == "tokens"):
            raise ValueError("sampling.first_block_cache is for blocks one after the other; U-ViT's have long skips")
        scale = denoiser.upscale
        if conditioning.low_res_noise and scale == 1:
            raise ValueError("conditioning.low_res_noise is for what upscales: set denoiser.upscale, or leave it out")
        if (scale > 1) != bool(self.low_res_from):
            raise ValueError(
                f"denoiser.upscale is {scale} and low_res_from {self.low_res_from!r}; super-resolution needs both, and "
                "other runs neither: set low_res_from to the workdir of the base run, or upscale to 1"
            )
        self._check_distillation()
        self._check_mean_velocity()
        for name, stage in self.stages.items():
            if stage.task == "denoiser":
                self._check_denoiser_stage(name, stage)
                if stage.lora is not None and (self.starts_from_file or not self.init_from or not self.tokenizer_from):
                    raise ValueError(
                        f"stages.{name}.lora changes the model of another run: set init_from and tokenizer_from to its "
                        "workdir"
                    )
                if stage.lora is not None and len(self.denoiser_stages) > 1:
                    raise ValueError(f"stages.{name}.lora is for a run with no other stage of the denoiser")

    def _check_groups(self) -> None:
        """Checks that groups of frames are drawn, observed and followed by a schedule, or none of it."""
        kept = [name for name in self.denoiser_stages if self.call_frames(name)]
        if ("groups" in self.conditioning.kinds) != bool(kept):
            raise ValueError(
                "conditioning.kinds has 'groups' where, and only where, a stage trains on them: set the stage's "
                "pack.frames and conditioning.frames, or neither"
            )
        if self.sampling.schedule and not kept:
            raise ValueError(
                "sampling.schedule is for models that are trained on frames with gaps: set a stage's pack.frames, or "
                "leave it out"
            )
        check_name(self.sampling.schedule or AUTOREG)
        if kept and self.denoiser.patch_size[0] > 1:
            raise ValueError("pack.frames keeps latent frames, of which denoiser.patch_size should have 1")

    def call_frames(self, stage: str) -> int:
        """Latent frames that a stage trains on at once, in groups with gaps between them; 0 for whole clips."""
        pack = self.stages[stage].pack
        return 0 if pack is None else pack.frames

    def _check_distillation(self) -> None:
        """Checks that what is distilled has a teacher, whose steps it halves, and is sampled as it is trained."""
        teacher = None
        for name in self.denoiser_stages:
            stage = self.stages[name].distillation
            where = f"stages.{name}.distillation"
            before, teacher = teacher, stage
            if stage is None and before is not None:
                raise ValueError(f"stages.{name} comes after a distillation; only another distillation may")
            if stage is None:
                continue
            if name == self.denoiser_stages[0] and not self.init_from:
                raise ValueError(f"{where} needs a teacher: let another denoiser stage precede it, or set init_from")
            if before is not None and before.steps != 2 * stage.steps:
                raise ValueError(
                    f"{where}.steps is {stage.steps}; of a teacher of {before.steps} it should be the half"
                )
            if before is not None and stage.guidance.needs_unconditional:
                raise ValueError(
                    f"{where}.guidance is the first teacher's, which its students have learned; leave it out"
                )
            if stage.guidance.apg is not None and stage.guidance.apg.momentum:
                raise ValueError(f"{where}.guidance.apg.momentum is for sampling; two steps of a teacher have none")
            not_read = {
                "diffusion.multiscale": self.diffusion.multiscale,
                "diffusion.adaptive": self.diffusion.adaptive,
                "packs where guidance measures clips": self.stages[name].pack and stage.guidance.measures_clips,
                "guidance where text is pretrained": self.pretrained_text and stage.guidance.needs_unconditional,
            }
            for what, there in not_read.items():
                if there:
                    raise ValueError(f"{where} does not go with {what}")
        if teacher is not None and (self.sampling.sampler, self.sampling.guidance.scale) != ("ddim", 1.0):
            raise ValueError(
                "what is distilled has learned its guidance: set sampling.guidance.scale=1, sampler='ddim'"
            )

    def _check_mean_velocity(self) -> None:
        """Checks that mean velocities are learned where the denoiser predicts them, and sampled as they are meant."""
        learned = [name for name in self.denoiser_stages if self.stages[name].alpha_flow is not None]
        if not self.denoiser.mean_velocity:
            if learned:
                raise ValueError(f"stages.{learned[0]}.alpha_flow needs denoiser.mean_velocity=True")
            return
        if learned != self.denoiser_stages:
            raise ValueError(
                "denoiser.mean_velocity is for runs whose denoiser stages all have alpha_flow; set init_from"
            )
        if not self.init_from and self.stages[learned[0]].alpha_flow.anneal == 0:
            raise ValueError("alpha_flow starts from a flow model: set init_from, or let α fall from 1 with anneal")
        guidance = self.sampling.guidance
        wrong = {
            "diffusion.parameterization other than 'flow'": self.diffusion.parameterization != "flow",
            "diffusion.schedule.name other than 'flow'": self.diffusion.schedule.name != "flow",
            "diffusion.self_conditioning": self.diffusion.self_conditioning,
            "diffusion.multiscale": self.diffusion.multiscale,
            "diffusion.min_snr": self.diffusion.min_snr,
            "diffusion.adaptive": self.diffusion.adaptive,
            "denoiser.learned_sigma": self.denoiser.learned_sigma,
            "denoiser.embedders_per_block": getattr(self.denoiser, "embedders_per_block", False),
            "pretrained text": self.pretrained_text,
            "samplers other than 'ddim' and 'euler'": self.sampling.sampler not in ("ddim", "euler"),
            "sampling.guidance.scale below 1": guidance.scale < 1,
            "sampling.guidance.kind 'power_cosine'": guidance.kind == "power_cosine",
            "sampling.guidance.rescale, channels or apg": guidance.rescale or guidance.channels or guidance.apg,
        }
        for what, there in wrong.items():
            if there:
                raise ValueError(f"denoiser.mean_velocity does not go with {what}")

    def _check_denoiser_stage(self, name: str, stage: StageConfig) -> None:
        windows = self.denoiser.windows
        moves = stage.motion != NO_MOTION
        if moves and (stage.distillation is not None or stage.alpha_flow is not None):
            raise ValueError(f"stages.{name}.motion is of the diffusion loss; a stage for few steps has another one")
        if stage.windows and [w[0] == 1 for w in stage.windows] != [w[0] == 1 for w in windows]:
            raise ValueError(
                f"stages.{name}.windows should be as many as denoiser.windows, and of one frame where those are"
            )
        self._check_equal_clips(name, "", self.nominal(name))
        if stage.pack is None:
            if name == self.denoiser_stages[-1] and self.clip_shape().nominal not in [
                shape.nominal for shape in self.clip_shapes(name)
            ]:
                raise ValueError(
                    f"stages.{name}.shapes lacks the data's shape, {self.data.frames} × {self.data.height} × "
                    f"{self.data.width}, which is sampled and evaluated: set data.frames, height and width to one of "
                    "the last stage's shapes"
                )
            for kind, changed in stage.shapes.items():
                self._check_equal_clips(name, f".shapes.{kind}", self.clip_shape(changed))
            return
        equal_clips_only = {
            "diffusion.adaptive": self.diffusion.adaptive,
            "diffusion.multiscale": self.diffusion.multiscale,
            f"stages.{name}.motion": moves,
            "denoiser.upscale": self.denoiser.upscale > 1,
            "denoiser.output_conv": self.denoiser.output_conv,
        }
        for knob, value in equal_clips_only.items():
            if value:
                raise ValueError(f"{knob} is for clips of one size; stages.{name} has packs")
        for kind, changed in stage.shapes.items():
            clip = max(most_kept(grid, stage.pack.frames) for grid in self._grids(self.clip_shape(changed)))
            if clip > stage.pack.tokens:
                raise ValueError(
                    f"stages.{name}.shapes.{kind} has {clip} tokens a clip, which overflow packs of "
                    f"{stage.pack.tokens}; raise stages.{name}.pack.tokens"
                )

    def _check_equal_clips(self, name: str, kind: str, shape: ClipShape) -> None:
        """Checks that batches of equal clips of a shape suit the windows of a stage, and the loss."""
        denoiser, halvings = self.denoiser_of(name), self.diffusion.multiscale
        for latents in self.latent_shapes(shape):
            if any(axis % denoiser.upscale for axis in latents[1:3]):
                raise ValueError(
                    f"denoiser.upscale={denoiser.upscale} does not divide {latents[1]} × {latents[2]} latents, in "
                    f"stages.{name}{kind}"
                )
            if any(axis % 2**halvings for axis in latents[1:3]):
                raise ValueError(
                    f"diffusion.multiscale={halvings} halves {latents[1]} × {latents[2]} latents more often than they "
                    f"can be, in stages.{name}{kind}"
                )
            grid = denoiser.grid(latents[:3])
            for window in denoiser.windows:
                # Tokens of images see only themselves in windows that span time.
                if not (denoiser.isolate_images and grid[0] == 1 and window[0] != 1):
                    try:
                        Window(*window).sizes(grid)
                    except ValueError as error:
                        raise ValueError(f"stages.{name}{kind}: {error}") from error

    @property
    def most_pieces(self) -> int:
        """The vocabulary has at most so many pieces; how many there are shows when the captions are read."""
        return 0 if self.text is None else self.text.vocab_size

    @property
    def text_length(self) -> int:
        """Ids of a caption, or of a label."""
        return 1 if self.text is None else self.text.length

    @property
    def denoiser_stages(self) -> list[str]:
        """The names of the denoiser's stages."""
        return [name for name, stage in self.stages.items() if stage.task == "denoiser"]

    def denoiser_of(self, stage: str) -> DenoiserConfig:
        """The denoiser with the windows of one of its stages."""
        windows = self.stages[stage].windows
        return dataclasses.replace(self.denoiser, windows=windows) if windows else self.denoiser

    def bounds(self, stage: str) -> Grid:
        """Tokens along (t, h, w) of the largest clip of a denoiser stage."""
        grids = [grid for shape in (*self.clip_shapes(stage), self.nominal(stage)) for grid in self._grids(shape)]
        t, h, w = (max(axis) for axis in zip(*grids, strict=True))
        return t, h, w

    def nominal(self, stage: str) -> ClipShape:
        """The shape that is sampled after a stage: the data's after the last one, of others their first."""
        return self.clip_shape() if stage == list(self.stages)[-1] else self.clip_shapes(stage)[0]

    def _grids(self, shape: ClipShape) -> list[Grid]:
        """Tokens along (t, h, w) of clips of a shape, for each size that they may have."""
        return [self.denoiser.grid(latents[:3]) for latents in self.latent_shapes(shape)]

    def clip_shape(self, changed: ShapeConfig | None = None) -> ClipShape:
        """A shape that clips are made into; the data's where nothing is changed."""
        patch = (1, 1) if self.denoiser is None else self.denoiser.patch_size[1:]
        _, height, width = self.tokenizer.strides
        unit = (height * patch[0], width * patch[1])
        return (changed or ShapeConfig()).resolve(self.data.frames, self.data.height, self.data.width, unit)

    def clip_shapes(self, stage: str) -> tuple[ClipShape, ...]:
        """The shapes of a stage's clips."""
        return tuple(map(self.clip_shape, self.stages[stage].shapes.values())) or (self.clip_shape(),)

    def batch_sizes(self, stage: str) -> tuple[int, ...]:
        """Clips a batch, for each of a stage's shapes."""
        config = self.stages[stage]
        return tuple(shape.batch_size or config.batch_size for shape in config.shapes.values()) or (config.batch_size,)

    def tokens(self, size: tuple[int, int, int]) -> int:
        """Of a clip of (frames, height, width); latent positions where there is no denoiser."""
        latents = self.tokenizer.latent_shape(*size)[:3]
        return math.prod(latents if self.denoiser is None else self.denoiser.grid(latents))

    def latents_bytes(self, stage: str) -> float:
        """Of a clip's latents on disk, in float32, those at low resolution included: the mean over a stage's shapes."""
        shapes = self.clip_shapes(stage)
        both = 4 + (4 / self.denoiser.upscale**2 if self.low_res_from else 0)
        sizes = [both * statistics.mean(map(math.prod, self.latent_shapes(shape))) for shape in shapes]
        weights = [shape.weight for shape in shapes]
        return sum(size * weight for size, weight in zip(sizes, weights, strict=True)) / sum(weights)

    def latent_sizes(self, stage: str) -> dict[tuple[int, int, int], float]:
        """(t, h, w) that the latents of a stage's clips may have, and how often, by the weights of its shapes."""
        sizes: dict[tuple[int, int, int], float] = collections.Counter()
        for shape in self.clip_shapes(stage):
            each = self.latent_shapes(shape)
            for latents in each:
                sizes[latents[:3]] += shape.weight / len(each)
        return sizes

    def latent_shapes(self, shape: ClipShape) -> list[tuple[int, int, int, int]]:
        """(t, h, w, c) of the latents of clips of a shape, for each size that they may have.

        Raises:
            ValueError: if the tokenizer's strides don't divide a size.
        """
        return [self.tokenizer.latent_shape(shape.frames, *size) for size in sorted(shape.sizes())]


def only_published(config: RunConfig, workdir: pathlib.Path) -> bool:
    """Whether there is nothing here but what others have published, a denoiser and an autoencoder."""
    published = config.starts_from_file and config.takes_autoencoder and config.text == config.pretrained_text
    return published and not (workdir / CONFIG).exists()


def make_codec(config: RunConfig) -> Codec:
    """Pixels to latents and back: the config's tokenizer, or the autoencoder of images that `tokenizer_from` names.

    Raises:
        UserError: if that can't be read, or its latents have another shape than the config's.
    """
    if not config.takes_autoencoder:
        return Codec(Tokenizer(config.tokenizer))
    model, _ = read_autoencoder(config.tokenizer_from)
    ours, theirs = ((c.strides, c.latent_channels) for c in (config.tokenizer, model.config))
    if ours != theirs:
        raise UserError(
            f"{config.tokenizer_from} has strides {theirs[0]} and {theirs[1]} channels, config.tokenizer {ours[0]} and "
            f"{ours[1]}; use a config whose latents are of that shape, such as configs/dit_xl_2.py."
        )
    return Codec(PerFrame(model))


@functools.cache
def read_autoencoder(path: str) -> tuple[AutoencoderKL, Any]:
    """The autoencoder of images in a file, and its parameters.

    Raises:
        UserError: if it can't be read.
    """
    config, params = load_weights(path)
    return AutoencoderKL(config), params


def make_model(
    config: RunConfig, vocab_size: int, stage: str | None = None, codec: Codec | None = None
) -> LatentDiffusion:
    """The models as a denoiser stage has them, the last one unless it is named.

    Args:
        config: see `RunConfig`.
        vocab_size: of the text encoder; read where the config has text.
        stage: sets windows, bounds, and the shape that is sampled.
        codec: of the config, where it is made already.
    """
    stage = stage or config.denoiser_stages[-1]
    text = None if config.text is None else T5Encoder(config.text.encoder, vocab_size)
    shape = config.tokenizer.latent_shape(*config.nominal(stage).nominal)
    denoiser = Denoiser(config.denoiser_of(stage), config.bounds(stage))
    codec = codec or make_codec(config)
    return LatentDiffusion(codec, text, denoiser, config.diffusion, shape, trains_text=config.pretrained_text is None)


def make_task(config: RunConfig, stage: str, vocab_size: int) -> Task:
    """What a stage trains.

    Raises:
        UserError: if the perceptual loss's weights can't be read.
    """
    if config.stages[stage].task == "denoiser":
        model, own = make_model(config, vocab_size, stage), config.stages[stage]
        if own.distillation is not None:
            return DistillationTask(model, config.conditioning, own.distillation)
        if own.alpha_flow is not None:
            return MeanVelocityTask(model, config.conditioning, own.alpha_flow, own.steps)
        whole = DenoiserTask(model, config.conditioning, motion=own.motion)
        return whole if own.lora is None else LoraTask(whole, own.lora)
    shape = config.tokenizer.of_images() if config.makes_images(stage) else config.tokenizer
    path = config.losses.perceptual_weights
    return TokenizerTask(Tokenizer(shape), config.losses, load_features(path) if path else None)
