"""A server of small videos with random parameters, for tests."""

import contextlib

from walt_jax.serving.app import make_app
from walt_jax.serving.jobs import Jobs
from walt_jax.serving.worker import Worker

PIXELS, FPS = (9, 16, 16), 8.0


def application(generator, folder, limits, token=None):
    """(application, worker, jobs)"""
    jobs = Jobs(folder)
    worker = Worker(jobs, generator, PIXELS, contextlib.nullcontext, limits, 4, {"model": "small"})
    return make_app(jobs, worker, "small", "one model", FPS, limits, token), worker, jobs
