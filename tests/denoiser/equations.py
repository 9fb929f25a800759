"""The denoiser's equations in numpy, for one clip at a time: what it has to equal, however it computes it."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from oracles import dense_attention, places_of, seen

from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.model import Condition
from walt_jax.denoiser.windows import Window


def swish(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def plain_norm(x, epsilon=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def own_norm(params, x, epsilon=1e-6):
    return plain_norm(x, epsilon) * params["scale"] + params["bias"]


def modulated(x, scale, shift):
    return plain_norm(x) * (1 + scale) + shift


def linear(params, x):
    return x @ params["kernel"] + params.get("bias", 0)


def fixed(places, dim):
    """DiT's sines, then cosines."""
    table = np.empty((len(places), dim))
    for row, place in enumerate(places):
        for i in range(dim // 2):
            angle = place * 10_000.0 ** (-i / (dim // 2))
            table[row, i], table[row, dim // 2 + i] = math.sin(angle), math.cos(angle)
    return table


def waves(value, dim, last=None):
    """Cosines, then sines, of frequencies from 1 down to 10,000^(-(dim/2 - 1) / last)."""
    last = dim // 2 if last is None else last
    return np.array([wave(value * 10_000 ** (-i / last)) for wave in (math.cos, math.sin) for i in range(dim // 2)])


def upscaled(params, low, scale):
    """A convolution over each frame whose channels are the pixels of a square."""
    frames, height, width, channels = low.shape
    padded = np.pad(low, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.empty((frames, height * scale, width * scale, channels))
    for t, y, x in np.ndindex(frames, height, width):
        square = np.einsum("ijc,ijco->o", padded[t, y : y + 3, x : x + 3], params["kernel"][0]) + params["bias"]
        out[t, y * scale : (y + 1) * scale, x * scale : (x + 1) * scale] = square.reshape(scale, scale, channels)
    return out.reshape(-1, channels)


def cycles(params, config):
    """The parameters of each cycle of windows; those of a scan are stacked."""
    count = config.layers // len(config.block_windows)
    if config.scan:
        return [jax.tree.map(lambda leaf, cycle=cycle: leaf[cycle], params["cycles"]) for cycle in range(count)]
    return [params[f"cycle{cycle}"] for cycle in range(count)]


class Conditioned(NamedTuple):
    """What a clip's tokens are conditioned on.

    Attributes:
        c: the sum of what norms are modulated by, c + t.
        text: keys, as `dense_attention` takes them; nothing where there are none.
        tokens: extra ones, if any.
        there: which of those there are.
    """

    c: np.ndarray
    text: dict[str, np.ndarray]
    tokens: np.ndarray | None = None
    there: np.ndarray | None = None


def keys(tokens, there):
    return {"text": tokens[None, None], "text_mask": there[None, None]}


@dataclasses.dataclass(frozen=True)
class Twin:
    """One clip's way through the denoiser.

    Attributes:
        params: the denoiser's, in 64 bits.
        config: its config.
        bounds: the largest grid it knows.
        grid: the clip's.
        noisy: its tokens [n, p].
        time: its time.
        condition: its own part of a `Condition`.
        estimate: [n, p], with self-conditioning.
    """

    params: dict[str, Any]
    config: DenoiserConfig
    bounds: tuple[int, int, int]
    grid: tuple[int, int, int]
    noisy: np.ndarray
    time: np.ndarray
    condition: Condition
    estimate: np.ndarray | None

    @functools.cached_property
    def places(self):
        return np.array(list(np.ndindex(*self.grid)))

    @property
    def tokens(self):
        return len(self.places)

    def output(self):
        config, extra = self.config, self.conditioned.tokens
        x = self.inputs() + self.positions
        if extra is not None:
            x = np.concatenate([x, extra])
        skips, count, late = [], config.layers // len(config.block_windows), config.positions == "sincos"
        for cycle, blocks in enumerate(cycles(self.params, config)):
            for index, windows in enumerate(config.block_windows):
                time, params = None, blocks[f"block{index}"]
                if late and any(window.time != 1 for window in windows):
                    time, late = fixed(self.places[:, 0], config.dim), False
                    if config.block != "stdit":
                        x[: self.tokens] += time
                if "skip" in params:
                    x = linear(params["skip"], np.concatenate([x, skips.pop()], -1))
                first = cycle == index == 0
                x = getattr(self, config.block)(params, windows, x, first=first, time=time)
            if config.block == "uvit" and cycle < count // 2:
                skips.append(x)
        assert not skips
        x = linear(self.params["patch_out"], self.last_norm(x[: self.tokens]))
        return upscaled(self.params["conv_out"], x.reshape(*self.grid, -1), 1) if config.output_conv else x

    def inputs(self):
        config, condition, parts = self.config, self.condition, [self.noisy]
        if config.self_conditioning:
            parts.append(self.estimate)
        if config.frame_prediction and config.block == "vdt":
            parts[0] = np.where(condition.observed_mask > 0, condition.observed, self.noisy)
        elif config.frame_prediction:
            parts += [condition.observed, condition.observed_mask]
        if config.upscale > 1:
            parts.append(upscaled(self.params["upscale"], condition.low_res, config.upscale))
        return linear(self.params["patch_in"], np.concatenate(parts, -1))

    @functools.cached_property
    def positions(self):
        config, params, (t, y, x) = self.config, self.params, self.places.T
        if config.positions == "learned":
            return params["space_embedding"][0, y, x] + params["time_embedding"][t, 0, 0]
        if config.positions == "sincos":
            return np.concatenate([fixed(x, config.dim // 2), fixed(y, config.dim // 2)], -1)
        if config.positions == "fractional":
            fractions, out = (self.places + 0.5) / self.grid, 0
            for axis, name in enumerate("tyx"):
                rows = [waves(64 * fraction, 64) for fraction in fractions[:, axis]]
                out = out + linear(params[f"position_{name}"], np.stack(rows))
            return out
        return np.zeros((self.tokens, config.dim))

    def clock(self, params, name, time):
        """Two layers on the waves of a time."""
        last = 127 if name == "time" and self.config.time_frequencies == "diffusers" else 128
        return linear(params[f"{name}_out"], swish(linear(params[f"{name}_in"], waves(1000 * time.item(), 256, last))))

    @functools.cached_property
    def conditioned(self):
        config, params, condition = self.config, self.params, self.condition
        single = config.block == "stdit" or (config.block == "latte" and config.cross_attention)
        if config.block == "uvit":
            embedded = [waves(1000 * self.time.item(), config.dim)]
        else:
            embedded = [self.clock(params, "time", self.time)]
        if config.classes:
            embedded.append(params["label_embedding"][condition.label.item()])
        tokens, there = np.empty((0, config.dim)), np.empty(0, bool)
        if condition.text is not None:
            tokens, there = linear(params["text_in"], condition.text), condition.text_mask
            if single:
                tokens = linear(params["text_out"], gelu(tokens))
        if config.condition_by != "norm":
            tokens = np.concatenate([np.stack(embedded) + params["token_embedding"], tokens])
            there = np.concatenate([np.ones(len(embedded), bool), there])
            if config.condition_by == "cross":
                return Conditioned(sum(embedded), keys(tokens, there))
            return Conditioned(sum(embedded), {}, tokens, there)

        c, text = sum(embedded), {} if condition.text is None else keys(tokens, there)
        if text and not single:
            c = c + linear(params["text_pooled"], tokens[there].sum(0) / max(1, there.sum()))
        if config.upscale > 1:
            c = c + self.clock(params, "low_res_time", condition.low_res_time)
        return Conditioned(c, text)

    def vectors(self, values):
        return list(values.reshape(-1, self.config.dim))

    def mlp(self, params, x, activation=gelu):
        return linear(params["mlp_out"], activation(linear(params["mlp_in"], x)))

    # The papers' blocks

    def walt(self, params, windows, x, **_):
        c = self.conditioned.c
        if self.config.adaln_rank:
            # A_i = A_1 + W_b W_a (c + t)
            a = linear(self.params["adaln"], swish(c)) + linear(params["adaln_b"], linear(params["adaln_a"], c))
        else:
            a = linear(params["adaln"], swish(c))
        gamma_1, beta_1, alpha_1, gamma_2, beta_2, alpha_2 = self.vectors(a)
        x = x + alpha_1 * self.attention(params["self_attention"], modulated(x, gamma_1, beta_1), windows)
        if self.config.cross_attention:
            x = x + self.cross_attention(params, plain_norm(x), Window(1, None, None))
        return x + alpha_2 * self.mlp(params, modulated(x, gamma_2, beta_2))

    def dit(self, params, windows, x, first, **_):
        config, c = self.config, self.conditioned.c
        if config.conditioning in ("in_context", "cross_attention"):
            x = x + self.attention(params["self_attention"], own_norm(params["self_attention_norm"], x), windows)
            if config.conditioning == "cross_attention":
                x = x + self.cross_attention(params, own_norm(params["cross_norm"], x))
            return x + self.mlp(params, own_norm(params["mlp_norm"], x))
        if config.embedders_per_block and not first:
            c = self.clock(params, "time", self.time) + params["label_embedding"][self.condition.label.item()]
        values = self.vectors(linear(params["adaln"], swish(c)))
        if config.conditioning == "adaln":
            values = [*values[:2], 1, *values[2:], 1]
        gamma_1, beta_1, alpha_1, gamma_2, beta_2, alpha_2 = values
        x = x + alpha_1 * self.attention(params["self_attention"], modulated(x, gamma_1, beta_1), windows)
        if config.cross_attention:
            x = x + self.cross_attention(params, plain_norm(x))
        return x + alpha_2 * self.mlp(params, modulated(x, gamma_2, beta_2))

    def uvit(self, params, windows, x, **_):
        x = x + self.attention(params["self_attention"], own_norm(params["self_attention_norm"], x, 1e-5), windows)
        return x + self.mlp(params, own_norm(params["mlp_norm"], x, 1e-5), exact_gelu)

    def latte(self, params, windows, x, **_):
        config, c = self.config, self.conditioned.c
        if config.cross_attention:
            values = self.vectors(linear(self.params["adaln"], swish(c)) + params["adaln_table"])
        else:
            values = self.vectors(linear(params["adaln"], swish(c)))
        if config.split == "attentions":
            for name, window in zip(("self_attention", "self_attention_1"), windows, strict=True):
                gamma, beta, alpha, *values = values
                x = x + alpha * self.attention(params[name], modulated(x, gamma, beta), (window,))
        else:
            gamma, beta, alpha, *values = values
            x = x + alpha * self.attention(params["self_attention"], modulated(x, gamma, beta), windows)
        if config.cross_attention and (config.split != "blocks" or windows[0].time == 1):
            x = x + self.cross_attention(params, x)
        gamma, beta, alpha = values
        return x + alpha * self.mlp(params, modulated(x, gamma, beta))

    def vdt(self, params, windows, x, **_):
        gamma_1, beta_1, alpha_1, gamma_2, beta_2, alpha_2 = self.vectors(
            linear(params["adaln"], swish(self.conditioned.c))
        )
        time, frame = windows
        h = self.attention(params["temporal_attention"], own_norm(params["temporal_norm"], x, 1e-5), (time,))
        x = x + linear(params["temporal_out"], h)
        x = x + alpha_1 * self.attention(params["self_attention"], modulated(x, gamma_1, beta_1), (frame,))
        if self.config.cross_attention:
            x = x + self.cross_attention(params, plain_norm(x))
        return x + alpha_2 * self.mlp(params, modulated(x, gamma_2, beta_2))

    def stdit(self, params, windows, x, time, **_):
        gamma_1, beta_1, alpha_1, gamma_2, beta_2, alpha_2 = self.vectors(
            linear(self.params["adaln"], swish(self.conditioned.c)) + params["adaln_table"]
        )
        frame, column = windows
        x = x + alpha_1 * self.attention(params["self_attention"], modulated(x, gamma_1, beta_1), (frame,))
        h = x if time is None else x + time
        x = x + alpha_1 * self.attention(params["temporal_attention"], h, (column,))
        if self.config.cross_attention:
            x = x + self.cross_attention(params, x)
        return x + alpha_2 * self.mlp(params, modulated(x, gamma_2, beta_2))

    def attention(self, params, x, windows):
        """Self-attention; with heads divided among the windows, what each part of them makes, added."""
        config, conditioned, tokens, out = self.config, self.conditioned, self.tokens, 0
        heads, width = config.heads // len(windows), config.dim // len(windows)
        where = places_of([[self.grid]], tokens)
        extra = {} if conditioned.tokens is None else keys(x[tokens:], conditioned.there)
        for number, window in enumerate(windows):
            part = slice(number * width, (number + 1) * width)
            own = {name: leaf for name, leaf in params.items() if name.endswith("_norm")}
            for name in ("query", "key", "value"):
                own[name] = {kind: leaf[..., part] for kind, leaf in params[name].items()}
            own["out"] = {"kernel": params["out"]["kernel"][part]}
            if config.relative == "bias":
                own["relative_bias"] = params[f"relative_bias_{number}" if number else "relative_bias"]
            sees = seen([[self.grid]], window, tokens, config.isolate_images)
            bounds = window.bounds(self.bounds)
            y = dense_attention(own, x[None, :tokens], where, sees, bounds, heads, config.relative, **extra)[0]
            if extra:
                all_see = np.concatenate([np.ones(tokens, bool), conditioned.there])[None, None].repeat(len(x), 1)
                y = np.concatenate([y, dense_attention(own, x[None], None, all_see, None, heads, "none")[0][tokens:]])
            out = out + y
        return out + params["out"].get("bias", 0)

    def cross_attention(self, params, x, window=None):
        """To text, and to the tokens of a window."""
        config, text, attention = self.config, self.conditioned.text, params["cross_attention"]
        where, bounds, relative = places_of([[self.grid]], self.tokens), None, "none"
        sees = np.zeros((1, self.tokens, self.tokens), bool)
        if window is not None:
            sees, bounds = seen([[self.grid]], window, self.tokens), window.bounds(self.bounds)
            relative = config.relative
        elif not text["text_mask"].any():
            return attention["out"].get("bias", 0)
        return dense_attention(attention, x[None], where, sees, bounds, config.heads, relative, **text)[0]

    def last_norm(self, x):
        params, config, c = self.params, self.config, self.conditioned.c
        if config.condition_by != "norm":
            return own_norm(params["norm_out"], x, 1e-5 if config.block == "uvit" else 1e-6)
        if "adaln_out_table" in params:
            scale, shift = c + params["adaln_out_table"].reshape(2, -1)
        else:
            scale, shift = np.split(linear(params["adaln_out"], swish(c)), 2)
        return modulated(x, scale, shift)


def twin(params, config, bounds, grid, noisy, time, condition, estimate):
    """The denoiser's answer [n, p] for one clip, see `Twin`."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return Twin(params, config, bounds, grid, noisy, time, condition, estimate).output()
