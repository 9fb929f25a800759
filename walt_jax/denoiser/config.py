"""What the denoisers of all papers have in common. Each family's own class is in the file of its block."""

import dataclasses
from typing import Annotated, Literal, NamedTuple

from flax.linen.initializers import lecun_normal, normal, variance_scaling, xavier_uniform, zeros

from walt_jax.config import Positive, Range
from walt_jax.denoiser.attention import Relative
from walt_jax.denoiser.layout import Grid
from walt_jax.denoiser.windows import Window
from walt_jax.layers import Initializer

WindowSizes = tuple[Positive | None, Positive | None, Positive | None]
FRAME, TIME = Window(1, None, None), Window(None, 1, 1)  # a frame; one place in all frames


class Inits(NamedTuple):
    """How kernels are drawn; `embedder` is for those of time and text. Papers that say nothing have LeCun's here."""

    hidden: Initializer = lecun_normal()
    qkv: Initializer = lecun_normal()
    embedder: Initializer = lecun_normal()
    label: Initializer = normal(0.02)
    output: Initializer = zeros


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """The denoiser's shape. `configs/` has those of the papers; `docs/siblings.md` lists them.

    Attributes:
        dim: width.
        heads: attention heads.
        layers: number of blocks.
        windows: (time, height, width) each, None for the whole axis: a window for each of the blocks one after the
            other, repeated until there are `layers`; or all for each block, see `split`.
        mlp_ratio: width of the MLP over `dim`, rounded to a whole width.
        patch_size: (time, height, width) of latent positions in a token (1, 1, 1 in W.A.L.T).
        positions: "learned" embeddings of space and time, summed (W.A.L.T); "sincos", fixed ones: space at the input,
            time in the first block that spans it (DiT, Latte); "fractional", NaViT's factorised ones of t, y and x over
            the clip's size; or "none".
        relative: in windows: "bias" for each offset (W.A.L.T), "rotary" in three dimensions, or "none".
        qk_norm: whether queries and keys are normalised.
        cross_attention: whether blocks attend to text.
        classes: number of labels; 0 for a model without.
        self_conditioning: whether the last estimate of the clean latents is concatenated with the noisy ones.
        frame_prediction: whether the input has the clean latents of observed positions.
        learned_sigma: whether the output also has v, which interpolates the sampler's variance (DiT).
        mean_velocity: whether the input also has the end of the sampler's step, and guidance's scale and interval; the
            output is then the mean velocity over the step, see `diffusion.alpha_flow`.
        isolate_images: identity attention for tokens of images in windows that span time (W.A.L.T).
        scan: whether one cycle of `windows` is compiled and scanned over, or all layers are compiled one after the
            other. Compiling deep models takes a fraction of the time when scanned; on CPU the backward pass of a scan
            takes twice the time.
        remat: what the forward pass saves for the backward pass, which recomputes the rest; from most to least memory:
            "none" saves all that gradients need; "dots" products with weights, and what a TPU's kernel returns of
            attention; "dots_on_host" products with weights, moved to the host's memory and back (TPUs and GPUs);
            "narrow" those products with weights that are no wider than their input, so not the MLP's hidden layer;
            "block" only what a cycle of blocks begins with.
        dtype: of the computation, "float32" or "bfloat16".
    """

    dim: Positive
    heads: Positive
    layers: Positive
    windows: tuple[WindowSizes, ...]
    mlp_ratio: Annotated[float, Range(0.01)] = 4.0
    patch_size: tuple[Positive, Positive, Positive] = (1, 1, 1)
    positions: Literal["learned", "sincos", "fractional", "none"] = "learned"
    relative: Relative = "bias"
    qk_norm: bool = True
    cross_attention: bool = True
    classes: int = 0
    self_conditioning: bool = True
    frame_prediction: bool = False
    learned_sigma: bool = False
    mean_velocity: bool = False
    isolate_images: bool = False
    scan: bool = False
    remat: Literal["none", "dots", "dots_on_host", "narrow", "block"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"

    # What a family is. Where a config chooses, the family's class has a knob or a property of the same name.
    split = "blocks"  # what `windows` are for: "blocks", a block's "attentions" or parts of its "heads"
    condition_by = "norm"  # how time and class enter: "norm" (adaLN), as extra "tokens" or keys of "cross"-attention
    shared_vectors = 0  # modulating vectors that one layer computes for all blocks
    single = False  # adaLN-single (PixArt-α): text passes two layers and does not enter the modulation
    embeds_time = True  # by two layers on sinusoids; sinusoids alone if not
    time_frequencies, embedders_per_block = "original", False
    time_in_attention = False  # whether blocks add the embedding of time themselves
    observed_as = "channels"  # concatenated with the mask to the noisy latents; "place": they replace noisy ones
    attention_bias = "none"  # of attention's layers: "none", "out" or "all"
    norm_epsilon = 1e-6
    inits = Inits()
    upscale = 1
    skips = output_conv = False

    def __post_init__(self):
        each = len(self.block_windows)
        if not self.windows or self.layers % each:
            raise ValueError(f"layers={self.layers} is not a multiple of the {each} windows")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        features = self.dim // self.heads
        if self.relative == "rotary" and (features % 2 or features < 6):
            raise ValueError(f"relative='rotary' turns pairs of features, at least 3; heads have {features} features")
        if self.positions == "sincos" and self.dim % 4:
            raise ValueError(f"positions='sincos' needs a dim that 4 divides, not {self.dim}")

    @property
    def block_windows(self) -> tuple[tuple[Window, ...], ...]:
        """The windows of each block of a cycle."""
        windows = tuple(Window(*window) for window in self.windows)
        return tuple((window,) for window in windows) if self.split == "blocks" else (windows,)

    @property
    def cycles(self) -> int:
        """How often the windows are repeated."""
        return self.layers // len(self.block_windows)

    @property
    def attention_windows(self) -> tuple[Window, ...]:
        """The windows that attention is computed in, each once."""
        return tuple(dict.fromkeys(Window(*window) for window in self.windows))

    @property
    def text_windows(self) -> tuple[Window, ...]:
        """Those in which tokens attend to their clip's text, or extra tokens, as well."""
        return self.attention_windows if self.condition_by == "tokens" else ()

    @property
    def text_alone(self) -> bool:
        """Whether tokens attend to their clip's text, or to other keys of it, apart from any window."""
        return self.condition_by == "cross" or (self.cross_attention and self.condition_by == "norm")

    @property
    def reads_text(self) -> bool:
        return self.cross_attention

    def grid(self, latents: tuple[int, int, int]) -> Grid:
        """Tokens along (t, h, w) of a clip of so many latent positions.

        Raises:
            ValueError: if `patch_size` does not divide them.
        """
        if any(length % size for length, size in zip(latents, self.patch_size, strict=True)):
            raise ValueError(f"patch_size {self.patch_size} does not divide latents of {latents}")
        t, h, w = (length // size for length, size in zip(latents, self.patch_size, strict=True))
        return t, h, w


@dataclasses.dataclass(frozen=True)
class DiTDefaults(DenoiserConfig):
    """What DiT has, and Latte, VDT and STDiT with it."""

    positions: Literal["sincos", "learned", "fractional", "none"] = "sincos"
    relative: Literal["none", "rotary"] = "none"
    qk_norm: bool = False
    self_conditioning: bool = False
    learned_sigma: bool = True

    attention_bias = "all"
    # Xavier's; for queries, keys and values that of one matrix for the three.
    inits = Inits(xavier_uniform(), variance_scaling(0.5, "fan_avg", "uniform"), normal(0.02))
