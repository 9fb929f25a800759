"""What a stage trains: a task has parameters and their gradients; the loop does the rest."""

import dataclasses
import math
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from walt_jax.config import Fraction, Positive, Range
from walt_jax.denoiser.layout import Layout
from walt_jax.denoiser.resize import resize
from walt_jax.diffusion.adaptive import complexity
from walt_jax.diffusion.motion_error import NO_MOTION, MotionConfig
from walt_jax.diffusion.objective import Binned, Draws, diffusion_loss, draw
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.latent_diffusion import LatentDiffusion, TextTokens, single_clips

Metrics = dict[str, Float[Array, ""] | Binned]

# VDT's: every fourth frame; each frame generated with 0.8 (so observed with 0.2); at most half of the area generated,
# in rectangles of aspect ratios from 0.3 to 1/0.3, with at most 3 frames observed whole at either end
EVERY, RANDOM_FRAMES, RECTANGLES, AREA, ASPECT, MARGIN = 4, 0.2, 4, 0.5, 0.3, 3


class Task(Protocol):
    """The loop's interface to what it trains.

    Attributes:
        moves: whether steps change `moving`; where they don't, it is never averaged over micro-batches.
    """

    moves: bool

    def init(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        """Fresh parameters with their logical axis names, `nn.Partitioned`, and `moving`: what has no gradient."""

    def draw(self, batch: Any, key: PRNGKeyArray) -> Any:
        """What is random about each of the batch's rows: leaves have the rows as their leading axis."""

    def weight(self, batch: Any, draws: Any) -> Float[Array, ""]:
        """How many values the loss is a mean over."""

    def tokens(self, batch: Any) -> int:
        """How many tokens a batch of equal clips has, or latent positions."""

    def gradients(
        self,
        params: Any,
        moving: Any,
        frozen: Any,
        batch: Any,
        key: PRNGKeyArray,
        step: Int[Array, ""],
        draws: Any = None,
    ) -> tuple[Any, Any, Metrics]:
        """Gradients structured as `params`, `moving` after the step, and scalars to log, "loss" among them.

        `frozen` holds what earlier stages have trained. `draws` is part of a larger batch's, see `accumulation`;
        without it, `draw` makes them of `key`.
        """

    def served(self, params: Any, moving: Any) -> Any:
        """What the trained model needs of both."""

    def start(self, params: Any, moving: Any, served: Any) -> tuple[Any, Any]:
        """Fresh parameters, replaced by an earlier stage's `served` where it has them."""


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """What a denoiser that predicts frames or upscales is conditioned on in training.

    Attributes:
        frames: numbers of observed latent frames; one of them is drawn for each clip, all equally likely. 1 is image to
            video, 2 is W.A.L.T's video prediction. At least one frame of each clip is generated, so that of short clips
            fewer are observed.
        probability: that a clip has observed frames, W.A.L.T's p_fp.
        kinds: which tokens of a clip are observed; one kind is drawn for each clip, all equally likely; a kind listed
            twice is twice as frequent. "start" and "end": the first or last `frames`; "ends": the first `frames` and
            the last one; "every": every fourth frame; "one": one random frame; "random": each frame independently;
            "rectangles": all outside of some rectangles in a range of frames (VDT's unified masks, Lu et al. 2023);
            "inside": one rectangle in all frames, for outpainting; "groups": of a stage with `pack.frames`, the frames
            that its groups were drawn to observe, whatever `frames` says.
        low_res_noise: the low-resolution latents get noise of a random time in 0..low_res_noise, W.A.L.T's t_max.
    """

    frames: tuple[Positive, ...] = ()
    probability: Fraction = 0.0
    kinds: tuple[Literal["start", "end", "ends", "every", "one", "random", "rectangles", "inside", "groups"], ...] = (
        "start",
    )
    low_res_noise: Annotated[float, Range(0, 1)] = 0.0


def rectangles(sizes: Float[Array, "*n 2"], key: PRNGKeyArray) -> tuple[Float[Array, "r *n 2"], Float[Array, "r *n 2"]]:
    """Corners (y, x) of random rectangles in frames of these sizes, and the opposite ones, which are outside.

    Each has a random part of the area that the ones before leave of `AREA` of the frame, as in VDT, where they do not
    overlap; here they may.
    """
    key_area, key_aspect, key_corner = jax.random.split(key, 3)
    share = jax.random.uniform(key_area, (RECTANGLES, *sizes.shape[:-1]))
    area = AREA * share * jnp.cumprod(1 - share, axis=0) / (1 - share) * sizes.prod(-1)[None]
    aspect = jnp.exp(jax.random.uniform(key_aspect, share.shape, minval=math.log(ASPECT), maxval=-math.log(ASPECT)))
    extent = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect], axis=-1)))
    extent = jnp.clip(extent, 1, jnp.maximum(sizes, 1)[None])
    corner = jnp.floor(jax.random.uniform(key_corner, extent.shape) * (sizes[None] - extent + 1))
    return corner, corner + extent


@flax.struct.dataclass
class Drawn:
    """What is random about a denoiser's batch.

    Attributes:
        loss: see `objective.Draws`.
        observed: 1 at observed latent positions, 0 elsewhere; None where the denoiser predicts no frames.
        low_res: times and noise of the low-resolution latents; None where the denoiser does not upscale.
    """

    loss: Draws
    observed: Float[Array, "b n q"] | None = None
    low_res: tuple[Float[Array, "b 1"], Float[Array, "b t2 h2 w2 c"]] | None = None


class Inputs(NamedTuple):
    """What a batch's loss is computed from.

    Attributes:
        layout: where the clips are.
        tokens: clean latents.
        text: captions or labels.
        counted: 1 for each value with a loss, 0 for padding and observed values.
        sizes: tokens of each clip along (t, h, w).
        complexity: see `diffusion.adaptive`; None where it is not read.
        conditions: other arguments of `LatentDiffusion.condition`.
    """

    layout: Layout
    tokens: Float[Array, "b n p"]
    text: TextTokens
    counted: Float[Array, "b n p"]
    sizes: Int[Array, "b s 3"]
    complexity: Float[Array, "b 1"] | None
    conditions: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class DenoiserTask:
    """W.A.L.T on the frozen tokenizer's latents.

    A batch has one of: clips to encode, `video`; latents, `latents`; packs, `tokens` and `pack`, those of groups of
    frames also `observed`, see `pack_batches`. It also has the clips'
    captions or labels, `text`, one row each, as ids or `text.frozen.Embedded`: `[b, m]`, of packs `[b, s, m]`. For
    super-resolution it has `low_res`, the low-resolution latents of each clip, normalised.

    Attributes:
        model: see `LatentDiffusion`.
        conditioning: see `ConditioningConfig`.
        motion: see `motion_error.MotionConfig`.
    """

    model: LatentDiffusion
    conditioning: ConditioningConfig
    motion: MotionConfig = dataclasses.field(default=NO_MOTION, kw_only=True)

    moves = False

    def init(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        return self.model.init(key), {}

    def draw(self, batch: Any, key: PRNGKeyArray) -> Drawn:
        """Observed positions, noise and times of all clips of a batch."""
        key_observed, key_low_res, key_loss = jax.random.split(key, 3)
        layout, shape, clips = self._shapes(batch)
        observed = low_res = None
        if self.model.denoiser.config.frame_prediction:
            observed = self._observed_mask(layout, shape, clips, key_observed, batch.get("observed"))
        if self.model.denoiser.config.upscale > 1:
            key_time, key_noise = jax.random.split(key_low_res)
            time = jax.random.uniform(key_time, (shape[0], 1), maxval=self.conditioning.low_res_noise)
            low_res = time, jax.random.normal(key_noise, batch["low_res"].shape)
        return Drawn(draw(key_loss, shape, clips, self.model.diffusion), observed, low_res)

    def tokens(self, batch: Any) -> int:
        """Tokens of the denoiser."""
        _, (count, length, _), _ = self._shapes(batch)
        return count * length

    def weight(self, batch: Any, draws: Drawn) -> Float[Array, ""]:
        """How many values of the latents are counted in the loss."""
        layout, shape, _ = self._shapes(batch)
        return self._counted(layout, shape, draws).sum()

    def gradients(
        self,
        params: Any,
        moving: Any,
        frozen: TrainedTokenizer,
        batch: Any,
        key: PRNGKeyArray,
        step: Int[Array, ""],
        draws: Drawn | None = None,
    ) -> tuple[Any, Any, Metrics]:
        """Gradients of the loss over the values that are not observed."""
        draws = self.draw(batch, key) if draws is None else draws
        inputs = self._inputs(frozen, batch, draws)
        (value, by_level), gradients = jax.value_and_grad(self.loss, has_aux=True)(params, moving, inputs, draws, step)
        metrics = {"loss": value, "loss_by_noise": by_level}
        if inputs.layout.pack is not None:
            metrics["tokens_valid_fraction"] = inputs.layout.valid().mean()
            metrics["clips_deferred"] = inputs.layout.pack.deferred.sum()
        return gradients, moving, metrics

    def loss(
        self, params: Any, moving: Any, inputs: Inputs, draws: Drawn, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Binned]:
        """The diffusion loss; and errors by noise level."""
        model, layout = self.model, inputs.layout

        return diffusion_loss(
            model.denoise(params, model.condition(params, inputs.text, **inputs.conditions), layout),
            inputs.tokens,
            inputs.counted,
            inputs.sizes.prod(-1),
            inputs.complexity,
            layout.spread,
            draws.loss,
            model.diffusion,
            lambda values: model.latents(values, layout),
            self.motion,
        )

    def _inputs(self, frozen: TrainedTokenizer, batch: Any, draws: Drawn) -> Inputs:
        """What a batch's loss is computed from; clips that are not encoded yet are."""
        model, energy = self.model, None
        layout, _, clips = self._shapes(batch)
        if "pack" in batch:
            tokens, text_tokens = batch["tokens"], batch["text"]
        else:
            latents = batch["latents"] if "latents" in batch else model.codec.encode(frozen, batch["video"])[0]
            tokens, text_tokens = model.tokens(latents), single_clips(batch["text"])
            if model.diffusion.adaptive > 0:
                energy = complexity(latents)[:, None]
        conditions = {}
        if draws.observed is not None:
            conditions = {"observed": tokens, "mask": draws.observed}
        if draws.low_res is not None:
            conditions["low_res"], conditions["low_res_time"] = self._noised(batch["low_res"], *draws.low_res)
        sizes = jnp.broadcast_to(layout.clip_sizes(), (*clips, 3))
        counted = self._counted(layout, tokens.shape, draws)
        return Inputs(layout, tokens, text_tokens, counted, sizes, energy, conditions)

    def _shapes(self, batch: Any) -> tuple[Layout, tuple[int, int, int], tuple[int, int]]:
        """The layout, the shape (b, n, p) of the tokens, and (b, s) of the clips."""
        if "pack" in batch:
            return Layout(pack=batch["pack"]), batch["tokens"].shape, batch["pack"].sizes.shape[:2]
        config, codec = self.model.denoiser.config, self.model.codec.tokenizer.config
        if "latents" in batch:
            count, *latents, channels = batch["latents"].shape
        else:
            count, frames, height, width, _ = batch["video"].shape
            time, *space = codec.strides
            latents, channels = [1 + (frames - 1) // time, height // space[0], width // space[1]], codec.latent_channels
        grid = config.grid(tuple(latents))
        return Layout(grid=grid), (count, math.prod(grid), channels * math.prod(config.patch_size)), (count, 1)

    def _counted(self, layout: Layout, shape: tuple[int, int, int], draws: Drawn) -> Float[Array, "b n p"]:
        """1 for each value with a loss, 0 for padding and observed values."""
        counted = jnp.broadcast_to(layout.valid()[..., None], shape).astype(jnp.float32)
        return counted if draws.observed is None else counted * (1 - self.model.per_value(draws.observed))

    def served(self, params: Any, moving: Any) -> Any:
        return params

    def start(self, params: Any, moving: Any, served: Any) -> tuple[Any, Any]:
        """Position tables are resized to this stage's clips; what `served` lacks, such as a text encoder, is kept."""
        return {**params, **{name: resize(tree, params[name]) for name, tree in served.items()}}, moving

    def _observed_mask(
        self,
        layout: Layout,
        shape: tuple[int, int, int],
        clips: tuple[int, int],
        key: PRNGKeyArray,
        groups: Float[Array, "b n 1"] | None = None,
    ) -> Float[Array, "b n q"]:
        """1 at observed latent positions, 0 elsewhere. No clip is observed completely, so that each has a loss.

        `groups` is 1 at tokens whose group of frames was drawn as observed; None where batches have no groups.
        """
        keys = jax.random.split(key, 6)
        cfg, sizes = self.conditioning, jnp.broadcast_to(layout.clip_sizes(), (*clips, 3)).astype(jnp.float32)
        count = jnp.minimum(jax.random.choice(keys[0], jnp.array(cfg.frames), clips), sizes[..., 0] - 1)
        whether = jax.random.bernoulli(keys[1], cfg.probability, clips)
        one = jnp.floor(jax.random.uniform(keys[3], clips) * sizes[..., 0])
        each = jax.random.bernoulli(keys[4], RANDOM_FRAMES, (*clips, self.model.denoiser.bounds[0]))
        numbers, own = jnp.arange(each.shape[-1])[None, None], sizes[..., :1]
        each &= ~((each | (numbers >= own)).all(-1, keepdims=True) & (numbers == one[..., None]))
        kind = jax.random.choice(keys[5], jnp.arange(len(cfg.kinds)), clips)

        def of_clip(values):
            """For each token, the value of its clip."""
            return layout.spread(values.reshape(*clips, -1).astype(jnp.float32))

        frame, place = layout.coordinates()[..., :1], layout.coordinates()[..., 1:]

        def outside_of_rectangles():
            key_frames, key_rectangles = jax.random.split(keys[2])
            margin = jnp.minimum(MARGIN, jnp.floor((sizes[..., :1] - 1) / 2))
            start, end = jnp.floor(jax.random.uniform(key_frames, (2, *clips, 1)) * (margin + 1)[None])
            generated = (frame >= of_clip(start)) & (frame < of_clip(sizes[..., :1] - end))
            inside = [
                ((place >= of_clip(corner)) & (place < of_clip(opposite))).all(-1, keepdims=True)
                for corner, opposite in zip(*rectangles(sizes[..., 1:], key_rectangles), strict=True)
            ]
            return ~(generated & jnp.stack(inside).any(0))

        def inside_of_a_rectangle():
            corner, opposite = rectangles(sizes[..., 1:], jax.random.fold_in(keys[2], 1))
            inside = (place >= of_clip(corner[0])) & (place < of_clip(opposite[0]))
            leaves_some = (opposite - corner)[0].prod(-1) < sizes[..., 1:].prod(-1)
            return inside.all(-1, keepdims=True) & (of_clip(leaves_some) > 0)

        masks = {
            "start": lambda: frame < of_clip(count),
            "end": lambda: frame >= of_clip(sizes[..., 0] - count),
            "ends": lambda: (frame < of_clip(count)) | (frame >= of_clip(jnp.maximum(sizes[..., 0] - 1, count + 1))),
            "every": lambda: (frame % EVERY == 0) & (of_clip(sizes[..., 0]) > 1),
            "one": lambda: (frame == of_clip(one)) & (of_clip(sizes[..., 0]) > 1),
            "random": lambda: (of_clip(each) * (frame == numbers)).sum(-1, keepdims=True) > 0,
            "rectangles": outside_of_rectangles,
            "inside": inside_of_a_rectangle,
            "groups": lambda: jnp.zeros((*shape[:2], 1), bool) if groups is None else groups > 0,
        }
        chosen = of_clip(jax.nn.one_hot(kind, len(cfg.kinds)) * whether[..., None])
        found = {name: masks[name]() for name in dict.fromkeys(cfg.kinds)}
        mask = sum(chosen[..., i : i + 1] * found[name] for i, name in enumerate(cfg.kinds))
        positions = shape[-1] // self.model.latent_shape[3]
        return jnp.broadcast_to(mask.astype(jnp.float32), (*shape[:2], positions))

    def _noised(
        self, low_res: Float[Array, "b t2 h2 w2 c"], time: Float[Array, "b 1"], noise: Float[Array, "b t2 h2 w2 c"]
    ) -> tuple[Float[Array, "b t2 h2 w2 c"], Float[Array, "b 1"]]:
        """Low-resolution latents with noise of a random time for each clip, and these times (noise augmentation)."""
        alpha, sigma = (level[..., None, None, None] for level in self.model.diffusion.schedule(time))
        return alpha * low_res + sigma * noise, time
