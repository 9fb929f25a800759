"""What is freed stays with the process."""

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has malloc give memory that was freed to whoever asks next, and not to the system and back.

    A train step on a CPU frees and asks for hundreds of megabytes, and each page that comes from the system must be
    cleared: a fifth of the denoiser's step in `configs/walt_demo.py`. To be called before there are threads, for those
    that have heaps of their own keep them.

    Returns:
        Whether malloc is glibc's, which alone can be told so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
