"""Runs a function on many inputs with any runner of Apache Beam; writes files atomically."""

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

# One thread per core, since decoding and encoding run outside Python. No logging: failures are in the exception.
LOCAL_OPTIONS = (
    "--allow_unsafe_triggers",  # there are none, but without it Beam downloads another local runner
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
    """Runs `function` at least once on each entry of `todo`, with a progress bar that counts finished files.

    Args:
        config: has the runner and its flags.
        work: folder for the list of entries, and for `error.txt`.
        unit: name of an entry, for the progress bar.
        todo: JSON-serialisable; `function` gets each as a line of JSON.
        function: importable by name, so that it can be sent to other machines; must allow being run twice on an entry.
        folder: where `function` writes a file per entry, with `infix` in its name.
        total: number of files when all is done.

    Raises:
        UserError: the runner is not available, or `function` fails.
    """
    if not todo:
        return
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    lines = work / f"{unit}s.jsonl"
    publish(lines, "".join(json.dumps(entry) + "\n" for entry in todo), work)
    local = config.runner == "DirectRunner"
    if local:
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # failures are in the exception
    try:
        options = PipelineOptions([*(LOCAL_OPTIONS if local else ()), *config.runner_options])
        with _progress(unit, total, folder, infix), beam.Pipeline(config.runner, options) as pipeline:
            (
                pipeline
                # The file's name rather than its lines: runners limit the size of a pipeline.
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
            f"The pipeline failed on {config.runner} ({reason}); {path} has the traceback. Fix the cause, then "
            "start the same command again: it resumes."
        ) from error


def _lines(path: str) -> list[str]:
    return epath.Path(path).read_text().splitlines()


@contextlib.contextmanager
def _progress(unit: str, total: int, folder: epath.Path, infix: str) -> Iterator[None]:
    """Shows how many files are in a folder, while any machine writes them."""
    stopped = threading.Event()

    def count() -> int:
        return sum(infix in path.name for path in folder.iterdir())

    def watch() -> None:
        pause = WATCH_SECONDS
        while not stopped.wait(pause):
            start = time.monotonic()
            bar.update(count() - bar.n)
            pause = max(WATCH_SECONDS, 20 * (time.monotonic() - start))  # listing a remote folder is slow

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
    """Writes a file atomically.

    Args:
        path: the file, local or remote.
        content: text, bytes, or a local file to copy.
        work: folder for temporary files, on the same file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    # A unique name: after a kill, or if a runner repeats work, two processes may write the same file.
    temporary = work / f".{uuid.uuid4().hex}"
    if isinstance(content, str):
        temporary.write_text(content)
    elif isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        with content.open("rb") as source, temporary.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    temporary.replace(path)
