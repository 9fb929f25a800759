"""CLIP score: how well pictures and videos fit their captions (Hessel et al. 2021; of video, Wu et al. 2021)."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image

from walt_jax.data.listing import TABLES, read_table
from walt_jax.errors import UserError
from walt_jax.evaluation.clip_network import Clip, embed_pictures, embed_texts, read_clip_config, weights_from
from walt_jax.evaluation.clip_tokens import ClipTokens
from walt_jax.evaluation.detector_weights import find_weights
from walt_jax.evaluation.feature_protocol import Clip as Frames
from walt_jax.evaluation.feature_protocol import FeatureProtocol, Prepared
from walt_jax.evaluation.features import Detector
from walt_jax.weight_files import read_tensors

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
FILES = ("model.safetensors", "pytorch_model.bin")
TEXTS = 64  # captions at once


def prepare(frames: Frames, side: int = 224) -> Prepared:
    """As CLIP's processor: the short side to `side` by PIL's bicubic interpolation, then the centre."""
    shortest = min(frames.shape[1:3])
    height, width = (int(side * length / shortest) for length in frames.shape[1:3])
    top, left = (height - side) // 2, (width - side) // 2
    resized = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))[
            top : top + side, left : left + side
        ]
        for frame in frames
    ]
    return (np.stack(resized).astype(np.float32) / 255 - MEAN[None, None, None]) / STD[None, None, None]


CLIP_RESIZE = "short side to the network's by PIL's bicubic interpolation, centre crop"


@dataclasses.dataclass(frozen=True)
class ClipScorer:
    """Scores the files of a folder by their captions.

    Attributes:
        clip: the network.
        tokens: of captions.
        captions: of each file, by its name in the folder.
        detector: embeddings of frames.
        protocol: how frames are prepared.
    """

    clip: Clip
    tokens: ClipTokens
    captions: Mapping[str, str]
    detector: Detector
    protocol: FeatureProtocol

    @classmethod
    def find(cls, weights: Mapping[str, str], videos: pathlib.Path | Mapping[str, str]) -> "ClipScorer | None":
        """What scores videos; None where the user gives no weights of CLIP.

        Args:
            weights: the user's; "clip" is a folder as transformers saves a CLIP.
            videos: a folder with captions, see `captions_of`; or the captions by the videos' names.

        Raises:
            UserError: if the weights or the captions can't be read.
        """
        folder = find_weights("clip", weights)
        if folder is None:
            return None
        if not folder.is_dir():
            raise UserError(
                f"--weights=clip={folder} is no folder; name one with config.json, model.safetensors, vocab.json and "
                "merges.txt, as transformers saves a CLIP."
            )
        captions = captions_of(videos) if isinstance(videos, pathlib.Path) else videos
        file = next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
        tensors, digest = read_tensors(file)
        clip = weights_from(tensors, read_clip_config(folder), str(file))
        tokens = ClipTokens.load(folder, clip.length)

        @jax.jit
        def compute(weights: Any, pictures: Any) -> Any:
            return embed_pictures(clip.vision._replace(weights=weights), pictures[:, 0])

        width = clip.vision.weights["projection"].shape[1]
        detector = Detector(f"CLIP {clip.name}", digest, width, 1, functools.partial(compute, clip.vision.weights))
        protocol = FeatureProtocol(
            "clip", "clip", functools.partial(prepare, side=clip.side), CLIP_RESIZE, 0, "torchmetrics; CLIPSIM"
        )
        return cls(clip, tokens, captions, detector, protocol)

    def text_features(self, captions: list[str]) -> Float[np.ndarray, "n d"]:
        """Embeddings of captions."""
        embed = jax.jit(lambda weights, ids: embed_texts(self.clip.text._replace(weights=weights), ids))
        found = []
        for first in range(0, len(captions), TEXTS):
            some = captions[first : first + TEXTS]
            ids = self.tokens.encode(some + [""] * (TEXTS - len(some)))  # padded, so that one shape is compiled
            found.append(np.asarray(embed(self.clip.text.weights, ids))[: len(some)])
        return np.concatenate(found)

    def metric(self, features: Mapping[str, Float[np.ndarray, "t d"]], cut: str) -> list[dict[str, Any]]:
        """The score of files that have a caption.

        Args:
            features: of each file's frames.
            cut: which frames these are.
        """
        names = [name for name in features if name in self.captions]
        distinct = list(dict.fromkeys(self.captions[name] for name in names))
        if not names:
            return []
        texts = dict(zip(distinct, self.text_features(distinct), strict=True))
        scores = [100 * float((features[name] @ texts[self.captions[name]]).mean()) for name in names]
        frames = len(features[names[0]])
        return [
            {
                "name": "clip_score",
                "value": max(0.0, float(np.mean(scores))),
                "unit": "",
                "protocol": f"100 · cosine of picture and caption, mean over {len(names)} files with captions and each "
                f"one's {frames} frames ({cut}), at least 0; {CLIP_RESIZE}; {self.detector.name}, weights of SHA-256 "
                f"{self.detector.sha256[:12]}…. Scores of other CLIPs are not comparable",
                "count": len(names),
                "frames": frames,
                "resize": CLIP_RESIZE,
                "detector": self.detector.name,
                "detector_sha256": self.detector.sha256,
            }
        ]


def captions_of(folder: pathlib.Path) -> dict[str, str]:
    """The caption of each file of a folder: of `samples.json`, else of `metadata.csv` or `.jsonl`.

    Raises:
        UserError: if there is no such file, or it has no captions.
    """
    path = folder / "samples.json"
    if path.is_file():
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return {str(row["file"]): str(row["prompt"]) for row in rows if row["prompt"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path} can't be read ({error!r}); it is a list of objects with file and prompt."
            ) from error
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        raise UserError(
            f"CLIP score needs captions, and {folder} has none; write a metadata.csv with the columns file_name and "
            "caption, or leave --weights=clip out."
        )
    columns, rows = read_table(epath.Path(table))
    if not {"file_name", "caption"} <= set(columns):
        raise UserError(f"{table} has the columns {', '.join(columns)}; CLIP score needs file_name and caption.")
    return {str(row["file_name"]): str(row["caption"]) for row in rows if row.get("caption")}
