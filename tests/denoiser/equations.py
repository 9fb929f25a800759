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


def plain_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def own_norm(params, x):
    return plain_norm(x) * params["scale"] + params["bias"]


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


class Told(NamedTuple):
    """What a clip's tokens are told of its condition.

    Attributes:
        shared: by norms, c + t.
        text: to be looked at, as `dense_attention` takes it; nothing where it is empty.
        words: tokens beside the clip's own, if any.
        there: which of those there are.
    """

    shared: np.ndarray
    text: dict[str, np.ndarray]
    words: np.ndarray | None = None
    there: np.ndarray | None = None


def looked_at(words, there):
    return {"text": words[None, None], "text_mask": there[None, None]}


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
        config, told = self.config, self.told
        x = self.inputs() + self.positions
        if told.words is not None:
            x = np.concatenate([x, told.words])
        late, skips, count = config.positions == "sincos", [], config.layers // len(config.block_windows)
        for cycle, blocks in enumerate(cycles(self.params, config)):
            if config.skips and cycle > count // 2:
                x = linear(self.params[f"skip{cycle}"], np.concatenate([x, skips.pop()], -1))
            for index, windows in enumerate(config.block_windows):
                if late and any(window.time != 1 for window in windows):
                    x[: self.tokens] += fixed(self.places[:, 0], config.dim)
                    late = False
                x = self.block(blocks[f"block{index}"], windows, x, first=cycle == index == 0)
            if config.skips and cycle < count // 2:
                skips.append(x)
        x = linear(self.params["patch_out"], self.last_norm(x[: self.tokens]))
        return upscaled(self.params["conv_out"], x.reshape(*self.grid, -1), 1) if config.output_conv else x

    def inputs(self):
        config, condition, parts = self.config, self.condition, [self.noisy]
        if config.self_conditioning:
            parts.append(self.estimate)
        if config.frame_prediction and config.observed_as == "channels":
            parts += [condition.observed, condition.observed_mask]
        elif config.observed_as == "place":
            parts[0] = np.where(condition.observed_mask > 0, condition.observed, self.noisy)
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
    def told(self):
        config, params, condition = self.config, self.params, self.condition
        given = [self.clock(params, "time", self.time)]
        if config.classes:
            given.append(params["label_embedding"][condition.label.item()])
        words, there = np.empty((0, config.dim)), np.empty(0, bool)
        if condition.text is not None:
            words, there = linear(params["text_in"], condition.text), condition.text_mask
            if config.adaln == "single":
                words = linear(params["text_out"], gelu(words))
        if config.condition_by != "norm":
            words = np.concatenate([np.stack(given) + params["word_embedding"], words])
            there = np.concatenate([np.ones(len(given), bool), there])
            if config.condition_by == "cross":
                return Told(sum(given), looked_at(words, there))
            return Told(sum(given), {}, words, there)

        shared, text = sum(given), {} if condition.text is None else looked_at(words, there)
        if text and config.adaln != "single":
            shared = shared + linear(params["text_pooled"], words[there].sum(0) / max(1, there.sum()))
        if config.upscale > 1:
            shared = shared + self.clock(params, "low_res_time", condition.low_res_time)
        if config.observed_as in ("norm", "cross"):
            observed, are = linear(params["observed_in"], condition.observed), condition.observed_mask[:, 0] > 0
            if config.observed_as == "cross":
                text = looked_at(observed + self.positions, are)
            else:
                shared = shared + observed[are].sum(0) / max(1, are.sum())
        return Told(shared, text)

    def modulation(self, block, first):
        """What a block's norms are told, one after the other."""
        config, shared = self.config, swish(self.told.shared)
        if config.adaln == "none":
            return []
        if config.adaln == "lora":
            # A_i = A_1 + W_b W_a (c + t)
            values = linear(self.params["adaln"], shared) + linear(block["adaln_b"], linear(block["adaln_a"], shared))
        elif config.adaln == "single":
            values = linear(self.params["adaln"], shared) + block["adaln_table"]
        else:
            if config.told_by == "each" and not first:
                label = block["label_embedding"][self.condition.label.item()]
                shared = swish(self.clock(block, "time", self.time) + label)
            values = linear(block["adaln"], shared)
        return list(values.reshape(-1, config.dim))

    def block(self, params, windows, x, first):
        config, values = self.config, self.modulation(params, first)

        def normed(x, name):
            """x, normalised and modulated, and its gate."""
            if config.adaln == "none":
                return own_norm(params[f"{name}_norm"], x), 1
            scale, shift = values.pop(0), values.pop(0)
            return plain_norm(x) * (1 + scale) + shift, values.pop(0) if config.gates else 1

        turns = [(window,) for window in windows] if config.split == "attentions" else [windows]
        for number, each in enumerate(turns):
            name = f"self_attention_{number}" if number else "self_attention"
            if config.modulated == "last" and number < len(turns) - 1:
                y = self.attention(params[name], own_norm(params[f"{name}_norm"], x), each)
                x = x + linear(params[f"{name}_out"], y)
                continue
            h, gate = normed(x, name)
            x = x + gate * self.attention(params[name], h, each)
        if config.cross and (config.cross_in == "all" or windows[0].time == 1):
            x = x + self.cross_attention(params, x)
        h, gate = normed(x, "mlp")
        x = x + gate * linear(params["mlp_out"], gelu(linear(params["mlp_in"], h)))
        assert not values
        return x

    def attention(self, params, x, windows):
        """Self-attention; with heads divided among the windows, what each part of them makes, added."""
        config, told, tokens, out = self.config, self.told, self.tokens, 0
        heads, width = config.heads // len(windows), config.dim // len(windows)
        where = places_of([[self.grid]], tokens)
        beside = {} if told.words is None else looked_at(x[tokens:], told.there)
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
            y = dense_attention(own, x[None, :tokens], where, sees, bounds, heads, config.relative, **beside)[0]
            if beside:
                all_see = np.concatenate([np.ones(tokens, bool), told.there])[None, None].repeat(len(x), 1)
                y = np.concatenate([y, dense_attention(own, x[None], None, all_see, None, heads, "none")[0][tokens:]])
            out = out + y
        return out + params["out"].get("bias", 0)

    def cross_attention(self, params, x):
        """To text and, as W.A.L.T has it, to the token's frame."""
        config, text, attention = self.config, self.told.text, params["cross_attention"]
        h = x if config.adaln == "single" else plain_norm(x)
        if config.adaln == "none":
            h = own_norm(params["cross_norm"], x)
        where, bounds, relative = places_of([[self.grid]], self.tokens), None, "none"
        sees = np.zeros((1, self.tokens, self.tokens), bool)
        if config.cross_keys == "joint":
            frame = Window(1, None, None)
            sees, bounds = seen([[self.grid]], frame, self.tokens), frame.bounds(self.bounds)
            relative = config.relative
        elif not text["text_mask"].any():
            return attention["out"].get("bias", 0)
        return dense_attention(attention, h[None], where, sees, bounds, config.heads, relative, **text)[0]

    def last_norm(self, x):
        params, config, shared = self.params, self.config, self.told.shared
        if config.adaln == "none":
            return own_norm(params["norm_out"], x)
        if config.adaln == "single":
            scale, shift = shared + params["adaln_out_table"].reshape(2, -1)
        else:
            scale, shift = np.split(linear(params["adaln_out"], swish(shared)), 2)
        return plain_norm(x) * (1 + scale) + shift


def twin(params, config, bounds, grid, noisy, time, condition, estimate):
    """The denoiser's answer [n, p] for one clip, see `Twin`."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return Twin(params, config, bounds, grid, noisy, time, condition, estimate).output()
