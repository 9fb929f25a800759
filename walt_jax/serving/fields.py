"""What a client asks for: fields of JSON or of a form, checked against limits before anything is made."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from walt_jax.errors import UserError
from walt_jax.generation.generator import Generator
from walt_jax.generation.request import MAX_SEED

MEDIA = ("input_reference", "image", "last_image", "video", "mask")  # fields with an upload each
EXTEND = ("forward", "backward", "loop")


class BadRequest(Exception):
    """A request that is answered with a 4xx.

    Attributes:
        status: of HTTP.
        param: the field.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.status, self.param = status, param


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        prompt: characters.
        pixels: of a frame, as a multiple of the model's own.
        frames: as a multiple of the model's own.
        steps: of sampling.
        upload_bytes: of a request.
        waiting: jobs that are queued.
        kept: jobs in all, whose videos are kept until they are deleted.
        seconds: of a job, after which it fails; of reading a file a tenth.
    """

    prompt: int = 2000
    pixels: float = 4.0
    frames: float = 16.0
    steps: int = 200
    upload_bytes: int = 64 * 2**20
    waiting: int = 256
    kept: int = 10_000
    seconds: float = 600.0


def read(
    fields: Mapping[str, Any],
    generator: Generator,
    pixels: tuple[int, int, int],
    fps: float,
    model: str,
    limits: Limits,
) -> dict[str, Any]:
    """The values of a request, without its uploads.

    OpenAI's are prompt, model, size ("WxH") and seconds; others name width, height, num_frames, fps, seed,
    negative_prompt, num_inference_steps and guidance_scale; ours are extend, strength and motion.

    Raises:
        BadRequest: if one is unknown, wrong, or above a limit.
    """
    known = {
        *("prompt", "model", "size", "seconds", "width", "height", "num_frames", "fps", "seed", "negative_prompt"),
        *("num_inference_steps", "guidance_scale", "extend", "strength", "motion"),
    }
    for name in fields:
        if name not in known:
            raise BadRequest(f"{name!r} is no field of a video; there are {', '.join(sorted((*known, *MEDIA)))}.", name)
    if fields.get("model") not in (None, "", model):
        raise BadRequest(f"This server has the model {model!r}; leave model out, or name that.", "model", 404)
    found: dict[str, Any] = {}
    for name in ("prompt", "negative_prompt"):
        text = fields.get(name) or ""
        if not isinstance(text, str) or not text.isprintable():
            raise BadRequest(f"{name} should be a text of one line.", name)
        if len(text) > limits.prompt:
            raise BadRequest(f"{name} has {len(text)} characters; at most {limits.prompt} are read.", name)
        found[name] = text
    frames, height, width = pixels
    size = fields.get("size")
    if size:
        parts = str(size).lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and len(part) < 6 for part in parts):
            raise BadRequest(f"size is {size!r}; write WIDTHxHEIGHT, such as {width}x{height}.", "size")
        width, height = map(int, parts)
    width, height = _whole(fields, "width", width, 1, 2**14), _whole(fields, "height", height, 1, 2**14)
    rate = _number(fields, "fps", fps, 0.1, 240.0)
    stride = generator.model.codec.tokenizer.config.strides[0]
    found["num_frames"] = None
    if fields.get("seconds") not in (None, ""):
        count = _number(fields, "seconds", 0.0, 0.0, 1e6) * rate
        found["num_frames"] = 1 + max(0, round((count - 1) / stride)) * stride
    if fields.get("num_frames") not in (None, ""):
        found["num_frames"] = _whole(fields, "num_frames", frames, 1, 10**9)
    most = int(limits.frames * frames)
    if (found["num_frames"] or frames) > most:
        raise BadRequest(f"{found['num_frames']} frames are asked for; at most {most} are made.", "num_frames")
    if width * height > limits.pixels * math.prod(pixels[1:]):
        area = int(limits.pixels * math.prod(pixels[1:]))
        raise BadRequest(f"{width} × {height} pixels are asked for; a frame may have {area:,} in all.", "size")
    try:
        generator.shape((found["num_frames"] or frames, height, width))
    except UserError as error:
        raise BadRequest(str(error), "size") from error
    found |= {"width": width, "height": height, "fps": rate}
    found["seed"] = _whole(fields, "seed", 0, 0, MAX_SEED)
    found["steps"] = _whole(fields, "num_inference_steps", generator.config.steps, 1, limits.steps)
    found["guidance"] = _number(fields, "guidance_scale", generator.config.guidance.scale, 0.0, 100.0)
    found["strength"] = _number(fields, "strength", 1.0, 0.0, 1.0)
    found["motion"] = _number(fields, "motion", 0.0, 0.0, 1.0)
    found["extend"] = fields.get("extend") or None
    if found["extend"] not in (None, *EXTEND):
        raise BadRequest(f"extend is {found['extend']!r}; it may be {', '.join(EXTEND)}.", "extend")
    return found


def _number(fields: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = fields.get(name)
    if value in (None, ""):
        return default
    try:
        number = float(value)
        if isinstance(value, bool) or not least <= number <= most:
            raise ValueError
    except (TypeError, ValueError):
        raise BadRequest(f"{name} is {value!r:.40}; give a number from {least:g} to {most:g}.", name) from None
    return number


def _whole(fields: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    number = _number(fields, name, default, least, most)
    if number != int(number):
        raise BadRequest(f"{name} is {fields[name]!r:.40}; give a whole number.", name)
    return int(number)
