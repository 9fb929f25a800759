"""Codec, text encoder and denoiser together: what the denoiser is conditioned on, and how videos are sampled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt

from walt_jax.config import Fraction, Positive
from walt_jax.denoiser.layout import Grid, Layout, from_tokens, to_tokens
from walt_jax.denoiser.model import BlockCache, Condition, Denoiser, Step
from walt_jax.diffusion import parameterization
from walt_jax.diffusion.guidance import GuidanceConfig, Strength, difference_of, guide
from walt_jax.diffusion.learned_sigma import split_sigma
from walt_jax.diffusion.objective import Denoise, DiffusionConfig
from walt_jax.diffusion.sampler import Levels, Predict, Solver, TimeGrid, evaluations, solver, times_of
from walt_jax.errors import UserError
from walt_jax.generation.codec import Codec
from walt_jax.generation.tiles import Tiles
from walt_jax.parallel.processes import together
from walt_jax.parallel.rules import constrain
from walt_jax.text.frozen import Embedded
from walt_jax.text.t5 import T5Encoder
from walt_jax.text.vocabulary import PAD

# Captions of clips: token ids, or embeddings where the text encoder is not trained; or class labels, with m = 1.
TextTokens = Int[Array, "b s m"] | Embedded

OnStep = Callable[[int, int, Float[Array, "b n p"]], None]  # see `LatentDiffusion.sample_tokens`

NEVER = 2.0  # a time above all others, down to which a position follows what is given: it does not
# With guidance, batches of at most so many tokens are evaluated with and without condition at once. On two CPU cores
# the demo's clip of 80 tokens takes 7 % less time so, and eight of them the same as one after the other.
AT_ONCE = 128
VISITS = 1024  # the times of a sampler are padded to a multiple, so that one program serves any number of steps


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How videos are sampled.

    Attributes:
        steps: number of sampling steps.
        sampler: see `diffusion.sampler`; W.A.L.T's is "ddim".
        guidance: see `GuidanceConfig`; guidance doubles the cost: the model is also evaluated without the condition.
        batch_size: clips sampled together.
        first_block_cache: where above 0, FirstBlockCache's threshold: an evaluation whose first block adds what it
            added before, but for a change below so many times its mean absolute value, takes what the other blocks
            added then. 0.05 to 0.2; a clip's own, and the time is saved where all of a batch do.
        low_res_noise: the diffusion time of the noise that super-resolution's input gets; a little hides what the base
            model does not do as its training clips have it. At most `conditioning.low_res_noise` of training.
        schedule: of a model trained on groups of frames, `pack.frames` of a stage: which frames of a video come from
            which, see `generation.schedules`; "" is "autoreg".
    """

    steps: Positive
    sampler: Literal["ddpm", "ddim", "dpm++2m", "unipc", "euler", "heun"] = "ddim"
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    batch_size: Positive = 8
    first_block_cache: float = 0.0
    low_res_noise: Fraction = 0.0
    schedule: str = ""

    @property
    def program(self) -> "SamplingConfig":
        """The config with all that `Dials` holds, and what an evaluation does not read, set to one value.

        What is left decides on the compiled program; whether there is guidance does, for it doubles the work.
        """
        interval = self.guidance.interval and (0.0, 1.0)
        scale = 2.0 if self.guidance.needs_unconditional else 1.0
        guidance = dataclasses.replace(self.guidance, scale=scale, interval=interval)
        return dataclasses.replace(self, steps=1, guidance=guidance, batch_size=1, low_res_noise=0.0, schedule="")

    @property
    def dials(self) -> "Dials":
        """The numbers that a compiled evaluation takes as arguments."""
        times = times_of(self.sampler, self.steps)
        times = np.pad(times, (0, -len(times) % VISITS))
        return Dials(times, np.asarray(1 / self.steps), Strength.of(self.guidance))


class Dials(NamedTuple):
    """The numbers of a `SamplingConfig` that need no program of their own.

    Attributes:
        times: that the sampler visits, then zeros.
        length: of a step, as a time; read only by mean velocities.
        guidance: its scale and interval.
    """

    times: Float[Array, " visits"]
    length: Float[Array, ""]
    guidance: Strength


@flax.struct.dataclass
class Asked:
    """What a batch is sampled from: equal clips or packs of clips, as tokens.

    Attributes:
        layout: where the clips are.
        text: captions or labels.
        free: the same without: empty, or negative prompts. Guidance leads away from them.
        keys: of each row, for samplers that add noise.
        observed: clean latents that are given.
        until: the time, 0..1, down to which each latent position follows them; `NEVER` where nothing is given.
        low_res: low-resolution latents, if the denoiser upscales.
        low_res_time: of the noise that they have.
        tile: tokens along (t, h, w) of the tiles that larger clips are sampled in, see `Tiles`; None: as a whole.
    """

    layout: Layout
    text: TextTokens
    free: TextTokens
    keys: PRNGKeyArray
    observed: Float[Array, "b n p"]
    until: Float[Array, "b n q"]
    low_res: Float[Array, "b t2 h2 w2 c"] | None = None
    low_res_time: Float[Array, "b s"] | None = None
    tile: Grid | None = flax.struct.field(pytree_node=False, default=None)


class Carried(NamedTuple):
    """What the denoiser carries from one evaluation of a sampler to the next.

    Attributes:
        estimates: the last of the clean latents, with the condition and, for guidance, without.
        learned: v of `learned_sigma`; None where the denoiser has none.
        guided: the last guided estimate.
        difference: see `guidance.difference_of`; None without APG.
        caches: of each model, or one for the batch of both; empty without `first_block_cache`.
    """

    estimates: list[Float[Array, "b n p"]]
    learned: Float[Array, "b n p"] | None
    guided: Float[Array, "b n p"]
    difference: Float[Array, "b n p"] | None = None
    caches: tuple[BlockCache, ...] = ()


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """The modules of a video diffusion model; parameters are passed to each method.

    Attributes:
        codec: pixels to latents and back.
        text: caption ids to embeddings; None where the denoiser is conditioned on labels, or on nothing.
        denoiser: predicts what `diffusion.parameterization` says.
        diffusion: see `DiffusionConfig`.
        latent_shape: (t, h, w, c) of a clip that is sampled.
        trains_text: whether the text encoder is trained with the denoiser; if not, all methods take its embeddings.
    """

    codec: Codec
    text: T5Encoder | None
    denoiser: Denoiser
    diffusion: DiffusionConfig
    latent_shape: tuple[int, int, int, int]
    trains_text: bool = True

    @property
    def layout(self) -> Layout:
        """Positions of the tokens of a clip of `latent_shape`."""
        return Layout(grid=self.denoiser.config.grid(self.latent_shape[:3]))

    def layout_of(self, latents: Float[Array, "b t h w c"]) -> Layout:
        """Positions of the tokens of clips of one size, which may differ from `latent_shape`."""
        return Layout(grid=self.denoiser.config.grid(latents.shape[1:4]))

    @property
    def low_res_shape(self) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the low-resolution latents, for super-resolution."""
        t, h, w, c = self.latent_shape
        scale = self.denoiser.config.upscale
        return t, h // scale, w // scale, c

    def tokens(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b n p"]:
        """Latents as tokens: patches of latent positions, flattened."""
        return to_tokens(latents, self.denoiser.config.patch_size)

    def latents(self, tokens: Float[Array, "b n p"], layout: Layout) -> Float[Array, "b t h w c"]:
        """The inverse of `tokens`, of equal clips."""
        return from_tokens(tokens, layout.grid, self.denoiser.config.patch_size)

    def text_tokens(self, *shape: int) -> Int[Array, "*b m"] | Embedded:
        """Dummy captions of this shape, whose last axis counts text tokens."""
        ids = jnp.ones(shape, jnp.int32)
        if self.text is None or self.trains_text:
            return ids
        return Embedded(jnp.zeros((*shape, self.text.config.dim), self.text.config.dtype), ids != PAD)

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Fresh parameters of the denoiser, and of the text encoder if it is trained, with their logical axis names."""
        key_text, key_denoiser = jax.random.split(key)
        text_tokens, params = self.text_tokens(1, 1, 1), {}
        if self.text is not None and self.trains_text:
            params["text"] = self.text.init(key_text, text_tokens[0], text_tokens[0] != PAD)["params"]
        noisy = self.tokens(jnp.zeros((1, *self.latent_shape)))
        mask, time = self.tokens(jnp.zeros((1, *self.latent_shape[:3], 1))), jnp.zeros((1, 1))
        low_res = jnp.zeros((1, *self.low_res_shape))
        condition = self.condition(unboxed(params), text_tokens, noisy, mask, low_res, time)
        denoiser = self.denoiser.init(key_denoiser, noisy, time, condition, self.layout)
        return {**params, "denoiser": denoiser["params"]}

    def condition(
        self,
        params: dict[str, Any],
        text_tokens: TextTokens,
        observed: Float[Array, "b n p"] | None = None,
        mask: Float[Array, "b n q"] | None = None,
        low_res: Float[Array, "b t2 h2 w2 c"] | None = None,
        low_res_time: Float[Array, "b s"] | None = None,
    ) -> Condition:
        """What the denoiser is conditioned on.

        Args:
            params: structured as `init` returns them.
            text_tokens: captions or labels of the clips, see `TextTokens`.
            observed: clean latents as tokens; read if the denoiser predicts frames, like
            mask: as tokens, 1 for each observed latent position, 0 elsewhere.
            low_res: low-resolution latents with noise; read if the denoiser upscales, like
            low_res_time: the diffusion time of that noise, 0..1.
        """
        cfg, inputs = self.denoiser.config, {}
        if isinstance(text_tokens, Embedded):
            inputs = {"text": text_tokens.embeddings, "text_mask": text_tokens.mask}
        elif self.text is not None:
            ids = text_tokens.reshape(-1, text_tokens.shape[-1])
            embeddings = self.text.apply({"params": params["text"]}, ids, ids != PAD)
            inputs = {"text": embeddings.reshape(*text_tokens.shape, -1), "text_mask": text_tokens != PAD}
        elif cfg.classes:
            inputs = {"label": text_tokens[..., 0]}
        if cfg.frame_prediction:
            inputs |= {"observed": observed * self.per_value(mask), "observed_mask": mask}
        if cfg.upscale > 1:
            inputs |= {"low_res": low_res, "low_res_time": low_res_time}
        return Condition(**inputs)

    def per_value(self, mask: Float[Array, "b n q"]) -> Float[Array, "b n p"]:
        """A mask of latent positions, repeated for each channel."""
        return jnp.repeat(mask, self.latent_shape[3], axis=-1)

    def denoise(self, params: dict[str, Any], condition: Condition, layout: Layout) -> Denoise:
        """The denoiser with its condition fixed: a function of noisy latents, time and the last estimate.

        Further arguments are the `Step`, where it predicts mean velocities, and a `BlockCache`.
        """

        def apply(noisy, time, estimate, *more):
            return self.denoiser.apply({"params": params["denoiser"]}, noisy, time, condition, layout, estimate, *more)

        return apply

    def noise(self, seeds: UInt[Array, " b"], shape: tuple[int, int, int, int]) -> Float[Array, "b t h w c"]:
        """Standard normal latents of a size; a clip's depend on its own seed only."""
        return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)

    def asked(
        self,
        text: Int[Array, "b m"] | Embedded,
        free: Int[Array, "b m"] | Embedded,
        seeds: UInt[Array, " b"],
        shape: tuple[int, int, int, int],
        observed: Float[Array, "b t h w c"] | None = None,
        until: Float[Array, "b t h w 1"] | None = None,
        low_res: Float[Array, "b t2 h2 w2 c"] | None = None,
        augmentation: float = 0.0,
        tile: Grid | None = None,
    ) -> Asked:
        """What a batch of clips of one size is sampled from; arguments as those of `sample`."""
        if observed is None:
            observed = jnp.zeros((seeds.shape[0], *shape))
        if until is None:
            until = jnp.full((*observed.shape[:-1], 1), NEVER)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(seeds)
        layout = Layout(grid=self.denoiser.config.grid(shape[:3]))
        texts = single_clips(text), single_clips(free)
        time = jnp.full((seeds.shape[0], 1), augmentation)
        if augmentation > 0:
            key = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 2))(seeds)
            noise = jax.vmap(lambda key: jax.random.normal(key, low_res.shape[1:]))(key)
            alpha, sigma = (level[..., None, None, None] for level in self.diffusion.schedule(time))
            low_res = alpha * low_res + sigma * noise
        return Asked(layout, *texts, keys, self.tokens(observed), self.tokens(until), low_res, time, tile)

    def predictor(
        self, params: dict[str, Any], asked: Asked, config: SamplingConfig, dials: Dials | None = None
    ) -> tuple[Predict, Levels, Carried]:
        """The guided denoiser of a batch: (predict, levels, what is carried at first) for `diffusion.sampler`.

        Args:
            params: structured as `init` returns them.
            asked: the batch.
            config: see `SamplingConfig`.
            dials: are followed instead of the config's own.
        """
        dials = config.dials if dials is None else dials
        layout, kind, clean = asked.layout, self.diffusion.parameterization, asked.observed
        sizes = layout.clip_sizes()
        clips = (clean.shape[0], sizes.shape[1])
        known = (asked.until == 0).astype(clean.dtype)
        low_res_time = jnp.zeros(clips) if asked.low_res_time is None else asked.low_res_time
        ways = [(asked.text, clean, known, asked.low_res, low_res_time)]
        means = self.denoiser.config.mean_velocity
        if config.guidance.needs_unconditional and not means:
            # Without caption and without observed frames: guidance is on both.
            ways.append((asked.free, jnp.zeros_like(clean), jnp.zeros_like(known), asked.low_res, low_res_time))
        models, batches = self._models(params, ways, asked)
        tokens = jnp.maximum(sizes.prod(-1), 1)

        def levels(time):
            levels = self.diffusion.schedule(time[None, None], self.diffusion.shift(tokens))
            return tuple(layout.spread(jnp.broadcast_to(level, tokens.shape)[..., None]) for level in levels)

        channel = jnp.arange(clean.shape[-1]) % self.latent_shape[3]

        def predict(z, time, carried):
            # Self-conditioning: each model gets its own last estimate, as in training.
            times, level = jnp.full(clips, time), levels(time)
            step = _step_of(dials, times) if means else None
            outputs, caches = models(z, times, carried.estimates, step, carried.caches)
            split_outputs = [split_sigma(output, z.shape[-1]) for output in outputs]
            estimates = [parameterization.clean(kind, prediction, z, *level) for prediction, _ in split_outputs]
            guided, difference = estimates[0], None
            if len(ways) > 1:
                guided = guide(config.guidance, time, *estimates, carried.difference, dials.guidance)
                if config.guidance.apg is not None:
                    difference = difference_of(config.guidance, *estimates, carried.difference)
                if config.guidance.channels:
                    guided = jnp.where(channel[None, None] < config.guidance.channels, guided, estimates[0])
            # Where clean latents are given, and held at this time, their noise stays that of training at each time.
            held = self.per_value((time > asked.until).astype(clean.dtype))
            guided = held * clean + (1 - held) * guided
            return guided, Carried(estimates, split_outputs[0][1], guided, difference, caches)

        none = jnp.zeros_like(clean)
        learned = none if self.denoiser.config.learned_sigma else None
        difference = none if len(ways) > 1 and config.guidance.apg is not None else None
        caches = ()
        if config.first_block_cache > 0 and asked.tile is None:
            dim, dtype = self.denoiser.config.dim, jnp.dtype(self.denoiser.config.dtype)
            nothing = jnp.zeros((len(ways) // batches * clean.shape[0], clean.shape[1], dim), dtype)
            caches = (BlockCache(nothing, nothing, config.first_block_cache),) * batches
        return predict, levels, Carried([none] * len(ways), learned, none, difference, caches)

    def _models(
        self, params: dict[str, Any], ways: list[tuple[Any, ...]], asked: Asked
    ) -> tuple[Callable[..., tuple[list[Array], tuple[BlockCache, ...]]], int]:
        """The denoiser with each of these conditions, one after the other or as rows of one batch.

        Args:
            params: structured as `init` returns them.
            ways: arguments of `condition` each.
            asked: the batch.

        Returns:
            (a function, how many batches it evaluates); the function is (noisy latents, times, the last estimate of
            each way, the step or None, a cache for each batch or none) -> (the output of each way, caches).
        """
        rows, tokens, _ = ways[0][1].shape
        few = isinstance(rows, int) and rows * tokens <= AT_ONCE  # rows of an exported program may be symbolic
        if len(ways) > 1 and asked.layout.pack is None and few:
            ways, each = [jax.tree.map(lambda *parts: jnp.concatenate(parts), *ways)], len(ways)
        else:
            each = 1
        if asked.tile is None:
            denoisers = [self.denoise(params, self.condition(params, *way), asked.layout) for way in ways]
        else:
            denoisers = [self._tiled(params, way, asked) for way in ways]

        def evaluate(z, times, estimates, step, caches):
            z, times, step = jax.tree.map(lambda values: jnp.concatenate([values] * each), (z, times, step))
            outputs, after = [], []
            for number, denoise in enumerate(denoisers):
                estimate = jnp.concatenate(estimates[number * each : (number + 1) * each])
                if caches:
                    output, cache = denoise(z, times, estimate, step, caches[number])
                    after.append(cache)
                else:
                    output = denoise(z, times, estimate, *([] if step is None else [step]))
                outputs += jnp.split(output, each)
            return outputs, tuple(after)

        return evaluate, len(denoisers)

    def _tiled(self, params: dict[str, Any], way: tuple[Any, ...], asked: Asked) -> Denoise:
        """As `denoise`, of larger clips, tile by tile; `way` are the arguments of `condition`."""
        text, clean, known, low_res, low_res_time = way
        config = self.denoiser.config
        tiles = Tiles(asked.layout.grid, asked.tile, config.upscale)
        parts = {"clean": tiles.cut(clean), "known": tiles.cut(known)}
        if low_res is not None:
            parts["low_res"] = tiles.cut_latents(low_res, config.patch_size[1] / config.upscale, config.patch_size[0])

        def apply(noisy, time, estimate, *more):
            def one(part):
                given = part["clean"], part["known"], part.get("low_res"), low_res_time
                denoise = self.denoise(params, self.condition(params, text, *given), Layout(grid=asked.tile))
                return denoise(part["noisy"], time, part["estimate"], *more)

            found = parts | {"noisy": tiles.cut(noisy), "estimate": tiles.cut(estimate)}
            return tiles.blend(jax.lax.map(one, found))  # one after the other, in the memory of one

        return apply

    def _solver(self, params: dict[str, Any], asked: Asked, config: SamplingConfig, dials: Dials) -> tuple[Solver, Any]:
        """(the sampler, what the model carries at first)"""
        predict, levels, carried = self.predictor(params, asked, config, dials)
        learned = (lambda carried: carried.learned) if self.denoiser.config.learned_sigma else None
        return solver(config.sampler, predict, TimeGrid(dials.times, levels), asked.keys, learned), carried

    @functools.partial(jax.jit, static_argnames=("self", "config"))
    def _begin(
        self, params: dict[str, Any], noise: Float[Array, "b n p"], asked: Asked, config: SamplingConfig, dials: Dials
    ) -> Any:
        chosen, carried = self._solver(params, asked, config, dials)
        return _divided(chosen.start(_divided(noise), carried))

    @functools.partial(jax.jit, static_argnames=("self", "config"), donate_argnames=("state",))
    def _step(
        self, params: dict[str, Any], state: Any, i: Int[Array, ""], asked: Asked, config: SamplingConfig, dials: Dials
    ) -> tuple[Any, Float[Array, "b n p"]]:
        """The state after evaluation i, and its estimate of the clean latents."""
        chosen, _ = self._solver(params, asked, config, dials)
        state = _divided(chosen.step(state, i))
        *_, carried = state
        return state, carried.guided

    @functools.partial(jax.jit, static_argnames=("self", "config"))
    def _end(
        self, params: dict[str, Any], state: Any, asked: Asked, config: SamplingConfig, dials: Dials
    ) -> Float[Array, "b n p"]:
        """The sample, in which what is given to the end is exact."""
        chosen, _ = self._solver(params, asked, config, dials)
        known = self.per_value((asked.until == 0).astype(asked.observed.dtype))
        return known * asked.observed + (1 - known) * chosen.result(state)

    def sample_tokens(
        self,
        params: dict[str, Any],
        noise: Float[Array, "b n p"],
        asked: Asked,
        config: SamplingConfig,
        on_step: OnStep | None = None,
    ) -> Float[Array, "b n p"]:
        """Clean latents, as tokens. One program for each evaluation, so that sampling can be watched and cancelled.

        The same program serves any number of steps and any guidance, see `SamplingConfig.program`.

        Args:
            params: structured as `init` returns them.
            noise: standard normal.
            asked: see `Asked`.
            config: see `SamplingConfig`.
            on_step: called after each evaluation with its number, from 1, how many there are, and its estimate of the
                clean latents, as tokens. What it raises ends sampling.

        Raises:
            UserError: if a mean velocity's guidance is below 1.
        """
        if self.denoiser.config.mean_velocity and config.guidance.scale < 1:
            raise UserError(
                f"guidance is {config.guidance.scale:g}, and this model has learned scales from 1 up; give at least 1."
            )
        count, program, dials = evaluations(config.sampler, config.steps), config.program, config.dials
        state = together(self._begin, params, noise, asked, program, dials)
        for number in range(count):
            state, estimate = together(self._step, params, state, np.int32(number), asked, program, dials)
            if on_step is not None:
                # Programs are queued on the device faster than they run: all would be, before the first has ended.
                on_step(number + 1, count, jax.block_until_ready(estimate))
        return together(self._end, params, state, asked, program, dials)

    def sample(
        self,
        params: dict[str, Any],
        text: Int[Array, "b m"] | Embedded,
        free: Int[Array, "b m"] | Embedded,
        seeds: UInt[Array, " b"],
        config: SamplingConfig,
        shape: tuple[int, int, int, int] | None = None,
        observed: Float[Array, "b t h w c"] | None = None,
        until: Float[Array, "b t h w 1"] | None = None,
        low_res: Float[Array, "b t2 h2 w2 c"] | None = None,
        on_step: OnStep | None = None,
        tile: Grid | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Samples normalised latents of clips of one size.

        Args:
            params: structured as `init` returns them.
            text: a caption or a label for each clip.
            free: the empty caption or label, or a negative prompt, for each clip; guidance leads away from it.
            seeds: one for each clip; its randomness depends on its own seed only.
            config: see `SamplingConfig`.
            shape: (t, h, w, c) of the clips; `latent_shape` by default.
            observed: normalised latents that are given.
            until: the time, 0..1, down to which each position follows what is given: 0 where it is kept, and the
                denoiser is told so if it predicts frames; `NEVER` where nothing is given.
            low_res: normalised low-resolution latents, if the denoiser upscales.
            on_step: see `sample_tokens`.
            tile: see `Asked`.
        """
        shape = shape or self.latent_shape
        augmentation = config.low_res_noise if low_res is not None else 0.0
        noise, asked = self._prepared(text, free, seeds, shape, observed, until, low_res, augmentation, tile)
        tokens = self.sample_tokens(params, noise, asked, config, on_step)
        return self.latents(tokens, asked.layout)

    @functools.partial(jax.jit, static_argnames=("self", "shape", "augmentation", "tile"))
    def _prepared(self, text, free, seeds, shape, observed, until, low_res, augmentation, tile):
        asked = self.asked(text, free, seeds, shape, observed, until, low_res, augmentation, tile)
        return self.tokens(self.noise(seeds, shape)), asked


def _divided(state: Any) -> Any:
    """Arrays of tokens, each divided over the mesh as all others: the first evaluation has the program of the rest."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", "tokens") if leaf.ndim == 3 else leaf, state)


def _step_of(dials: Dials, time: Float[Array, "b s"]) -> Step:
    """The sampler's step that begins at a time, with its guidance."""
    interval = jnp.broadcast_to(dials.guidance.interval[None, None].astype(time.dtype), (*time.shape, 2))
    return Step(jnp.maximum(time - dials.length, 0), jnp.full_like(time, dials.guidance.scale), interval)


def single_clips(text_tokens: Int[Array, "b m"] | Embedded) -> TextTokens:
    """Captions of a batch without packs, where a row has one clip."""
    return jax.tree.map(lambda array: array[:, None], text_tokens)


def unboxed(params: Any) -> Any:
    """Parameters without their logical axis names, divided as they are."""

    def plain(leaf: Any) -> Any:
        # Flax's own unboxing would put all of a parameter on each device where a mesh is in context.
        return leaf.unbox(apply_constraint=False) if isinstance(leaf, nn.Partitioned) else leaf

    return jax.tree.map(plain, params, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
