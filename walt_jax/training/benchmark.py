"""How fast the parts of a config are on the machine at hand, in one run, so that their ratios can be trusted."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from walt_jax.denoiser.attention import WindowAttention
from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.grouping import scores_computed
from walt_jax.denoiser.layout import Grid, Layout, Needs, Pack, PackRows, make_pack, place_clips
from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.windows import Window
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.latent_diffusion import LatentDiffusion, single_clips, unboxed
from walt_jax.layers import ANY_PLATFORM, compiling_for, on_cpu
from walt_jax.parallel.cost import flops
from walt_jax.parallel.hardware import peak as stated_peak
from walt_jax.training.data_benchmark import benchmark_decoding
from walt_jax.training.latents_benchmark import benchmark_latents
from walt_jax.training.loop import StageConfig
from walt_jax.training.optimizer import make_optimizer
from walt_jax.training.run_config import RunConfig, make_model, make_task
from walt_jax.training.state import COMPILER_OPTIONS, TrainState, make_train_step
from walt_jax.training.tasks import DenoiserTask

ROUNDS = 7
BATCHES = 32  # of packs, for which rows are chosen
PACKS_OF = (1024, 4096, 16384)  # tokens, that a layer of attention is timed on
CLIPS_OF = (1024, 4096)  # tokens, that full attention is


@dataclasses.dataclass
class Part:
    """Something to be timed.

    Attributes:
        name: in `benchmark.json`.
        run: does it once and returns what to wait for.
        flops: matrix products and convolutions of it, see `parallel.cost`; without the optimizer's.
        tokens: that are of clips, if it is about tokens.
        valid: their share of all tokens.
        optimizer_flops: those of the optimizer, if it is a train step; Muon has some.
        more: further figures.
    """

    name: str
    run: Callable[[], Any]
    flops: int
    tokens: int = 0
    valid: float = 1.0
    optimizer_flops: int | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


def benchmark(config: RunConfig) -> list[dict[str, Any]]:
    """Times training and sampling steps of random models on random latents, and how fast a host has such latents ready.

    Where the data are files, decoding is timed, too.

    Parts are timed interleaved, each once a round, so that all are affected when the machine is slow for a while.

    Returns:
        For each part {"name", "seconds_median", "flops", "flops_per_second", "peak_flops_per_second", "peak", "mfu",
        "tokens_per_second", "tokens_valid_fraction", "device"}, those that apply; of a layer also "temporary_bytes",
        what its program needs besides arguments and results; of a train step also "optimizer_flops" and
        "seconds_over_products", how many times as long it takes as all of its products, the optimizer's among them,
        would at the rate of the largest; and the rows of `latents_benchmark` and `data_benchmark`.
    """
    dtype = (config.denoiser or config.tokenizer).dtype
    parts = [_tokenizer(config), *([] if config.denoiser is None else _denoiser(config))]
    product = _product(dtype)
    with tqdm.tqdm(total=(ROUNDS + 1) * (len(parts) + 1), desc="timing", unit="run", dynamic_ncols=True) as progress:
        seconds: dict[str, list[float]] = {part.name: [] for part in (product, *parts)}
        for number in range(ROUNDS + 1):
            for part in (product, *parts):
                began = time.perf_counter()
                jax.block_until_ready(part.run())
                if number:  # the first run compiles
                    seconds[part.name].append(time.perf_counter() - began)
                progress.update()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    device = jax.devices()[0].device_kind
    peak, named = product.flops / medians[product.name], f"measured here: {product.name}"
    if dtype == "bfloat16" and (stated := stated_peak(device)):
        peak, named = stated, f"stated for {device}, dense bfloat16"
    rows = []
    for part in (product, *parts):
        row = {
            "name": part.name,
            "seconds_median": medians[part.name],
            "seconds_fastest": min(seconds[part.name]),
            "peak_flops_per_second": peak,
            "peak": named,
            "device": device,
        }
        if part.flops:
            rate = part.flops / medians[part.name]
            row |= {"flops": part.flops, "flops_per_second": rate, "mfu": rate / peak}
        if part.flops and part.optimizer_flops is not None:
            products = (part.flops + part.optimizer_flops) * medians[product.name] / product.flops
            row |= {
                "optimizer_flops": part.optimizer_flops,
                "seconds_over_products": medians[part.name] / products,
            }
        if part.tokens:
            row |= {
                "tokens_per_second": part.tokens / medians[part.name],
                "tokens_valid_fraction": part.valid,
            }
        rows.append({**row, **part.more})
    if config.denoiser is not None:
        rows.append({**benchmark_latents(config, config.denoiser_stages[-1]), "device": "host"})
    if config.data.parts and "drawn" not in dict(config.data.parts):
        shapes = config.clip_shapes(list(config.stages)[-1])
        timed = benchmark_decoding(config.data, shapes, config.seed, config.tokens)
        rows += [{**row, "device": "host"} for row in timed]
    return rows


def _product(dtype: str) -> Part:
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    return Part(f"matmul {side}³ {dtype}", lambda: multiply(x, x), 2 * side**3)


class _Training:
    """A train step that is called again and again: its state is donated and replaced."""

    def __init__(self, task: Any, stage: StageConfig, frozen: Any, batch: Any):
        self.key, self.frozen, self.batch = jax.random.key(0), frozen, batch
        optimizer = make_optimizer(stage.optimizer, stage.steps, jax.eval_shape(task.init, self.key)[0])
        # Copied: what is donated must be this part's own.
        params, moving = jax.tree.map(jnp.copy, unboxed(jax.jit(task.init)(self.key)))
        self.state = TrainState.create(params, moving, task, optimizer, stage.ema_decay)
        self.step = make_train_step(task, optimizer, stage.ema_decay)
        self.flops = flops(task.gradients, params, moving, frozen, batch, self.key, self.state.step)
        self.optimizer_flops = flops(optimizer.update, params, self.state.opt_state, params)

    def __call__(self) -> Any:
        self.state, metrics = self.step(self.state, self.frozen, self.batch, self.key)
        return metrics


def _tokenizer(config: RunConfig) -> Part:
    name, stage = [(n, s) for n, s in config.stages.items() if s.task == "tokenizer"][-1]
    clip, count = config.clip_shapes(name)[0].nominal, config.batch_sizes(name)[0]
    video = np.random.default_rng(0).integers(0, 255, (count, *clip, 3), dtype=np.uint8)
    step = _Training(make_task(config, name, 0), stage, None, {"video": video})
    latents = count * math.prod(config.tokenizer.latent_shape(*clip)[:3])
    more = {"clips": count, "clip": list(clip)}
    return Part("tokenizer_train_step", step, step.flops, latents, 1.0, step.optimizer_flops, more)


def _denoiser(config: RunConfig) -> list[Part]:
    _, stage = [(n, s) for n, s in config.stages.items() if s.task == "denoiser"][-1]
    model = make_model(config, config.most_pieces)
    task = DenoiserTask(model, config.conditioning)
    grid = model.layout.grid
    tokens = math.prod(grid)
    count = stage.batch_size
    if stage.pack is not None:
        count = max(1, stage.batch_size * stage.pack.tokens // tokens)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(count, *model.latent_shape)).astype(np.float32)
    text_tokens = jax.device_get(model.text_tokens(count, config.text_length))
    frozen = _frozen(model)
    batch = {"latents": latents, "text": text_tokens}
    if config.denoiser.upscale > 1:
        batch["low_res"] = rng.normal(size=(count, *model.low_res_shape)).astype(np.float32)
    dense = _Training(task, stage, frozen, batch)
    parts = [Part("denoiser_train_step", dense, dense.flops, count * tokens, 1.0, dense.optimizer_flops)]
    full = dataclasses.replace(config.denoiser, windows=((None, None, None),) * len(config.denoiser.windows))
    if full != config.denoiser:
        other = _with(model, full)
        step = _Training(DenoiserTask(other, config.conditioning), stage, frozen, batch)
        name = "denoiser_train_step_full_attention"
        parts.append(Part(name, step, step.flops, count * tokens, 1.0, step.optimizer_flops))
    if config.denoiser.upscale == 1:
        together = next(size for size in range(min(count, max(1, 2048 // tokens)), 0, -1) if count % size == 0)
        equal = [[grid] * together] * (count // together)
        mixed = [[_filled(grid, together * tokens, rng) for _ in equal] for _ in range(BATCHES)]
        for name, batches in (("equal", [equal]), ("mixed", mixed)):
            cost = dense.flops if name == "equal" else None
            name = f"denoiser_train_step_packed_{name}"
            parts.append(_packed(name, task, stage, frozen, batches, text_tokens, cost))
    parts.append(_sampling(model, dense.state.params, text_tokens, count * tokens))
    return [*parts, *_attention(model)]


def _frozen(model: LatentDiffusion) -> TrainedTokenizer:
    tokenizer = model.codec.tokenizer
    strides = tokenizer.config.strides
    variables = jax.jit(tokenizer.init)(jax.random.key(0), jnp.zeros((1, 1, *strides[1:], 3)))
    channels = model.latent_shape[3]
    return TrainedTokenizer.unnormalised(unboxed(variables), channels)


def _with(model: LatentDiffusion, config: DenoiserConfig) -> LatentDiffusion:
    return dataclasses.replace(model, denoiser=Denoiser(config, model.denoiser.bounds))


def _packed(
    name: str,
    task: DenoiserTask,
    stage: StageConfig,
    frozen: TrainedTokenizer,
    batches: list[list[list[Grid]]],
    text_tokens: Any,
    cost: int | None,
) -> Part:
    """A train step on packs; `cost` is that of the same clips as a batch, where they are equal.

    Rows are chosen for all of the batches, as training does for the clips of a stage; the first is timed.
    """
    config = task.model.denoiser.config
    length = max(sum(map(math.prod, pack)) for packs in batches for pack in packs)
    clips = max(len(pack) for packs in batches for pack in packs)
    pack, scores = _in_rows([place_clips(packs, length, clips) for packs in batches], config)
    count, valid = len(pack.positions), float((pack.positions[..., 0] >= 0).mean())
    width = task.model.latent_shape[3] * math.prod(config.patch_size)
    tokens = np.random.default_rng(0).normal(size=(count, length, width)).astype(np.float32)
    text = jax.tree.map(lambda array: np.broadcast_to(array[0], (count, clips, *array.shape[1:])).copy(), text_tokens)
    step = _Training(task, stage, frozen, {"tokens": tokens, "text": text, "pack": pack})
    more = {"packs": count, "tokens_per_pack": length, "attention_scores_computed_over_needed": scores}
    # Without a batch's count there is none: the trace's has scores of padding and of masked pairs.
    return Part(name, step, cost or 0, int(valid * count * length), valid, step.optimizer_flops, more)


def _in_rows(
    batches: list[tuple[np.ndarray, np.ndarray]], config: DenoiserConfig, windows: Sequence[Window] | None = None
) -> tuple[Pack, float]:
    """The first batch of packs in rows that suit all of them, and how many scores are computed for one needed."""
    text, text_alone = ((), False) if windows else (config.text_windows, config.text_alone)
    windows, isolate = windows or config.attention_windows, config.isolate_images
    needs = [Needs.of(*places, windows, isolate) for places in batches]
    pack = make_pack(*batches[0], windows, PackRows.choose(needs, text=text, text_alone=text_alone), isolate)
    computed = sum(map(scores_computed, pack.groups.values()))
    return pack, computed / sum(int(np.square(each[:, 0]).sum()) for each in needs[0].windows.values())


def _attention(model: LatentDiffusion) -> list[Part]:
    """A layer of attention with its gradients on packs of 1,024 to 16,384 tokens, and on one clip without windows.

    Where the platform has a fused kernel, each also by the plain route.
    """
    config, grid = model.denoiser.config, model.layout.grid
    window = Window(*config.windows[-1])
    routes = [("", None)] if on_cpu() else [("", None), ("_plain", ANY_PLATFORM)]
    parts = []
    for tokens in PACKS_OF:
        rng = np.random.default_rng(0)
        batches = [[_filled(grid, tokens, rng)] for _ in range(BATCHES)]
        clips = max(len(packs[0]) for packs in batches)
        places = [place_clips(packs, tokens, clips) for packs in batches]
        pack, scores = _in_rows(places, config, [window])
        valid = float((pack.positions[..., 0] >= 0).mean())
        scores = {"attention_scores_computed_over_needed": scores}
        for route, platform in routes:
            run, size = _layer(config, window, grid, Layout(pack=pack), tokens, platform)
            name = f"attention_pack_of_{tokens}_tokens{route}"
            parts.append(Part(name, run, 0, round(valid * tokens), valid, None, {**scores, **size}))
    whole = Window(None, None, None)
    for tokens in CLIPS_OF:
        for route, platform in routes:
            run, size = _layer(config, whole, (1, 1, tokens), Layout(grid=(1, 1, tokens)), tokens, platform)
            parts.append(Part(f"full_attention_of_{tokens}_tokens{route}", run, 0, tokens, more=size))
    return parts


def _layer(
    config: DenoiserConfig, window: Window, bounds: Grid, layout: Layout, tokens: int, platform: str | None
) -> tuple[Callable[[], Any], dict[str, int]]:
    """A call of one attention layer and its gradients, and the memory that it needs besides arguments and results."""
    relative = config.relative if layout.pack is not None else "none"
    layer = WindowAttention(
        config.heads,
        (window,),
        (window.bounds(bounds),),
        relative,
        config.qk_norm,
        config.attention_bias,
        jnp.dtype(config.dtype),
    )
    x = jax.random.normal(jax.random.key(0), (1, tokens, config.dim))
    params = unboxed(jax.jit(layer.init)(jax.random.key(0), x, layout))

    def loss(params, x, layout):
        with compiling_for(platform):
            return jnp.square(layer.apply(params, x, layout)).sum()

    slope = jax.jit(jax.grad(loss, (0, 1))).lower(params, x, layout).compile()
    return lambda: slope(params, x, layout), {"temporary_bytes": slope.memory_analysis().temp_size_in_bytes}


def _filled(grid: Grid, tokens: int, rng: np.random.Generator) -> list[Grid]:
    """Clips of random sizes up to `grid`, images among them, of so many tokens or a few less."""
    clips: list[Grid] = []
    misses = 0
    while misses < 20:
        t, h, w = (int(rng.integers(max(1, axis // 2), axis + 1)) for axis in grid)
        clip = (1 if rng.random() < 0.3 else t, h, w)
        if sum(map(math.prod, clips)) + math.prod(clip) > tokens:
            misses += 1
        else:
            clips.append(clip)
    return clips


def _sampling(model: LatentDiffusion, params: Any, text_tokens: Any, tokens: int) -> Part:
    """One evaluation of the denoiser for as many clips as a training step has."""
    count = len(jax.tree.leaves(text_tokens)[0])
    noisy = model.tokens(jnp.zeros((count, *model.latent_shape)))
    time = jnp.full((count, 1), 0.5)
    mask = model.tokens(jnp.zeros((count, *model.latent_shape[:3], 1)))
    low_res = jnp.zeros((count, *model.low_res_shape))

    def evaluation(params, noisy):
        condition = model.condition(params, single_clips(text_tokens), noisy, mask, low_res, time)
        return model.denoise(params, condition, model.layout)(noisy, time, jnp.zeros_like(noisy))

    params = jax.tree.map(jnp.copy, params)
    compiled = jax.jit(evaluation, compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))
    cost = flops(evaluation, params, noisy)
    return Part("denoiser_sampling_step", lambda: compiled(params, noisy), cost, tokens)
