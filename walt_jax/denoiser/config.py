"""The denoiser's shape: what W.A.L.T and its siblings differ in."""

import dataclasses
from typing import Annotated, Literal

from walt_jax.config import Positive, Range
from walt_jax.denoiser.attention import Relative
from walt_jax.denoiser.layout import Grid
from walt_jax.denoiser.windows import Window

CROSS_WINDOW = Window(1, None, None)  # W.A.L.T's cross-attention is spatial, so that images and video share it


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """The denoiser's shape. `configs/` has those of the papers; `docs/siblings.md` says which knobs make which.

    Attributes:
        dim: width.
        heads: attention heads.
        layers: number of blocks.
        windows: (time, height, width) each, None for the whole axis, as `split` distributes them.
        split: where the windows go: "blocks", one after the other, repeated until there are `layers` (W.A.L.T, Latte
            1); "attentions", each block attends in all of them in turn (ViViT 3, VDT, Latte 3, STDiT); "heads", each
            block divides its heads among them (ViViT 4, Latte 4).
        mlp_ratio: width of the MLP over `dim`, rounded to a whole width.
        patch_size: (time, height, width) of latent positions in a token (1, 1, 1 in the paper).
        condition_by: how time and class, or text, are told: "norm", by modulating the normalisations (adaLN); "tokens",
            as tokens beside the clip's (DiT's in-context, U-ViT); "cross", as what a cross-attention looks at (DiT).
        adaln: how a block gets its modulation: "lora" (W.A.L.T); "separate", a layer of its own (DiT); "single", one
            for all, of time and class alone, and a learned table a block (PixArt-α, whose text goes through two layers
            and is looked at without a normalisation); "none": normalisations have a scale and shift of their own.
        adaln_rank: r of AdaLN-LoRA; 2 in the paper.
        gates: whether modulation also scales what a block adds, from zero on (adaLN-Zero).
        modulated: with split="attentions": "all" of a block's attentions, or the "last" alone (VDT).
        positions: "learned" embeddings of space and time, summed (W.A.L.T); "sincos", fixed ones: space at the input,
            time where attention first spans it (DiT, Latte); "fractional", NaViT's factorised ones of t, y and x over
            the clip's size; or "none".
        relative: in windows: "bias" for each offset (W.A.L.T), "rotary" in three dimensions, or "none".
        qk_norm: whether queries and keys are normalised.
        attention_bias: which of attention's layers have one: "none", "out", or "all".
        cross_attention: whether blocks attend to text.
        cross_in: which blocks do: "all", or those whose attention stays in "frames" (Latte's text-to-video).
        cross_keys: what cross-attention looks at: "joint", the frame and the text (W.A.L.T), or "text" alone (STDiT).
        classes: labels there are; 0 for a model without.
        self_conditioning: whether the input has the last estimate of the clean latents beside the noisy ones.
        frame_prediction: whether the input has clean latents where they are given.
        observed_as: how: "channels", beside the noisy ones with the mask that tells where (W.A.L.T); "place", in the
            place of the noisy ones (VDT; its "token concatenation"); "norm", their mean embedded for the norms;
            "cross", as keys of a cross-attention (VDT's other two).
        upscale: above 1, the input has low-resolution latents, upscaled so many times.
        time_frequencies: of the waves that tell the time: "original", 10000^(-i/n) for i < n (DiT); or "diffusers",
            whose DiT has 10000^(-i/(n-1)).
        told_by: whether "one" embedding of time and class is for all blocks, or "each" but the first has its own, as
            diffusers' class for DiT can have.
        learned_sigma: whether the output has, beside the prediction, how large the sampler's noise is (DiT).
        skips: whether each block of the second half also gets what the first half's had, in reverse order (U-ViT).
        output_conv: whether a 3 × 3 convolution over each frame's latents comes last (U-ViT).
        isolate_images: whether tokens of images see themselves alone where windows span time (W.A.L.T's identity mask).
        scan: whether one cycle of `windows` is compiled and scanned over, or all layers are compiled one after the
            other. Compiling deep models takes a fraction of the time when scanned; on CPU the backward pass of a scan
            takes twice the time.
        remat: what the backward pass computes again: "none", "dots" all but matrix products with weights, "block" a
            whole cycle of blocks.
        dtype: of the computation, "float32" or "bfloat16".
    """

    dim: Positive
    heads: Positive
    layers: Positive
    windows: tuple[tuple[Positive | None, Positive | None, Positive | None], ...]
    mlp_ratio: Annotated[float, Range(0.01)] = 4.0
    patch_size: tuple[Positive, Positive, Positive] = (1, 1, 1)
    split: Literal["blocks", "attentions", "heads"] = "blocks"
    condition_by: Literal["norm", "tokens", "cross"] = "norm"
    adaln: Literal["lora", "separate", "single", "none"] = "lora"
    adaln_rank: Positive = 2
    gates: bool = True
    modulated: Literal["all", "last"] = "all"
    positions: Literal["learned", "sincos", "fractional", "none"] = "learned"
    relative: Relative = "bias"
    qk_norm: bool = True
    attention_bias: Literal["none", "out", "all"] = "none"
    cross_attention: bool = True
    cross_in: Literal["all", "frames"] = "all"
    cross_keys: Literal["joint", "text"] = "joint"
    classes: int = 0
    self_conditioning: bool = True
    frame_prediction: bool = False
    observed_as: Literal["channels", "place", "norm", "cross"] = "channels"
    upscale: Positive = 1
    time_frequencies: Literal["original", "diffusers"] = "original"
    told_by: Literal["one", "each"] = "one"
    learned_sigma: bool = False
    skips: bool = False
    output_conv: bool = False
    isolate_images: bool = False
    scan: bool = False
    remat: Literal["none", "dots", "block"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        each = len(self.block_windows)
        if not self.windows or self.layers % each:
            raise ValueError(f"layers={self.layers} is not a multiple of the {each} windows")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        if self.split == "heads" and self.heads % len(self.windows):
            raise ValueError(f"split='heads': {len(self.windows)} windows do not divide heads={self.heads}")
        features = self.dim // self.heads
        if self.relative == "rotary" and (features % 2 or features < 6):
            raise ValueError(f"relative='rotary' turns pairs of features, at least 3; heads have {features} features")
        if self.adaln != "lora" and self.adaln_rank != DenoiserConfig.adaln_rank:
            raise ValueError("adaln_rank is for adaln='lora'")
        if (self.adaln == "none") != (self.condition_by != "norm"):
            raise ValueError(
                f"condition_by={self.condition_by!r} and adaln={self.adaln!r} don't go together: time is told by norms "
                "that are modulated, or else adaln is 'none'"
            )
        if self.modulated == "last" and self.split != "attentions":
            raise ValueError("modulated='last' is for split='attentions'")
        if self.cross_attention and self.condition_by != "norm":
            raise ValueError(f"condition_by={self.condition_by!r} tells text as well; set cross_attention=False")
        if self.cross_in != "all" and not self.cross_attention:
            raise ValueError("cross_in is for cross_attention")
        if self.cross_keys != "joint" and not self.cross:
            raise ValueError("cross_keys is for cross_attention, or condition_by='cross'")
        if self.observed_as != "channels" and not self.frame_prediction:
            raise ValueError("observed_as is for frame_prediction")
        if self.observed_as in ("norm", "cross") and self.condition_by != "norm":
            raise ValueError(f"observed_as={self.observed_as!r} goes with condition_by='norm'")
        if self.observed_as == "cross" and (self.cross_attention or self.cross_keys != "text"):
            raise ValueError("observed_as='cross' takes the cross-attention: cross_attention=False, cross_keys='text'")
        if self.upscale > 1 and self.condition_by != "norm":
            raise ValueError("upscale goes with condition_by='norm'")
        if self.told_by == "each" and (self.adaln != "separate" or self.scan):
            raise ValueError("told_by='each' is for adaln='separate' without scan")
        if self.skips and self.scan:
            raise ValueError("skips reach from block to block and can't be scanned: set scan=False")
        if self.skips and self.layers // each % 2 == 0:
            raise ValueError(f"skips need a block in the middle: {self.layers // each} times the windows is even")
        if self.output_conv and self.learned_sigma:
            raise ValueError("output_conv and learned_sigma exclude each other")
        if self.positions == "sincos" and self.dim % 4:
            raise ValueError(f"positions='sincos' needs a dim that 4 divides, not {self.dim}")

    @property
    def block_windows(self) -> tuple[tuple[Window, ...], ...]:
        """The windows of each block of a cycle."""
        windows = tuple(Window(*window) for window in self.windows)
        return tuple((window,) for window in windows) if self.split == "blocks" else (windows,)

    @property
    def cross(self) -> bool:
        """Whether blocks have a cross-attention."""
        return self.cross_attention or "cross" in (self.condition_by, self.observed_as)

    def cross_at(self, windows: tuple[Window, ...]) -> bool:
        """Whether the block with these windows has one."""
        return self.cross and (self.cross_in == "all" or all(window.time == 1 for window in windows))

    @property
    def attention_windows(self) -> tuple[Window, ...]:
        """The windows that attention is computed in, each once."""
        cross = (CROSS_WINDOW,) if self.cross and self.cross_keys == "joint" else ()
        return tuple(dict.fromkeys((*(Window(*window) for window in self.windows), *cross)))

    def grid(self, latents: tuple[int, int, int]) -> Grid:
        """Tokens along (t, h, w) of a clip of so many latent positions.

        Raises:
            ValueError: if `patch_size` does not divide them.
        """
        if any(length % size for length, size in zip(latents, self.patch_size, strict=True)):
            raise ValueError(f"patch_size {self.patch_size} does not divide latents of {latents}")
        t, h, w = (length // size for length, size in zip(latents, self.patch_size, strict=True))
        return t, h, w
