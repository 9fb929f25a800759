"""Other tokenizers on the clips of `configs/tokenizer_clips.py`: as many latents, parameters, clips a step and minutes.

    pip install -e ".[race]"
    python benchmarks/race_tokenizers.py plain --data=FOLDER --steps=500 --out=plain.json

- `plain`: a 3-D convolutional autoencoder as one writes it down: strided convolutions, transposed ones, SiLU, group
  norm, residual blocks, mean squared error; 5 × 8 × 8 latents of 16 channels for 17 × 64 × 64 pixels.
- `magvit2-lfq`, `magvit2-fsq`: magvit2-pytorch 0.5.1's VideoTokenizer, of as many codes as our heads have, without its
  discriminator and its perceptual loss, which needs weights to be downloaded.

All learn with AdamW under a warm-up and a cosine, as PyTorch's users do. Held-out clips and figures are those of
`--mode=evaluate`. With `--minutes` the schedule is that of the steps that fit, timed beforehand.
"""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable

import numpy as np
import torch
import tqdm
from torch import nn
from torch.nn import functional as F

from walt_jax.data.batches import Batches
from walt_jax.data.pipeline import Clips, Data, DataConfig
from walt_jax.data.shapes import ClipShape
from walt_jax.evaluation.reconstruction import psnr_db, ssim

FRAMES, SIDE, CHANNELS, CLIPS, EVALUATION_SEED = 17, 64, 16, 64, 1234
WARMUP, TIMED_STEPS = 50, 10
LEARNING_RATES = {"plain": 1e-3, "magvit2-lfq": 3e-4, "magvit2-fsq": 3e-4}


class Residual(nn.Module):
    """Two 3 × 3 × 3 convolutions added to the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(6, width),
            nn.SiLU(),
            nn.Conv3d(width, width, 3, padding=1),
            nn.GroupNorm(6, width),
            nn.SiLU(),
            nn.Conv3d(width, width, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Plain(nn.Module):
    """1 + 4k frames to 1 + k latent frames, eighths of height and width, and back."""

    def __init__(self, width: int = 42):
        super().__init__()
        sizes = [((1, 2, 2), width, width), ((2, 2, 2), width, 2 * width), ((2, 2, 2), 2 * width, 2 * width)]
        encoder: list[nn.Module] = [nn.Conv3d(3, width, 3, padding=1)]
        decoder: list[nn.Module] = [nn.Conv3d(width, 3, 3, padding=1)]
        for stride, before, after in sizes:
            # Odd in time, so that 17 frames become 9 and 5, and 17 again.
            kernel = (3, 4, 4)
            encoder += [nn.Conv3d(before, after, kernel, stride, padding=1), Residual(after)]
            decoder = [Residual(after), nn.ConvTranspose3d(after, before, kernel, stride, padding=1), *decoder]
        self.encoder = nn.Sequential(*encoder, nn.Conv3d(2 * width, CHANNELS, 1))
        self.decoder = nn.Sequential(nn.Conv3d(CHANNELS, 2 * width, 1), *decoder)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(video))


def make(name: str) -> tuple[nn.Module, Callable, Callable]:
    """The model, its loss of a video, and its reconstruction of one; videos are [b, 3, t, h, w] in -1..1."""
    if name == "plain":
        model = Plain()
        return model, lambda video: F.mse_loss(model(video), video), model
    from magvit2_pytorch import VideoTokenizer

    quantizer = {"codebook_size": 2**18} if name == "magvit2-lfq" else {"use_fsq": True, "fsq_levels": [8] * 6}
    model = VideoTokenizer(
        image_size=SIDE,
        init_dim=64,
        layers=(
            "residual",
            ("compress_space", 64),
            "residual",
            ("compress_space", 128),
            ("compress_time", 128),
            "residual",
            ("compress_space", 128),
            ("compress_time", 128),
            "residual",
        ),
        use_gan=False,
        perceptual_loss_weight=0.0,
        **quantizer,
    )
    return model, lambda video: model(video, return_loss=True)[0], lambda video: model(video, return_recon=True)


def main() -> None:
    """Trains one tokenizer and measures it; see above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=LEARNING_RATES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--batch_size", type=int, default=2)
    flags = parser.parse_args()
    if (flags.steps is None) == (flags.minutes is None):
        parser.error("give --steps or --minutes")

    torch.manual_seed(0)
    data = Data(DataConfig(source=flags.data, frames=FRAMES, height=SIDE, width=SIDE, max_bad_fraction=0.2))
    shapes = (ClipShape(FRAMES, SIDE, SIDE),)
    model, loss_of, reconstruct = make(flags.model)
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{flags.model}: {params:,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    peak = LEARNING_RATES[flags.model]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    iterator = iter(Batches(Clips(data.source("train", shapes), seed=0), (flags.batch_size,)))

    def step() -> float:
        video = torch.from_numpy(next(iterator)["video"]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        optimizer.zero_grad()
        loss = loss_of(video)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def set_rate(fraction: float, done: int) -> None:
        rate = peak * min(1, done / WARMUP) * (0.02 + 0.98 * (1 + math.cos(math.pi * fraction)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate

    set_rate(0, 1)
    step()
    began = time.perf_counter()
    for _ in range(TIMED_STEPS):
        step()
    seconds = (time.perf_counter() - began) / TIMED_STEPS
    steps = flags.steps or round(60 * flags.minutes / seconds)
    losses = []
    for done in tqdm.tqdm(range(steps), desc=flags.model, unit="step"):
        set_rate(done / steps, done + 1)
        losses.append(step())

    source = data.source("held_out", shapes)
    chosen = (source.sample(i, np.random.default_rng([EVALUATION_SEED, i])) for i in range(min(CLIPS, len(source))))
    clips = [clip["video"] for clip in chosen if clip is not None]
    model.eval()
    rows = []
    with torch.no_grad():
        for clip in clips:
            video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            output = reconstruct(video)[0].permute(1, 2, 3, 0).clamp(-1, 1).numpy()
            output = np.round((output + 1) * 127.5).astype(np.uint8)
            rows.append((psnr_db(clip, output), ssim(clip, output)))
    psnr, similarity = np.mean(rows, axis=0)
    result = {
        "model": flags.model,
        "parameters": params,
        "steps": steps,
        "step_seconds": seconds,
        "last_loss": float(np.mean(losses[-20:])),
        "held_out_clips": len(rows),
        "psnr_db": float(psnr),
        "ssim": float(similarity),
        "torch": torch.__version__,
    }
    flags.out.write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
