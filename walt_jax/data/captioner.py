"""Captions of frames from the user's own function or command."""

import importlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from walt_jax.data.prepare_config import PrepareConfig
from walt_jax.errors import UserError

Captioner = Callable[[np.ndarray, list[str]], str | list[str]]


class CaptionError(Exception):
    """The user's captioner gave no caption. The message is the short reason."""


def open_captioner(config: PrepareConfig) -> Captioner | None:
    """The config's captioner, or None if captions are kept.

    Raises:
        UserError: there is no such function or command.
    """
    if config.captioner:
        return _function(config.captioner)
    if config.caption_command:
        return _command(config.caption_command)
    return None


def caption(captioner: Captioner, frames: np.ndarray, captions: list[str]) -> list[str]:
    """The captions of a scene: at least one, none empty.

    Args:
        captioner: see `open_captioner`.
        frames: uint8 [t, h, w, 3], RGB.
        captions: the video's own, if any.

    Raises:
        CaptionError: the captioner failed or returned none.
    """
    try:
        answer = captioner(frames, list(captions))
    except CaptionError:
        raise
    except Exception as error:  # whatever a user's program may raise
        raise CaptionError(f"the captioner failed: {type(error).__name__}: {error}") from error
    answer = [answer] if isinstance(answer, str) else answer
    if not isinstance(answer, list | tuple) or not all(isinstance(text, str) for text in answer):
        raise CaptionError(f"the captioner returned {type(answer).__name__}, not a caption or a list of them")
    texts = [text.strip() for text in answer if text.strip()]
    if not texts:
        raise CaptionError("the captioner gave no caption")
    return texts


def _function(name: str) -> Captioner:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module may raise
        raise UserError(
            f"config.prepare.captioner={name} can't be imported ({type(error).__name__}: {error}); name a function of "
            "a module on the PYTHONPATH as module:function."
        ) from error
    if not callable(function):
        raise UserError(f"config.prepare.captioner={name} is not a function; name one as module:function.")
    return function


def _command(line: str) -> Captioner:
    try:
        command = shlex.split(line)
    except ValueError as error:
        raise UserError(f"config.prepare.caption_command={line} can't be read ({error}); mend its quotes.") from error
    if not command or not shutil.which(command[0]):
        raise UserError(f"config.prepare.caption_command={line} names no program; install it, or give its whole path.")

    def run(frames: np.ndarray, captions: list[str]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            for index, frame in enumerate(frames):
                Image.fromarray(frame).save(Path(folder) / f"{index:03}.png")
            done = subprocess.run([*command, folder], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise CaptionError(f"the captioner failed: exit code {done.returncode}" + (f", {said[-1]}" if said else ""))
        return done.stdout.splitlines()

    return run
