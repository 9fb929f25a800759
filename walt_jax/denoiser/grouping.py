"""Windows of any size in rows of static shape, for attention on packs; the host assigns them once a batch.

The windows of a data shard, the packs of one device, have many lengths. There is a fixed number of rows of each of a
few lengths; a row holds a window, or several under a mask. Lengths and numbers are chosen once, from packs like those
that will come: the shapes of a batch do not depend on its clips, so no two processes can disagree about them.
"""

import math
from collections.abc import Sequence

import flax.struct
import numpy as np
from jaxtyping import Array, Int

Rows = tuple[tuple[int, int], ...]  # (length, number), ascending

# To move a slot's query, key and value there and its output back takes as long as so many scores: a rough figure.
SLOT = 64
MULTIPLES = (1, 2, 4)  # windows that a row is made for


@flax.struct.dataclass
class Groups:
    """Where each token of a batch of packs goes, tokens numbered through the packs of their data shard.

    Attributes:
        slots: the token in each slot, and the number of a shard's tokens where a slot is empty. Slots are those of the
            rows of the first length, row by row, then those of the next.
        row_window: which window of its shard a slot's token is in, -1 where it is empty.
        place: each token's slot, and the number of a shard's slots for tokens in no window.
        rows: (length, number) of a shard's rows, ascending.
    """

    slots: Int[Array, "shards slots"]
    row_window: Int[Array, "shards slots"]
    place: Int[Array, "shards n"]
    rows: Rows = flax.struct.field(pytree_node=False)


def placed(windows: Int[np.ndarray, " k"], rows: Rows) -> Int[np.ndarray, " k"] | None:
    """The first slot of each window, the longest first into the row with the least room that suffices.

    Args:
        windows: their lengths.
        rows: see `Groups`.

    Returns:
        None if they don't fit.
    """
    free: dict[int, list[int]] = {}  # by the room that is left in a row, where it begins
    start = 0
    for length, number in rows:
        free[length] = list(range(start, start + length * number, length))
        start += length * number
    first = np.empty(len(windows), np.int64)
    for length in np.unique(windows)[::-1].tolist():
        members = np.flatnonzero(windows == length)
        while len(members):
            room = min((room for room, starts in free.items() if room >= length and starts), default=None)
            if room is None:
                return None
            each = room // length
            used = min(len(free[room]), math.ceil(len(members) / each))
            starts, free[room] = free[room][:used], free[room][used:]
            count = min(len(members), used * each)
            slots = (np.array(starts)[:, None] + length * np.arange(each)[None]).ravel()
            first[members[:count]] = slots[:count]
            members = members[count:]
            last = count - (used - 1) * each  # windows in the last of these rows
            for row, held in zip(starts, [each] * (used - 1) + [last], strict=True):
                if room > held * length:
                    free.setdefault(room - held * length, []).append(row + held * length)
    return first


def choose_rows(shards: Sequence[Int[np.ndarray, " k"]], most: int = 2) -> Rows:
    """The cheapest rows, of at most `most` lengths, that hold the windows of any of these data shards.

    Args:
        shards: of each shard, the lengths of its windows.
        most: an attention is compiled for each length.
    """
    windows = np.concatenate(shards)
    if not len(windows):
        return ((1, 1),)
    options = {
        tuple(multiple * length for length in choose_lengths(windows, count))
        for count in range(1, most + 1)
        for multiple in MULTIPLES
    }
    return min((_enough(lengths, shards) for lengths in sorted(options)), key=cost)


def cost(rows: Rows) -> int:
    """Of attention over all rows and of moving their slots, in scores."""
    return sum(number * length * (length + SLOT) for length, number in rows)


def _enough(lengths: tuple[int, ...], shards: Sequence[Int[np.ndarray, " k"]]) -> Rows:
    """As many rows of these lengths as hold the windows of any shard, as few long ones as possible."""
    rows: Rows = ()
    for length, shorter in zip(reversed(lengths), [*reversed(lengths[:-1]), 0], strict=True):
        # The longer windows, which no shorter row holds. What is left in longer rows is used first.
        those = [windows[windows > shorter] for windows in shards]
        room = sum(length * number for length, number in rows)
        number = max(0, math.ceil((max(int(windows.sum()) for windows in those) - room) / length))
        for windows in those:
            while placed(windows, ((length, number), *rows)) is None:
                number += 1
        rows = ((length, number), *rows) if number else rows
    while any(placed(windows, rows) is None for windows in shards):  # more rows may be filled in a worse way
        rows = (*rows[:-1], (rows[-1][0], rows[-1][1] + 1))
    return rows


def choose_lengths(windows: Sequence[int], most: int) -> tuple[int, ...]:
    """At most `most` row lengths, ascending, that minimise the scores of windows in a row each.

    Args:
        windows: lengths of windows as they occur in the data, the longest among them.
        most: lengths.
    """
    lengths, counts = np.unique(np.asarray(windows), return_counts=True)
    until = np.cumsum(counts)
    # best[last] = (score products, lengths) for windows up to the `last`-th length, which is the longest row's.
    best = [(int(until[last] * length**2), (int(length),)) for last, length in enumerate(lengths)]
    for _ in range(most - 1):
        best = [
            min(
                [best[last]]
                + [
                    (best[b][0] + int((until[last] - until[b]) * length**2), (*best[b][1], int(length)))
                    for b in range(last)
                ]
            )
            for last, length in enumerate(lengths)
        ]
    return best[-1][1]


def group(numbers: Int[np.ndarray, "b n"], rows: Rows, shards: int = 1) -> Groups:
    """Assigns the windows of a batch of packs to rows.

    Args:
        numbers: of each token its window in its pack, as `windows.window_numbers` gives them, -1 for none.
        rows: of each shard.
        shards: data shards, which have equal parts of the packs.

    Raises:
        ValueError: if the windows of a shard don't fit.
    """
    total, size = numbers.size // shards, sum(length * number for length, number in rows)
    table = np.full((shards, size), total, np.int32)
    row_window = np.full((shards, size), -1, np.int32)
    for shard, packs in enumerate(np.split(numbers, shards)):
        offsets = np.cumsum([0, *(packs.max(axis=1) + 1)[:-1]])
        flat = np.where(packs >= 0, packs + offsets[:, None], -1).ravel()
        order, counts = _by_number(flat)
        windows = counts[counts > 0]
        first = placed(windows, rows)
        if first is None:
            raise ValueError(f"{len(windows)} windows of up to {windows.max()} tokens don't fit rows of {rows}")
        rank = np.arange(len(order)) - np.repeat(np.cumsum(windows) - windows, windows)
        slots = np.repeat(first, windows) + rank
        table[shard, slots], row_window[shard, slots] = order, flat[order]
    return Groups(table, row_window, _places(table, total), rows)


def _by_number(numbers: Int[np.ndarray, " n"], least: int = 0) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " m"]]:
    """(indices of the numbers from 0 on, of equal ones in their order, how often each occurs, of at least so many)"""
    inside = np.flatnonzero(numbers >= 0)
    found = numbers[inside]
    counts = np.bincount(found, minlength=least)
    if len(counts) <= 2**16:
        found = found.astype(np.uint16)  # NumPy sorts 16 bits by their digits
    return inside[np.argsort(found, kind="stable")], counts


def _places(slots: Int[np.ndarray, "shards *slots"], tokens: int) -> Int[np.ndarray, "shards n"]:
    """Each token's slot, and the number of all slots for tokens that have none: the inverse of `slots`."""
    slots = slots.reshape(len(slots), -1)
    places = np.full((len(slots), tokens + 1), slots.shape[1], np.int32)  # the last one is that of empty slots
    np.put_along_axis(places, slots, np.arange(slots.shape[1], dtype=np.int32)[None], axis=1)
    return places[:, :-1]


def scores_computed(groups: Groups) -> int:
    """Pairs of query and key for which rows compute a score, padding and masked pairs included."""
    return len(groups.slots) * sum(number * length**2 for length, number in groups.rows)


@flax.struct.dataclass
class TextRows:
    """The tokens of packs in rows of one clip each, for attention to that clip's text.

    Attributes:
        slots: the token in each slot, numbered as in `Groups`, and the number of a shard's tokens where it is empty.
        clip: each row's clip, clips numbered through the packs of a shard.
        place: each token's slot, and the number of a shard's slots for tokens of no clip.
    """

    slots: Int[Array, "shards rows slots"]
    clip: Int[Array, "shards rows"]
    place: Int[Array, "shards n"]


def choose_text_rows(shards: Sequence[Int[np.ndarray, " k"]]) -> tuple[int, int]:
    """The cheapest (length, number) of rows that hold the clips of any of these data shards.

    Args:
        shards: of each shard, the tokens of its clips.
    """
    clips = np.unique(np.concatenate(shards))
    if not len(clips):
        return 1, 1
    options = {-(-int(tokens) // parts) for tokens in clips for parts in range(1, 9)}
    options = {length for length in options if length >= SLOT // 4} or options

    def rows(length: int) -> tuple[int, int]:
        return length, max(text_rows_needed(tokens, length) for tokens in shards)

    # Each row has keys and values of a text of its own, about as many as `SLOT // 2`.
    return min(map(rows, sorted(options)), key=lambda row: row[1] * (row[0] + SLOT // 2))


def text_rows_needed(clips: Int[np.ndarray, " k"], length: int) -> int:
    """Rows that clips of so many tokens take."""
    return int(np.ceil(clips / length).sum())


def text_rows(segments: Int[np.ndarray, "b n"], clips: int, rows: tuple[int, int], shards: int = 1) -> TextRows:
    """Assigns packs' tokens to rows of one clip each.

    Args:
        segments: of each token, -1 for padding.
        clips: most of a pack.
        rows: (length, number) of each shard.
        shards: data shards, which have equal parts of the packs.

    Raises:
        ValueError: if the clips of a shard don't fit.
    """
    length, number = rows
    batch, total = len(segments) // shards, segments.size // shards
    table = np.full((shards, number * length), total, np.int32)
    clip = np.zeros((shards, number), np.int32)
    for shard, packs in enumerate(np.split(segments, shards)):
        flat = np.where(packs >= 0, packs + clips * np.arange(batch)[:, None], -1).ravel()
        order, tokens = _by_number(flat, batch * clips)
        needed = -(-tokens // length)
        if needed.sum() > number:
            raise ValueError(f"{np.count_nonzero(tokens)} clips don't fit {number} rows of {length} tokens")
        clip[shard, : needed.sum()] = np.repeat(np.arange(batch * clips), needed)
        rank = np.arange(len(order)) - np.repeat(np.cumsum(tokens) - tokens, tokens)
        table[shard, np.repeat(length * (np.cumsum(needed) - needed), tokens) + rank] = order
    return TextRows(table.reshape(shards, number, length), clip, _places(table, total))
