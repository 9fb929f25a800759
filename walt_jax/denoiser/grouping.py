"""Windows of any size in chunks of static shape, for window attention on packs; computed once a batch.

A batch of packs has windows of many lengths. A chunk is a fixed number of token slots, cut into rows of one of a few
lengths; a row holds a window, or several small ones under a mask. So each chunk is a matrix product of static shape
with little padding, and the number of chunks of each length may differ from batch to batch.
"""

import functools
import math
from collections.abc import Sequence

import flax.struct
import numpy as np
from jaxtyping import Array, Int

# Slots of a chunk: enough for an efficient matrix product, few enough that half-empty last chunks cost little.
SMALLEST_CHUNK, LARGEST_CHUNK = 128, 512
CHUNKS = 24  # aim at this number of chunks
SPARE = 1.25  # allocated chunks over those that tokens without padding would need; each retry allocates as much more


@flax.struct.dataclass
class Groups:
    """Where each token of a batch of packs goes, tokens numbered through all packs.

    Attributes:
        slots: the token in each slot, and the number of all tokens where a slot is empty.
        row_window: which window of its row a slot's token is in, -1 where it is empty.
        kind: 0 for a chunk that is not used, else 1 + the index of its rows' length in `lengths`.
        place: each token's slot, and the number of all slots for tokens in no window.
        lengths: of rows, ascending.
    """

    slots: Int[Array, "chunks slots"]
    row_window: Int[Array, "chunks slots"]
    kind: Int[Array, " chunks"]
    place: Int[Array, " n"]
    lengths: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def all_at_once(self) -> bool:
        """Whether all chunks have one row length and several rows: they are computed at once, without a loop."""
        return _all_at_once(self.lengths, self.slots.shape[1])


def _all_at_once(lengths: tuple[int, ...], slots: int) -> bool:
    return len(lengths) == 1 and lengths[0] < slots


def choose_lengths(windows: Sequence[int], most: int = 12) -> tuple[int, ...]:
    """At most `most` row lengths that minimise the padding of windows of these lengths.

    Args:
        windows: lengths of windows as they occur in the data, the longest among them.
        most: the number of programs that may be compiled.
    """
    lengths, counts = np.unique(np.asarray(windows), return_counts=True)
    total = len(lengths)

    @functools.cache
    def best(last: int, left: int) -> tuple[float, tuple[int, ...]]:
        """(score products, lengths) for windows up to the `last`-th length, which is one of the `left` chosen."""
        options = [(float(counts[: last + 1].sum() * lengths[last] ** 2), (int(lengths[last]),))]
        if left > 1:
            for before in range(last):
                cost, chosen = best(before, left - 1)
                cost += float(counts[before + 1 : last + 1].sum() * lengths[last] ** 2)
                options.append((cost, (*chosen, int(lengths[last]))))
        return min(options)

    return best(total - 1, most)[1]


def group(numbers: Sequence[Int[np.ndarray, " n"]], lengths: tuple[int, ...], slots: int | None = None) -> Groups:
    """Assigns the windows of a batch of packs to chunks.

    Args:
        numbers: of each pack, the window of each token, as `windows.window_numbers` gives them.
        lengths: of rows, ascending.
        slots: of a chunk, at least the greatest length; None chooses by the number of tokens.

    Raises:
        ValueError: if a window is longer than the greatest length.
    """
    total = sum(map(len, numbers))
    if slots is None:
        slots = min(max(2 ** int(math.log2(max(total / CHUNKS, 1))), SMALLEST_CHUNK), LARGEST_CHUNK)
    slots = max(slots, lengths[-1])
    if len(lengths) == 1:
        slots -= slots % lengths[0]
    rows: list[list[list[Int[np.ndarray, " l"]]]] = [[] for _ in lengths]  # of each length, the windows in each row
    offset = 0
    for pack in numbers:
        order = np.argsort(pack, kind="stable")
        order = order[np.searchsorted(pack[order], 0) :]
        windows = np.split(order + offset, np.flatnonzero(np.diff(pack[order])) + 1) if len(order) else []
        for kind, windows_of_kind in enumerate(_by_length(windows, lengths)):
            rows[kind] += _rows(windows_of_kind, lengths[kind])
        offset += len(pack)
    for kind, length in enumerate(lengths[:-1]):
        # A nearly empty last chunk costs more than its rows do among longer ones.
        left = len(rows[kind]) % (slots // length)
        if left * lengths[kind + 1] ** 2 < (slots // length) * length**2:
            rows[kind + 1] += rows[kind][len(rows[kind]) - left :]
            del rows[kind][len(rows[kind]) - left :]
    used = [math.ceil(len(rows[kind]) / (slots // length)) for kind, length in enumerate(lengths)]
    # Chunks without a loop are computed even if they are unused.
    chunks = len(lengths) + math.ceil((1 if _all_at_once(lengths, slots) else SPARE) * total / slots)
    while chunks < sum(used):
        chunks = math.ceil(SPARE * chunks)
    table = np.full((chunks, slots), total, np.int32)
    row_window = np.full((chunks, slots), -1, np.int32)
    kinds = np.zeros(chunks, np.int32)
    chunk = 0
    for kind, length in enumerate(lengths):
        per_chunk = slots // length
        for first in range(0, len(rows[kind]), per_chunk):
            for row, windows in enumerate(rows[kind][first : first + per_chunk]):
                start = row * length
                for number, window in enumerate(windows):
                    table[chunk, start : start + len(window)] = window
                    row_window[chunk, start : start + len(window)] = number
                    start += len(window)
            kinds[chunk] = kind + 1
            chunk += 1
    return Groups(table, row_window, kinds, _places(table, total), tuple(lengths))


def _places(slots: Int[np.ndarray, "rows slots"], tokens: int) -> Int[np.ndarray, " n"]:
    """Each token's slot, and the number of all slots for tokens that have none: the inverse of `slots`."""
    places = np.full(tokens + 1, slots.size, np.int32)  # the last one is that of empty slots
    places[slots.ravel()] = np.arange(slots.size)
    return places[:-1]


def _by_length(windows: Sequence[Int[np.ndarray, " l"]], lengths: tuple[int, ...]) -> list[list[Int[np.ndarray, " l"]]]:
    kinds: list[list[Int[np.ndarray, " l"]]] = [[] for _ in lengths]
    for window in windows:
        kind = int(np.searchsorted(lengths, len(window)))
        if kind == len(lengths):
            raise ValueError(f"a window has {len(window)} tokens, and the longest row {lengths[-1]}")
        kinds[kind].append(window)
    return kinds


def _rows(windows: list[Int[np.ndarray, " l"]], length: int) -> list[list[Int[np.ndarray, " l"]]]:
    """Windows in rows: the longest first, then the shortest remaining ones as long as they fit."""
    windows = sorted(windows, key=len, reverse=True)
    rows, first, last = [], 0, len(windows) - 1
    while first <= last:
        row, room = [windows[first]], length - len(windows[first])
        first += 1
        while first <= last and len(windows[last]) <= room:
            room -= len(windows[last])
            row.append(windows[last])
            last -= 1
        rows.append(row)
    return rows


def scores_computed(groups: Groups) -> int:
    """Pairs of query and key for which chunks compute a score, padding and masked pairs included."""
    slots = groups.slots.shape[1]
    per_kind = np.bincount(np.asarray(groups.kind), minlength=len(groups.lengths) + 1)[1:]
    return int(sum(n * (slots // length) * length**2 for n, length in zip(per_kind, groups.lengths, strict=True)))


def scores_needed(numbers: Sequence[Int[np.ndarray, " n"]]) -> int:
    """Pairs of tokens that see each other."""
    return int(sum(np.square(np.bincount(pack[pack >= 0]).astype(np.int64)).sum() for pack in numbers))


@flax.struct.dataclass
class TextRows:
    """The tokens of packs in rows of one clip each, for attention to that clip's text.

    Attributes:
        slots: the token in each slot, and the number of all tokens where it is empty.
        clip: each row's clip, clips numbered through all packs.
        place: each token's slot, and the number of all slots for tokens of no clip.
    """

    slots: Int[Array, "rows slots"]
    clip: Int[Array, " rows"]
    place: Int[Array, " n"]


def text_rows(segments: Int[np.ndarray, "b n"], clips: int, slots: int = 64) -> TextRows:
    """Assigns packs' tokens to rows of one clip each; there are enough rows for any packs of this shape.

    Args:
        segments: of each token, -1 for padding.
        clips: most of a pack.
        slots: of a row.
    """
    batch, tokens = segments.shape
    total, rows = batch * tokens, batch * (tokens // slots + clips)
    table = np.full((rows, slots), total, np.int32)
    clip = np.zeros(rows, np.int32)
    row = 0
    for pack in range(batch):
        for segment in range(clips):
            members = np.flatnonzero(segments[pack] == segment) + pack * tokens
            for first in range(0, len(members), slots):
                part = members[first : first + slots]
                table[row, : len(part)] = part
                clip[row] = pack * clips + segment
                row += 1
    return TextRows(table, clip, _places(table, total))
