"""Samples videos: requests of one size in batches, of several sizes in packs."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm.auto
from jaxtyping import Float, UInt8

from walt_jax.denoiser.layout import Grid
from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.resize import resize
from walt_jax.errors import UserError
from walt_jax.generation import by_schedule, int8, packs
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.latent_diffusion import NEVER, LatentDiffusion, SamplingConfig, unboxed
from walt_jax.generation.low_res import LowRes
from walt_jax.generation.request import Request, Size
from walt_jax.generation.schedules import AUTOREG, check_name, is_adaptive
from walt_jax.parallel.processes import fetched, together
from walt_jax.text.frozen import FrozenText
from walt_jax.text.labels import Labels
from walt_jax.text.vocabulary import Vocabulary

Shape = tuple[int, int, int, int]
# (requests of a batch by their number, evaluation, evaluations, a function of a request's place in the batch that
# returns the estimate of its latents so far)
Watch = Callable[[list[int], int, int, Callable[[int], Float[np.ndarray, "t h w c"]]], None]


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained model with all that it needs to sample.

    Attributes:
        model: the modules.
        params: of text encoder and denoiser.
        tokenizer: decodes latents.
        captions: encodes prompts.
        config: see `SamplingConfig`.
        low_res: of super-resolution: encodes low-resolution clips, without which the model can't sample.
        packed: whether the denoiser was trained on packs, whose clips have sizes up to its bounds; of one that was not,
            tables of positions are interpolated to other sizes.
        call: latent frames that are made at once by a model that was trained on so many frames of longer clips, with
            gaps between them; longer videos follow the config's schedule. 0: the model makes whole clips.
    """

    model: LatentDiffusion
    params: Any
    tokenizer: TrainedTokenizer
    captions: Vocabulary | Labels | FrozenText
    config: SamplingConfig
    low_res: LowRes | None = None
    packed: bool = False
    call: int = 0

    def in_int8(self) -> "Generator":
        """With the weights of linear layers in 8 bits, see `int8`."""
        return dataclasses.replace(self, params=together(jax.jit(int8.quantised), self.params))

    def following(self, schedule: str) -> "Generator":
        """With another schedule for long videos.

        Raises:
            UserError: if there is none of that name, or the model was not trained on frames with gaps.
        """
        check_name(schedule)
        if not self.call:
            raise UserError(
                f"The schedule {schedule} has gaps between frames, and this model was trained on whole clips; leave it "
                "out, or train on groups of frames, see pack.frames in configs/walt_demo_long.py."
            )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, schedule=schedule))

    @property
    def longest(self) -> int:
        """Latent frames that are made at once; longer videos are made window by window, or by a schedule."""
        return self.call or self._trained

    @property
    def _trained(self) -> int:
        """Latent frames of the longest clip of training."""
        return max(self.model.latent_shape[0], self.model.denoiser.bounds[0] * self.model.denoiser.config.patch_size[0])

    @property
    def schedule(self) -> str:
        """The name of the schedule that longer videos follow, of a model that was trained on frames with gaps."""
        return self.config.schedule or AUTOREG

    def shape(self, size: Size | None) -> Shape:
        """(t, h, w, c) of the latents of a video of so many frames, height and width.

        Raises:
            UserError: if the model can't make a video of that size; it names the nearest.
        """
        if size is None:
            return self.model.latent_shape
        codec, patch = self.model.codec.tokenizer.config, self.model.denoiser.config.patch_size
        strides = [stride * part for stride, part in zip(codec.strides, patch, strict=True)]
        if self.low_res is not None:
            strides[1:] = [stride * self.low_res.scale for stride in strides[1:]]
        frames, height, width = size
        unit = codec.strides[0]
        if frames < 1 or (frames - 1) % unit or (1 + (frames - 1) // unit) % patch[0]:
            raise UserError(
                f"{frames} frames can't be made by this model; give 1 + {unit}·k of them, such as "
                f"{_nearest(frames - 1, unit) + 1}."
            )
        if self.call and 1 + (frames - 1) // unit > self._trained:
            raise UserError(
                f"This model was trained on frames of clips of up to {1 + (self._trained - 1) * unit}, and {frames} "
                f"are asked for; give --num_frames={1 + (self._trained - 1) * unit} or fewer, or train on longer clips."
            )
        for name, length, stride in (("height", height, strides[1]), ("width", width, strides[2])):
            if length < stride or length % stride:
                raise UserError(
                    f"A {name} of {length} can't be made by this model; give a multiple of {stride}, such as "
                    f"{max(stride, _nearest(length, stride))}."
                )
        return codec.latent_shape(*size)

    def tile(self, shape: Shape) -> Grid | None:
        """Super-resolution of larger frames than it was trained for is done in tiles of those, see `Tiles`."""
        trained = model_grid(self.model, self.model.latent_shape)
        grid = model_grid(self.model, shape)
        larger = any(axis > most for axis, most in zip(grid[1:], trained[1:], strict=True))
        if self.model.denoiser.config.upscale == 1 or not larger:
            return None
        return tuple(min(axis, most) for axis, most in zip(grid, trained, strict=True))

    def latents(
        self, requests: Sequence[Request], bar: bool | None = None, watch: Watch | None = None
    ) -> list[Float[np.ndarray, "t h w c"]]:
        """Normalised latents of a video for each request.

        Requests of one size are sampled in batches; where there are several sizes, in packs, if the model can. What a
        request gives is the same, but for rounding.

        Args:
            requests: what is asked for.
            bar: whether progress is shown; by default, where there are several batches.
            watch: see `Watch`; what it raises ends sampling.

        Raises:
            UserError: if the model can't make videos of a size.
        """
        long = [number for number, request in enumerate(requests) if self._follows_schedule(request)]
        if not long:
            return self._at_once(requests, bar, watch)
        found: list[Any] = [None] * len(requests)
        short = sorted(set(range(len(requests))) - set(long))
        for number, one in zip(short, self._at_once(*_some(requests, short, bar, watch)), strict=True):
            found[number] = one
        # Adaptive schedules are each video's own.
        keys = [
            (requests[n].size, by_schedule.leading(requests[n].given), n if is_adaptive(self.schedule) else 0)
            for n in long
        ]
        with tqdm.auto.tqdm(total=len(long), desc="sampling", unit="video", disable=not bar) as progress:
            for places in _alike(keys, self.config.batch_size):
                numbers = [long[place] for place in places]
                some, _, own = _some(requests, numbers, bar, watch)
                sample = functools.partial(self._at_once, bar=False, watch=own)
                made = by_schedule.whole(sample, some, self.shape(some[0].size), self.call, self.schedule)
                for number, one in zip(numbers, made, strict=True):
                    found[number] = one
                progress.update(len(numbers))
        return found

    def _follows_schedule(self, request: Request) -> bool:
        """Whether a request is of a whole video that is made in several calls."""
        return bool(self.call) and request.frames is None and self.shape(request.size)[0] > self.call

    def _at_once(
        self, requests: Sequence[Request], bar: bool | None = None, watch: Watch | None = None
    ) -> list[Float[np.ndarray, "t h w c"]]:
        """As `latents`, of requests that are one call each."""
        shapes = [_part(self.shape(request.size), request) for request in requests]
        batches = list(self._batches(shapes, any(request.frames is not None for request in requests)))
        found: list[Any] = [None] * len(requests)
        hidden = len(batches) <= 1 if bar is None else not bar
        with tqdm.auto.tqdm(total=len(requests), desc="sampling", unit="clip", disable=hidden) as progress:
            for numbers, as_pack in batches:
                some, sizes = [requests[number] for number in numbers], [shapes[number] for number in numbers]
                sample = self._pack if as_pack else self._batch
                for number, latents in zip(numbers, sample(some, sizes, numbers, watch), strict=True):
                    found[number] = latents
                progress.update(len(numbers))
        return found

    def decode(self, latents: Iterable[Float[np.ndarray, "t h w c"]]) -> list[UInt8[np.ndarray, "t h w 3"]]:
        """The videos of latents, those of one size together."""
        latents = list(latents)
        videos: list[Any] = [None] * len(latents)
        for numbers in _alike([one.shape for one in latents], self.config.batch_size):
            rows = np.minimum(np.arange(self.config.batch_size), len(numbers) - 1)
            batch = np.stack([latents[numbers[row]] for row in rows])
            decoded = fetched(together(self.model.codec.decode, self.tokenizer, batch)[0])
            for number, video in zip(numbers, decoded, strict=False):
                videos[number] = video
        return videos

    def generate(
        self, requests: Sequence[Request], bar: bool | None = None, watch: Watch | None = None
    ) -> list[UInt8[np.ndarray, "t h w 3"]]:
        """A video for each request; arguments as those of `latents`."""
        return self.decode(self.latents(requests, bar, watch))

    def _batches(self, shapes: Sequence[Shape], gaps: bool) -> Iterator[tuple[list[int], bool]]:
        """Numbers of requests that are sampled together, and whether as a pack; with gaps between frames always.

        Raises:
            UserError: if they have to be a pack, and can't be.
        """
        together = packs.can_pack(self.model, self.config)
        if gaps and not together:
            raise UserError(
                "Frames with gaps between them are sampled as packs, and sampling.sampler='ddpm', guidance that "
                "measures whole clips and first_block_cache are not for packs; use ddim and plain guidance."
            )
        if not together or (len(set(shapes)) <= 1 and not gaps):
            for numbers in _alike(shapes, self.config.batch_size):
                yield numbers, not self._divides(shapes[numbers[0]])
            return
        grids = [self.model.denoiser.config.grid(shape[:3]) for shape in shapes]
        room = self.config.batch_size * (max(map(np.prod, grids)) if gaps else np.prod(self.model.layout.grid))
        yield from ((numbers, True) for numbers in packs.filled(grids, max(room, *(np.prod(grid) for grid in grids))))

    def _divides(self, shape: Shape) -> bool:
        """Whether the model's windows divide clips of a shape; if not, they are sampled as a pack of one.

        Raises:
            UserError: if that can't be either.
        """
        config = self.model.denoiser.config
        grid = config.grid(shape[:3])
        try:
            for window in config.attention_windows:
                if not (config.isolate_images and grid[0] == 1 and window.time != 1):
                    window.sizes(grid)
        except ValueError as error:
            if packs.can_pack(self.model, self.config):
                return False
            raise UserError(f"This model can't make a video of that size: {error}.") from error
        return True

    def _batch(
        self, requests: list[Request], shapes: list[Shape], numbers: list[int], watch: Watch | None
    ) -> Iterator[Float[np.ndarray, "t h w c"]]:
        """Latents of requests of one size."""
        # Batches of one size: one program is compiled, and a video does not depend on how many there are.
        rows = np.minimum(np.arange(self.config.batch_size), len(requests) - 1)
        some, shape = [requests[row] for row in rows], shapes[0]
        grid, tile = model_grid(self.model, shape), self.tile(shape)
        model, params = (self.model, self.params) if tile else self.at([grid])
        observed, until = _given(some, [shape] * len(some))
        low_res = None if some[0].low_res is None else np.stack([request.low_res for request in some])

        def on_step(number, count, estimate):
            watch(numbers, number, count, lambda place: _clip(model, fetched(estimate)[place], shape))

        text, free, seeds = self._texts(some)
        out = model.sample(
            params,
            text,
            free,
            seeds,
            self.config,
            shape,
            observed,
            until,
            low_res,
            on_step if watch else None,
            tile,
        )
        yield from fetched(out)[: len(requests)]

    def _pack(
        self, requests: list[Request], shapes: list[Shape], numbers: list[int], watch: Watch | None
    ) -> Iterator[Float[np.ndarray, "t h w c"]]:
        """Latents of requests of any sizes, sampled as one pack."""
        model, params = self.at([model_grid(self.model, self.shape(request.size)) for request in requests])
        text, free, seeds = self._texts(requests)
        frames = [request.frames and (self.shape(request.size)[0], request.frames) for request in requests]
        given = [
            None if request.given is None else (latents, until)
            for request, latents, until in zip(requests, *_given(requests, shapes, stack=False), strict=True)
        ]
        packed = packs.pack(model, shapes, text, free, seeds, given, frames)

        def on_step(number, count, estimate):
            watch(numbers, number, count, lambda place: packed.clips(model, fetched(estimate))[place])

        out = model.sample_tokens(params, packed.noise, packed.asked, self.config, on_step if watch else None)
        yield from packed.clips(model, fetched(out))

    def _texts(self, requests: list[Request]) -> tuple[Any, Any, np.ndarray]:
        """Prompts, negative prompts and seeds, as the model reads them."""
        text = self.captions.encode([request.prompt for request in requests])
        free = self.captions.encode([request.negative_prompt for request in requests])
        return text, free, np.array([request.seed for request in requests], np.uint32)

    def at(self, grids: Sequence[Grid]) -> tuple[LatentDiffusion, Any]:
        """The model and its parameters for clips of so many tokens along (t, h, w)."""
        largest = tuple(max(axis) for axis in zip(*grids, strict=True))
        bounds = self.model.denoiser.bounds
        if self.packed:
            largest = tuple(max(axis) for axis in zip(largest, bounds, strict=True))
        return self._resized(largest) if largest != bounds else (self.model, self.params)

    def _resized(self, bounds: Grid) -> tuple[LatentDiffusion, Any]:
        """A model without tables of positions stays itself: it is compiled for fewer shapes."""
        model = dataclasses.replace(self.model, denoiser=Denoiser(self.model.denoiser.config, bounds))
        like = _shapes(model)["denoiser"]
        if int8.is_quantised(self.params):
            like = jax.eval_shape(int8.quantised, like)
        same = jax.tree.map(jnp.shape, self.params["denoiser"]) == jax.tree.map(jnp.shape, like)
        if same and min(bounds[0], 2) == min(self.model.denoiser.bounds[0], 2):  # "sincos" tells pictures from clips
            return self.model, self.params
        return model, self.params if same else {**self.params, "denoiser": resize(self.params["denoiser"], like)}


@functools.lru_cache(maxsize=64)
def _shapes(model: LatentDiffusion) -> Any:
    return unboxed(jax.eval_shape(model.init, jax.random.key(0)))


def model_grid(model: LatentDiffusion, shape: Shape) -> Grid:
    """Tokens along (t, h, w) of a clip of latents."""
    return model.denoiser.config.grid(shape[:3])


def _clip(model: LatentDiffusion, tokens: Float[np.ndarray, "n p"], shape: Shape) -> Float[np.ndarray, "t h w c"]:
    return packs.as_latents(tokens, model_grid(model, shape), model.denoiser.config.patch_size)


def _given(requests: Sequence[Request], shapes: Sequence[Shape], stack: bool = True) -> tuple[Any, Any]:
    """Observed latents and until when they are, of each request; (None, None) where no request has any."""
    if stack and all(request.given is None for request in requests):
        return None, None
    latents, until = [], []
    for request, shape in zip(requests, shapes, strict=True):
        nothing = np.zeros(shape, np.float32), np.full((*shape[:3], 1), NEVER, np.float32)
        one, time = nothing if request.given is None else request.given
        latents.append(np.asarray(one, np.float32))
        until.append(np.asarray(time, np.float32))
    return (np.stack(latents), np.stack(until)) if stack else (latents, until)


def _alike(keys: Sequence[Any], most: int) -> Iterator[list[int]]:
    """Indices of equal keys, at most so many together, in order of the first of each."""
    places = collections.defaultdict(list)
    for number, key in enumerate(keys):
        places[key].append(number)
    for numbers in places.values():
        for first in range(0, len(numbers), most):
            yield numbers[first : first + most]


def _part(shape: Shape, request: Request) -> Shape:
    """Of the latents that a request asks for, of a video of a shape."""
    return shape if request.frames is None else (len(request.frames), *shape[1:])


def _some(
    requests: Sequence[Request], numbers: list[int], bar: bool | None, watch: Watch | None
) -> tuple[list[Request], bool | None, Watch | None]:
    """Arguments for some of the requests; what watches gets their numbers among all."""

    def watch_some(places, number, count, estimate):
        watch([numbers[place] for place in places], number, count, estimate)

    return [requests[number] for number in numbers], bar, watch and watch_some


def _nearest(length: int, unit: int) -> int:
    return max(0, round(length / unit)) * unit
