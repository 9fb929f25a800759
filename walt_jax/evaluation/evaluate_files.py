"""Measures folders of videos of any origin, for `--mode=evaluate --videos=FOLDER --reference=FOLDER`."""

import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from walt_jax.data.watchdog import Watchdog
from walt_jax.errors import UserError
from walt_jax.evaluation import video_quality
from walt_jax.evaluation.clip_score import ClipScorer
from walt_jax.evaluation.detector_weights import NETWORKS, find_weights
from walt_jax.evaluation.distances import PROTOCOLS, Reference, check_protocols, choose, compare
from walt_jax.evaluation.feature_protocol import FeatureProtocol
from walt_jax.evaluation.features import Detector, FeatureCache, compute_features, digest_of
from walt_jax.evaluation.paper_protocols import PAPER_PROTOCOLS
from walt_jax.evaluation.reconstruction import SSIM_WINDOW, psnr_db, ssim
from walt_jax.evaluation.video_files import VideoFolder, read_ahead
from walt_jax.evaluation.video_inception_score import C3D_PROTOCOL, find_c3d
from walt_jax.evaluation.video_inception_score import score as video_score
from walt_jax.generation.codec import to_float
from walt_jax.tokenizer.perceptual import SHORTEST_SIDE, feature_distance, load_features
from walt_jax.workdir import write_atomically

FRAMES = 16
FEWEST = 3  # frames: smoothness compares one with its neighbours
QUALITY = ("flicker", "smoothness", "dynamic_degree")
QUALITY_VERSION = "1"  # of their computation, for the cache

QUALITY_EXPLAINED = {
    "flicker": "(255 - mean absolute difference of successive frames) / 255, as VBench's temporal flickering, which is "
    "for static scenes only: motion lowers it too",
    "smoothness": "(255 - mean absolute error of each second frame, interpolated from its neighbours along optical "
    "flow) / 255, as VBench's motion smoothness but in gray, at most 128 pixels on the short side and with "
    "Lucas-Kanade flow where VBench has the network AMT",
    "dynamic_degree": "share of clips that move by VBench's rule at 8 frames a second, with Lucas-Kanade flow at most "
    "128 pixels on the short side where VBench has the network RAFT",
}


def evaluate_files(
    videos: pathlib.Path,
    reference: pathlib.Path | None,
    out: pathlib.Path,
    protocols: Sequence[str] = (),
    weights: Mapping[str, str] | None = None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Measures the videos, against the reference where there is one; writes `evaluate.json` and a cache of features.

    Folders of pictures are measured as images. Protocols of images measure each frame of videos alone.
    Videos and references with equal names but for the suffix are pairs if all names are: each pair's PSNR, SSIM and
    LPIPS are measured too. With weights of CLIP, videos are compared with their captions, see `clip_score`; with
    weights of C3D they have an inception score. A stopped
    command resumes; features of files with equal content are computed once.

    Args:
        videos, reference: folders.
        out: folder for `evaluate.json` and `features/`.
        protocols: of `distances.PROTOCOLS`; without any, `fvd_tf1`, of pictures `fid_tf1`, if there are weights of the
            network, else the stand-in.
        weights: files of networks' weights by their name, see `detector_weights.NETWORKS`.
        frames: of each clip that are measured, the first ones, every frame; by default 16, of pictures 1.

    Returns:
        What `evaluate.json` holds: {"metrics", "videos", "reference", "skipped", "pairs"}.

    Raises:
        UserError: if a folder, protocol or weights file is wrong, or no file of a folder can be measured.
    """
    weights = weights or {}
    for name in protocols:
        if name in PAPER_PROTOCOLS:
            raise UserError(f"--protocol={name} measures a trained run: name its --workdir, and leave out --videos.")
    check_protocols(protocols)
    if protocols and reference is None:
        raise UserError(f"--protocol={protocols[0]} compares with real videos; name them with --reference=FOLDER.")
    if reference is not None and reference.exists() and videos.exists() and reference.samefile(videos):
        raise UserError(f"--reference={reference} is the folder of --videos too; name the real videos.")
    folders = [VideoFolder(videos, "--videos")]
    if reference is not None:
        folders.append(VideoFolder(reference, "--reference"))
    pictures = all(folder.of_pictures for folder in folders)
    frames = _frames(frames, pictures, protocols)
    compared = [] if reference is None else choose(protocols, weights, pictures)
    for detector, protocol in compared:
        if refusal := detector.refusal(frames):
            if protocols:
                raise UserError(f"--num_frames={refusal}; give {detector.longest or detector.shortest}.")
            print(f"{protocol.name} is left out: --num_frames={refusal}.", file=sys.stderr)
            compared = []
    scorer = ClipScorer.find(weights, videos)
    c3d = None if pictures else find_c3d(weights)
    if c3d is not None and frames < c3d.shortest:
        print(
            f"{C3D_PROTOCOL.name} is left out: --num_frames={c3d.refusal(frames)}; give {c3d.shortest} or more.",
            file=sys.stderr,
        )
        c3d = None
    metrics: list[dict[str, Any]] = []
    with Watchdog() as watchdog:
        measured = []
        for detector, protocol in compared:
            rows = [_features(detector, protocol, folder, frames, out, watchdog) for folder in folders]
            measured.append((detector, protocol, rows))
        shown = scorer and _features(scorer.detector, scorer.protocol, folders[0], frames, out, watchdog)
        classes = c3d and _features(c3d, C3D_PROTOCOL, folders[0], frames, out, watchdog)
        quality = [] if pictures else [_quality(folder, frames, out, watchdog) for folder in folders]
        pairs = _pairs(*folders, frames, out, weights, watchdog) if reference is not None else []
    # Only now it is known which files are skipped.
    for detector, protocol, rows in measured:
        metrics += _distances(detector, protocol, rows, folders, frames)
    if scorer is not None:
        shown = {name: row for name, row in shown.items() if name not in folders[0].skipped}
        metrics += scorer.metric(shown, _cut(folders[:1], frames))
    if c3d is not None:
        logits = [row[0] for name, row in classes.items() if name not in folders[0].skipped]
        cut = _cut(folders[:1], frames)
        if frames > c3d.longest:
            cut = f"the first {c3d.longest} of {frames} frames of each clip, every frame"
        metrics += video_score(c3d, np.stack(logits), cut)
    for folder, rows in zip(folders, quality, strict=False):
        metrics += _quality_metrics(folder, rows, frames)
    metrics += _pair_metrics(pairs, frames, weights)
    report = {
        "metrics": metrics,
        "videos": str(videos),
        "reference": None if reference is None else str(reference),
        "skipped": [
            {"file": str(folder.path / name), "reason": reason}
            for folder in folders
            for name, reason in sorted(folder.skipped.items())
        ],
        "pairs": pairs,
    }
    write_atomically(out / "evaluate.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _frames(frames: int | None, pictures: bool, protocols: Sequence[str]) -> int:
    """How many frames of each file are measured.

    Raises:
        UserError: if that does not suit what is measured.
    """
    of_video = [name for name in protocols if not PROTOCOLS[name].of_images]
    if pictures and of_video:
        raise UserError(f"--protocol={of_video[0]} is for videos, and the folders hold pictures; give fid_tf1, say.")
    if pictures and frames not in (None, 1):
        raise UserError(f"--num_frames={frames} is for videos, and the folders hold pictures; leave it out.")
    if pictures:
        return 1
    if frames is not None and frames < FEWEST:
        raise UserError(f"--num_frames={frames} is too few to measure a video; give at least {FEWEST}.")
    return frames or FRAMES


def _cut(folders: Sequence[VideoFolder], frames: int) -> str:
    if all(folder.of_pictures for folder in folders):
        return "whole"
    longer = sum(len(folder.longer) for folder in folders)
    return f"the first {frames} frames of each clip, every frame" + (f"; {longer} clips are longer" if longer else "")


def _watched(keys: Iterator[str], what: str, done: int, total: int) -> None:
    """Runs an iterator to its end under a progress bar with rate and time left."""
    with tqdm.tqdm(desc=what, total=total, initial=done, unit="clip", dynamic_ncols=True, file=sys.stderr) as bar:
        for _ in keys:
            bar.update()


def _features(
    detector: Detector,
    protocol: FeatureProtocol,
    folder: VideoFolder,
    frames: int,
    out: pathlib.Path,
    watchdog: Watchdog,
) -> dict[str, np.ndarray]:
    """The features of a folder's files, a row each or, of images, a row for each frame; from the cache or computed.

    Of clips that are longer than the network takes, the first frames are measured.
    """
    cache = FeatureCache(out / "features" / protocol.name)
    taken = min(frames, detector.longest or frames)
    names = {name: digest_of(folder.digest(name), detector.sha256, protocol.name, str(taken)) for name in folder.usable}
    names = {name: key for name, key in names.items() if name not in folder.skipped}

    # Equal files are computed once.
    missing = {
        key: name for name, key in names.items() if any(each not in cache.rows for each in protocol.keys(key, taken))
    }

    def clips() -> Iterator[tuple[str, np.ndarray]]:
        read = read_ahead(lambda name: folder.read(name, frames, watchdog), missing.values())
        for (_, clip), key in zip(read, missing, strict=True):
            if clip is None:
                continue
            yield from zip(protocol.keys(key, taken), protocol.parts(clip[:taken]), strict=True)

    what = f"{protocol.name} {folder.flag.removeprefix('--')}"
    if missing:
        total = len(missing) * (taken if protocol.of_images else 1)
        _watched(compute_features(detector, protocol.prepare, clips(), cache), what, 0, total)
    folder.check_any(frames)
    return {
        name: np.stack([cache.rows[each] for each in protocol.keys(key, taken)])
        for name, key in names.items()
        if all(each in cache.rows for each in protocol.keys(key, taken))
    }


def _distances(
    detector: Detector,
    protocol: FeatureProtocol,
    rows: list[dict[str, np.ndarray]],
    folders: list[VideoFolder],
    frames: int,
) -> list[dict[str, Any]]:
    """The metrics of two folders' features."""
    features, real = (
        np.concatenate([row for name, row in found.items() if name not in folder.skipped])
        for found, folder in zip(rows, folders, strict=True)
    )
    if min(len(features), len(real)) < 2:
        return []
    cut, unit = _cut(folders, frames), "images" if protocol.of_images else "videos"
    if unit == "images" and frames > 1:
        cut = f"each alone, {cut}"
    reference = Reference.of(real, detector, protocol)
    return compare(detector, protocol, features, reference, cut, unit, frames=frames)


def _cached(
    kind: str,
    out: pathlib.Path,
    keys: Mapping[str, str],
    compute: Callable[[str], np.ndarray | None],
) -> dict[str, np.ndarray]:
    """A row of numbers for each name, from the cache or computed; names that give None are left out."""
    cache = FeatureCache(out / "features" / kind)
    missing = [name for name, key in keys.items() if key not in cache.rows]

    def rows() -> Iterator[str]:
        try:
            for name, row in read_ahead(compute, missing):
                if row is not None:
                    cache.put(keys[name], row)
                yield name
        finally:
            cache.keep()

    if missing:
        _watched(rows(), kind, len(keys) - len(missing), len(keys))
    return {name: cache.rows[key] for name, key in keys.items() if key in cache.rows}


def _quality(folder: VideoFolder, frames: int, out: pathlib.Path, watchdog: Watchdog) -> dict[str, np.ndarray]:
    """`QUALITY` of each file."""

    def compute(name: str) -> np.ndarray | None:
        clip = folder.read(name, frames, watchdog)
        if clip is None:
            return None
        stride = max(1, round(folder.rate(name, watchdog) / video_quality.DYNAMIC_FPS))
        sparse = clip
        if stride > 1:
            whole = watchdog.read_clip(folder.path / name, max_frames=stride * frames)
            sparse = whole[::stride]
        dynamic = video_quality.is_dynamic(sparse) if len(sparse) > 1 else False
        return np.array([video_quality.flicker(clip), video_quality.smoothness(clip), dynamic, name in folder.longer])

    keys = {
        name: digest_of(folder.digest(name), "quality", QUALITY_VERSION, str(frames)) for name in list(folder.usable)
    }
    rows = _cached("quality", out, {name: key for name, key in keys.items() if name not in folder.skipped}, compute)
    folder.check_any(frames)
    folder.longer.update(name for name, row in rows.items() if row[len(QUALITY)])
    return rows


def _quality_metrics(folder: VideoFolder, rows: dict[str, np.ndarray], frames: int) -> list[dict[str, Any]]:
    values = np.stack([row for name, row in rows.items() if name not in folder.skipped]).mean(axis=0)
    of = folder.flag.removeprefix("--")
    return [
        {
            "name": name if of == "videos" else f"reference_{name}",
            "value": float(value),
            "unit": "fraction",
            "protocol": f"{QUALITY_EXPLAINED[name]}; mean over {len(rows)} clips of --{of}, the first {frames} frames",
            "count": len(rows),
            "frames": frames,
        }
        for name, value in zip(QUALITY, values, strict=False)
    ]


def _pairs(
    videos: VideoFolder,
    reference: VideoFolder,
    frames: int,
    out: pathlib.Path,
    weights: Mapping[str, str],
    watchdog: Watchdog,
) -> list[dict[str, Any]]:
    """PSNR, SSIM and LPIPS of each pair, if the folders' names are the same but for suffixes."""
    mine, theirs = ({str(pathlib.PurePath(n).with_suffix("")): n for n in f.usable} for f in (videos, reference))
    if set(mine) != set(theirs):
        common = len(set(mine) & set(theirs))
        if common:
            print(
                f"{common} of {len(mine)} videos have the name of a reference; PSNR, SSIM and LPIPS need all of them.",
                file=sys.stderr,
            )
        return []
    found = {net: find_weights(f"lpips_{net}", weights) for net in SHORTEST_SIDE}
    nets = {net: load_features(path) for net, path in found.items() if path is not None}
    digests = [digest for path in found.values() if path is not None for digest in (_sha256(path),)]
    compiled = {net: jax.jit(functools.partial(feature_distance, values)) for net, values in nets.items()}

    unequal: dict[str, str] = {}

    def compute(stem: str) -> np.ndarray | None:
        one, other = (f.read(names[stem], frames, watchdog) for f, names in ((videos, mine), (reference, theirs)))
        if one is None or other is None:
            return None
        if one.shape != other.shape:
            sizes = [f"{clip.shape[2]} × {clip.shape[1]}" for clip in (one, other)]
            unequal[stem] = f"it has {sizes[0]} pixels, and its reference {sizes[1]}"
            return None
        side = min(one.shape[1:3])
        row = [psnr_db(other, one), ssim(other, one) if side >= SSIM_WINDOW else np.nan]
        for net in SHORTEST_SIDE:
            fits = net in nets and side >= SHORTEST_SIDE[net]
            row.append(float(compiled[net](to_float(one[None]), to_float(other[None]))[0]) if fits else np.nan)
        return np.array(row)

    keys = {
        stem: digest_of(videos.digest(mine[stem]), reference.digest(theirs[stem]), "pair", str(frames), *digests)
        for stem in mine
    }
    rows = _cached("pairs", out, keys, compute)
    names = ("psnr_db", "ssim", *(f"lpips_{net}" for net in SHORTEST_SIDE))
    return [
        {"file": mine[stem], **{k: float(v) for k, v in zip(names, row, strict=True) if np.isfinite(v)}}
        for stem, row in rows.items()
    ] + [{"file": mine[stem], "reason": reason} for stem, reason in unequal.items()]


def _pair_metrics(pairs: list[dict[str, Any]], frames: int, weights: Mapping[str, str]) -> list[dict[str, Any]]:
    explained = {
        "psnr_db": ("dB", "PSNR (8-bit RGB, peak 255, one mean squared error a clip)"),
        "ssim": ("", "SSIM (Wang et al. 2004: 8-bit RGB, Gaussian window, σ 1.5)"),
        "lpips_vgg": ("", "LPIPS (VGG-16, version 0.1)"),
        "lpips_alex": ("", "LPIPS (AlexNet, version 0.1)"),
    }
    metrics = []
    for name, (unit, what) in explained.items():
        values = [row[name] for row in pairs if name in row]
        if values:
            path = find_weights(name, weights) if name in NETWORKS else None
            metrics.append(
                {
                    "name": name,
                    "value": float(np.mean(values)),
                    "unit": unit,
                    "protocol": f"{what}, mean over the first {frames} frames and over {len(values)} pairs of equal "
                    "names",
                    "count": len(values),
                    "frames": frames,
                    **({} if path is None else {"detector_sha256": _sha256(path)}),
                }
            )
    return metrics


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sentences(report: dict[str, Any]) -> list[str]:
    """What the command prints: each metric with its protocol, and how many files were skipped, and why."""
    lines = []
    for metric in report["metrics"]:
        lines.append(f"{metric['name']:26} {metric['value']:8.4g} {metric['unit']}".rstrip())
        lines.append(f"    {metric['protocol']}")
    unequal = [row for row in report["pairs"] if "reason" in row]
    if unequal:
        lines.append(
            f"{len(unequal)} pairs are of unequal sizes; {unequal[0]['file']}, for one: {unequal[0]['reason']}"
        )
    for row in report["skipped"][:10]:
        lines.append(f"skipped {row['file']}: {row['reason']}")
    if len(report["skipped"]) > 10:
        lines.append(f"… and {len(report['skipped']) - 10} more files")
    return lines
