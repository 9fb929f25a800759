"""Freed memory stays with the process, and garbage is collected seldom."""

import ctypes
import gc

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Makes malloc reuse freed memory instead of returning it to the system.

    A train step on a CPU frees and allocates hundreds of megabytes, and the system clears each page that it hands out:
    a fifth of the time of the denoiser's step in `configs/walt_demo.py`. Call it before threads are started: those that
    have heaps of their own keep them.

    Returns:
        Whether it worked; only glibc's malloc has these settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])


def collect_seldom() -> None:
    """Makes Python look for unreachable cycles a hundred times less often.

    Tracing a model makes millions of objects that stay, among which it would search again and again: an eighth of the
    time until the first step of `configs/walt_tiny.py`.
    """
    gc.set_threshold(70_000, 10, 10)
