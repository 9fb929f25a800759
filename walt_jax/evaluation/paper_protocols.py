"""How papers measured the numbers that configs state, by name.

What a paper leaves open is filled in here, and `open` says so: it stands beside each number.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class PaperProtocol:
    """A way of measuring.

    Attributes:
        name: of `--protocol`.
        paper: who measures this way, and what it found.
        kind: "class" samples each class in turn; "prediction" observes the first frames of real clips; "reconstruction"
            encodes and decodes real clips.
        samples: in each fold.
        folds: disjoint sets of samples; the number is their mean.
        real: how many real clips; None is each clip of the split `windows` times.
        split: of the real clips: "train" or "held_out".
        windows: of each real clip, drawn at random.
        frames: that are measured, the first ones of a sample.
        clip: (frames, height, width) of a sample.
        observed: frames of a sample that are the real clip's.
        measured: height and width that samples and real clips are shrunk to first; None leaves them.
        distances: names of `distances.PROTOCOLS`.
        steps, guidance: of sampling in the paper; None where it is not stated, or nothing is sampled.
        open: what is chosen here, because the paper does not say.
    """

    name: str
    paper: str
    kind: Literal["class", "prediction", "reconstruction"]
    samples: int
    folds: int
    real: int | None
    split: Literal["train", "held_out"]
    frames: int
    clip: tuple[int, int, int]
    distances: tuple[str, ...]
    windows: int = 1
    observed: int = 0
    measured: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    open: str = ""


PAPER_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        PaperProtocol(
            "ucf101_walt",
            "W.A.L.T's UCF-101 FVD (L 46 ± 2, XL 36 ± 2), by MAGVIT's protocol",
            kind="class",
            samples=10_000,
            folds=4,
            real=10_000,
            split="train",
            frames=16,
            clip=(17, 128, 128),
            distances=("fvd_tf1",),
            steps=50,
            guidance=1.0,
            open="W.A.L.T does not restate MAGVIT's protocol: 4 × 10,000 samples of 16 frames against training clips; "
            "classes in turn, one set of 10,000 real clips for all folds and the first 16 of 17 frames are chosen here",
        ),
        PaperProtocol(
            "k600_walt",
            "W.A.L.T's Kinetics-600 frame prediction FVD (L 3.3 ± 0.0), by MAGVIT's protocol",
            kind="prediction",
            samples=50_000,
            folds=4,
            real=None,
            windows=6,
            split="held_out",
            frames=16,
            clip=(17, 128, 128),
            observed=5,
            measured=(64, 64),
            distances=("fvd_tf1",),
            steps=50,
            open="MAGVIT takes 2 windows in time × 3 in space of each evaluation video, here 6 are random; the "
            "observed frames count as generated ones; the first 16 of 17 frames are measured; W.A.L.T does not state "
            "its guidance",
        ),
        PaperProtocol(
            "imagenet_50k",
            "FID-50K of ImageNet 256 × 256 by class (W.A.L.T 2.56, inception score 215.1; DiT-XL/2 2.27, 278.2)",
            kind="class",
            samples=50_000,
            folds=1,
            real=None,
            split="train",
            frames=1,
            clip=(1, 256, 256),
            distances=("fid_tf1",),
            open="Classes in turn, 50 images each of 1000; W.A.L.T does not name its evaluation suite, here ADM's "
            "resizing and all training images, cut to squares as in training",
        ),
        PaperProtocol(
            "rfvd_ucf",
            "MAGVIT-v2's reconstruction FVD on UCF-101 (8.62)",
            kind="reconstruction",
            samples=10_000,
            folds=1,
            real=10_000,
            split="train",
            frames=16,
            clip=(17, 128, 128),
            distances=("fvd_tf1",),
            open="The paper states neither split nor count: 10,000 windows of training clips against themselves, "
            "the first 16 of 17 frames",
        ),
    )
}
