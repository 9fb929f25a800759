"""Runs a function on each of many inputs, on any runner of Apache Beam; writes files whole."""

import contextlib
import json
import logging
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import tqdm
from etils import epath

from walt_jax.data.prepare_config import PrepareConfig
from walt_jax.errors import UserError

WATCH_SECONDS = 2

# A thread a core, since decoding and encoding run outside Python; they say nothing, for what fails is in the exception.
LOCAL_OPTIONS = (
    "--allow_unsafe_triggers",  # of which there are none; it keeps Beam from downloading another local runner
    "--direct_running_mode=multi_threading",
    "--direct_num_workers=0",
    "--default_sdk_harness_log_level=CRITICAL",
)


def run_each(
    config: PrepareConfig,
    work: epath.Path,
    unit: str,
    todo: list[dict],
    function: Callable[[str], None],
    folder: epath.Path,
    total: int,
    infix: str = "",
) -> None:
    """Runs `function` once or more on each of `todo`, showing how many of `total` files there are.

    Args:
        config: its runner, and the runner's flags.
        work: a folder for the list of what is to do, and for `error.txt`.
        unit: what one of them is called.
        todo: what JSON holds; `function` gets each as a line of JSON.
        function: of a module, so that it can be sent to other machines; may run twice on the same.
        folder: where `function` leaves a file for each, with `infix` in its name.
        total: how many files there will be in the end.

    Raises:
        UserError: the runner can't be had, or `function` fails.
    """
    if not todo:
        return
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    lines = work / f"{unit}s.jsonl"
    publish(lines, "".join(json.dumps(entry) + "\n" for entry in todo), work)
    local = config.runner == "DirectRunner"
    if local:
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what fails is in the error
    try:
        options = PipelineOptions([*(LOCAL_OPTIONS if local else ()), *config.runner_options])
        with _progress(unit, total, folder, infix), beam.Pipeline(config.runner, options) as pipeline:
            (
                pipeline
                # Not the lines themselves: runners limit what a pipeline holds.
                | beam.Create([str(lines)])
                | beam.FlatMap(_lines)
                | beam.Reshuffle()
                | f"each {unit}" >> beam.Map(function)
            )
    except (KeyboardInterrupt, UserError):
        raise
    except Exception as error:  # whatever a runner may raise
        path = work / "error.txt"
        publish(path, traceback.format_exc(), work)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].split(" [while running")[0]
        raise UserError(
            f"The pipeline failed on {config.runner} ({reason}); {path} has the whole story. Mend it, and the same "
            "command goes on where it was."
        ) from error


def _lines(path: str) -> list[str]:
    return epath.Path(path).read_text().splitlines()


@contextlib.contextmanager
def _progress(unit: str, total: int, folder: epath.Path, infix: str) -> Iterator[None]:
    """Shows how many files are in a folder while others write them, whatever machines they are on."""
    stopped = threading.Event()

    def count() -> int:
        return sum(infix in path.name for path in folder.iterdir())

    def watch() -> None:
        pause = WATCH_SECONDS
        while not stopped.wait(pause):
            start = time.monotonic()
            bar.update(count() - bar.n)
            pause = max(WATCH_SECONDS, 20 * (time.monotonic() - start))  # listing a remote folder takes its time

    with tqdm.tqdm(desc=f"{unit}s", total=total, initial=count(), unit=unit, dynamic_ncols=True) as bar:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stopped.set()
            watcher.join()
            bar.update(count() - bar.n)


def publish(path: epath.Path, content: str | bytes | Path, work: epath.Path) -> None:
    """The file is there with all of its content, which is text, bytes or another file's, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    # A name of its own: after a kill, or on a runner that does things twice, two processes may write the same file.
    temporary = work / f".{uuid.uuid4().hex}"
    if isinstance(content, str):
        temporary.write_text(content)
    elif isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        with content.open("rb") as source, temporary.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    temporary.replace(path)
