"""How much memory there is, to refuse at once what can't fit."""

import os

import jax


def memory_bytes() -> int | None:
    """Bytes of the first device's memory, or of the machine's where that is a CPU; None where it can't be told."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats()
        return None if not stats else stats.get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
