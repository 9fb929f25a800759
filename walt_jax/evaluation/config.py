"""How much of a run is measured."""

import dataclasses

from walt_jax.config import Positive
from walt_jax.evaluation.detector_weights import NETWORKS
from walt_jax.evaluation.distances import PROTOCOLS
from walt_jax.evaluation.paper_protocols import PAPER_PROTOCOLS


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How much is measured.

    Attributes:
        clips: at most this many unseen clips are reconstructed, a random window and crop of each.
        samples_per_prompt: videos sampled for each prompt. Prompts are the 72 captions of the drawn clips, or the
            held-out captions of a folder.
        prompts: at most this many captions of a folder are sampled; for super-resolution, at most this many clips are
            upscaled.
        perceptual_weights: a safetensors file for LPIPS, see `tokenizer.perceptual`; without it there is no LPIPS.
        seed: of windows and crops; samples have the seeds 0, 1, ….
        distances: of reconstructions from their originals: names of `distances.PROTOCOLS`, such as "fvd_tf1" for rFVD
            and "fid_tf1" for rFID. Where there are no weights of a network, a stand-in is measured and named.
        weights: files of networks, see `detector_weights`: `i3d`, `inception` and `vjepa` of the distances; with `clip`
            samples have a CLIP score, with `c3d` an inception score.
        protocols: the papers' whose numbers the config states, see `paper_protocols`; `--mode=evaluate` measures them,
            training does not.
        protocol_samples: generated in place of a protocol's count, for a quick look; 0 is the protocol's.
        references: folder for features of real clips, which runs can share; the workdir's `references` if not set.
        validation_clips: how many unseen clips a stage with `validate_every` measures.
        validation_samples: videos that a denoiser's stage with `validate_every` samples for `distances`; 0 is none.
    """

    clips: Positive
    samples_per_prompt: Positive = 1
    prompts: Positive = 16
    perceptual_weights: str = ""
    seed: int = 1234
    distances: tuple[str, ...] = ()
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    protocols: tuple[str, ...] = ()
    protocol_samples: int = 0
    references: str = ""
    validation_clips: Positive = 16
    validation_samples: int = 0

    def __post_init__(self):
        for knob, names, known in (
            ("distances", self.distances, PROTOCOLS),
            ("protocols", self.protocols, PAPER_PROTOCOLS),
            ("weights", self.weights, NETWORKS),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"{knob} names {name!r}; choose of {', '.join(known)}")
        if self.protocol_samples == 1:
            raise ValueError("protocol_samples is 1; a distance needs two samples at least")
        if self.validation_samples == 1:
            raise ValueError("validation_samples is 1; a distance needs two samples at least")
