"""Starts the server."""

import contextlib
import dataclasses
import importlib.util
import pathlib
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from walt_jax.errors import UserError
from walt_jax.generation.content_credentials import Sign
from walt_jax.generation.generator import Generator
from walt_jax.serving.fields import Limits
from walt_jax.workdir import locked

TOGETHER = 8  # videos that are made at once, at most
CONNECTIONS = 512  # at once; more get a 503
TOKEN_LENGTH = 16  # characters at least


def serve(
    generator: Generator,
    pixels: tuple[int, int, int],
    fps: float,
    workdir: pathlib.Path,
    identity: str,
    made_by: dict[str, Any],
    on_mesh: Callable[[], AbstractContextManager[None]],
    host: str,
    port: int,
    token: str | None,
    tags: bool = True,
    sign: Sign | None = None,
) -> None:
    """Serves a model until a signal ends it.

    Args:
        generator: the model.
        pixels: (frames, height, width) of its clips.
        fps: frames a second of them.
        workdir: of the run; videos are in its folder `videos`.
        identity: tells the model from others.
        made_by: what videos say of the model, see `Run.made_by`.
        on_mesh: within, it computes.
        host, port: where to listen.
        token: what clients have to know; None makes one where others than this machine's can reach the server.
        tags: whether videos have tags.
        sign: see `Worker`.

    Raises:
        UserError: if the extra `serve` is not installed, the port is taken, the token is short, or another process
            serves the run.
    """
    missing = [name for name in ("starlette", "uvicorn", "python_multipart") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not installed; install walt_jax with [serve]: pip install -e '.[serve]'."
        )
    if token is not None and len(token) < TOKEN_LENGTH:
        raise UserError(f"--token has {len(token)} characters; give at least {TOKEN_LENGTH}, or leave it out.")

    import uvicorn

    from walt_jax.serving.app import LOOPBACK, make_app
    from walt_jax.serving.connections import Connection
    from walt_jax.serving.jobs import Jobs
    from walt_jax.serving.worker import Worker

    with locked(workdir / "videos"):
        limits, jobs = Limits(), Jobs(workdir / "videos")
        made = token is None and host not in LOOPBACK
        token = secrets.token_urlsafe(24) if made else token
        worker = Worker(jobs, generator, pixels, on_mesh, limits, TOGETHER, made_by, tags, sign)
        # Clients do not choose all settings of the sampler.
        identity = f"{identity} {dataclasses.replace(generator.config, batch_size=1)}"
        app = make_app(jobs, worker, workdir.resolve().name, identity, fps, limits, token)
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Connection,
            ws="none",
            limit_concurrency=CONNECTIONS,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
            server_header=False,
        )
        try:
            listening = config.bind_socket()
        except SystemExit as error:
            raise UserError(f"--port={port} of {host} can't be listened on; name another.") from error
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving {workdir} at http://{shown}:{listening.getsockname()[1]}/" + (f"?token={token}" if made else "")
        )
        sys.stdout.flush()
        signal.set_wakeup_fd(-1)  # the program's own thread would end the process while answers are still sent
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
        print("stopped; videos that were waiting are made when it is started again.")
