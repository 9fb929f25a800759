"""What a video's tags and the file beside it say of where it comes from, for people and for programs.

Tags are lost when a file is transcoded; the file beside it names the video by its digest.
"""

import datetime
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import walt_jax
from walt_jax.workdir import write_atomically

# IPTC's term for media made by a trained model, which C2PA's assertions use too.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def made(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a video, and that a model made it."""
    return {"walt_jax": walt_jax.__version__, "generated": True, "digitalSourceType": SOURCE_TYPE, **settings}


def tags(prompt: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a container; equal records give equal tags.

    Args:
        prompt: the title.
        record: see `made`.
    """
    return {"title": prompt, "comment": json.dumps(record, ensure_ascii=False)}


def write_sidecar(path: pathlib.Path, video: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Writes the record of a video with its digest and the time, as JSON.

    Args:
        path: of the JSON.
        video: the file, complete.
        record: see `made`.
    """
    with video.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = {**record, "created": now, "sha256": digest, "bytes": video.stat().st_size}
    write_atomically(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
