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

Rows = tuple[tuple[int, int, int], ...]  # (length, number, clips), ascending; see `Groups`

# To move a slot's token there and its output back, and to project it, takes as long as so many scores: a rough figure.
SLOT = 200
TEXT = 16  # tokens of a clip's text: a rough figure, too
MULTIPLES = (1, 2, 3, 4)  # windows that a row is made for
CLIPS = (1, 2, 3, 4)  # clips whose text a row attends to


@flax.struct.dataclass
class Groups:
    """Where each token of a batch of packs goes, tokens numbered through the packs of their data shard, and clips too.

    Attributes:
        slots: the token in each slot, and the number of a shard's tokens where a slot is empty. Slots are those of the
            rows of the first length, row by row, then those of the next.
        slot_window: which window of its shard a slot's token is in, -1 where it is empty.
        slot_clip: the clip of a slot's token, -1 where it is empty.
        row_clips: the clips of each row's windows, as many a row as `rows` says, and the number of a shard's clips
            where a row has fewer.
        place: each token's slot, and the number of a shard's slots for padding.
        rows: (length, number, clips) of a shard's rows, ascending. A row has windows of at most so many clips; 0 is
            any number, for attention without text.
    """

    slots: Int[Array, "shards slots"]
    slot_window: Int[Array, "shards slots"]
    slot_clip: Int[Array, "shards slots"]
    row_clips: Int[Array, "shards k"]
    place: Int[Array, "shards n"]
    rows: Rows = flax.struct.field(pytree_node=False)


def placed(windows: Int[np.ndarray, "k 2"], rows: Rows) -> Int[np.ndarray, " k"] | None:
    """The first slot of each window, the longest first into the row with the least room that suffices.

    Windows of a clip that are equally long stay together; they count as one of the clips that a row may have.

    Args:
        windows: length and clip of each.
        rows: see `Groups`.

    Returns:
        None if they don't fit.
    """
    lengths, clips = windows.T if rows[0][2] else (windows[:, 0], np.zeros(len(windows), np.int64))
    # By the room that is left in a row and how many more clips it may have, where that room begins.
    free: dict[tuple[int, int], list[int]] = {}
    start = 0
    for length, number, most in rows:
        free[length, most or len(windows) + 1] = list(range(start, start + length * number, length))
        start += length * number
    order = np.lexsort((clips, -lengths))
    begins = np.flatnonzero(np.diff(lengths[order], prepend=-1) | np.diff(clips[order], prepend=-1))
    together = lengths[order[begins]].tolist(), np.diff(begins, append=len(order)).tolist()
    first: list[int] = []
    for length, count in zip(*together, strict=True):
        while count:
            key = min((key for key, starts in free.items() if starts and key[0] >= length), default=None)
            if key is None:
                return None
            room, most = key
            each = room // length
            used = min(len(free[key]), -(-count // each))
            starts, free[key] = free[key][:used], free[key][used:]
            for row in starts:
                held = min(each, count)
                first += range(row, row + held * length, length)
                count -= held
                if room > held * length and most > 1:
                    free.setdefault((room - held * length, most - 1), []).append(row + held * length)
    found = np.empty(len(windows), np.int64)
    found[order] = first
    return found


def choose_rows(shards: Sequence[Int[np.ndarray, "k 2"]], most: int = 2, text: bool = False) -> Rows:
    """The cheapest rows, of at most `most` lengths, that hold the windows of any of these data shards.

    Args:
        shards: of each shard, length and clip of its windows.
        most: an attention is compiled for each length.
        text: whether rows attend to their clips' text.
    """
    windows = np.concatenate(shards)[:, 0]
    if not len(windows):
        return ((1, 1, int(text)),)
    different = np.unique(windows).tolist()
    options = {(multiple * length,) for multiple in MULTIPLES for length in different}
    options |= {
        tuple(multiple * length for length in choose_lengths(windows, count))
        for count in range(2, most + 1)
        for multiple in MULTIPLES
    }
    bounds = sorted(
        (max(_least(lengths, clips, each[:, 0]) for each in shards), lengths, clips)
        for lengths in options
        if lengths[-1] >= different[-1]
        for clips in (CLIPS if text else (0,))
    )
    best: Rows | None = None
    for bound, lengths, clips in bounds:
        if best is not None and bound >= cost(best):
            break
        rows = _enough(lengths, clips, shards)
        best = rows if best is None else min(best, rows, key=cost)
    return best


def _least(lengths: tuple[int, ...], clips: int, windows: Int[np.ndarray, " k"]) -> float:
    """What rows of these lengths cost at least: as much as if nothing but windows were in them."""
    shortest = np.array(lengths)[np.searchsorted(lengths, windows)]
    return float((windows * (shortest + clips * TEXT * (1 + SLOT / 2 / lengths[-1]) + SLOT)).sum())


def cost(rows: Rows) -> int:
    """Of attention over all rows and of moving their slots and texts, in scores."""
    return sum(
        number * (length * (length + clips * TEXT + SLOT) + clips * TEXT * SLOT // 2) for length, number, clips in rows
    )


def _enough(lengths: tuple[int, ...], clips: int, shards: Sequence[Int[np.ndarray, "k 2"]]) -> Rows:
    """As many rows of these lengths as hold the windows of any shard, as few long ones as possible."""
    rows: Rows = ()
    for length, shorter in zip(reversed(lengths), [*reversed(lengths[:-1]), 0], strict=True):
        # The longer windows, which no shorter row holds. What is left in longer rows is used first.
        those = [windows[windows[:, 0] > shorter] for windows in shards]
        room = sum(length * number for length, number, _ in rows)
        number = max(0, math.ceil((max(int(windows[:, 0].sum()) for windows in those) - room) / length))
        for windows in those:
            while placed(windows, ((length, number, clips), *rows)) is None:
                number += 1 + number // 64  # one by one would take long where there are many
        rows = ((length, number, clips), *rows) if number else rows
    while any(placed(windows, rows) is None for windows in shards):  # more rows may be filled in a worse way
        rows = (*rows[:-1], (rows[-1][0], rows[-1][1] + 1, clips))
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


def group(
    numbers: Int[np.ndarray, "b n"], segments: Int[np.ndarray, "b n"], clips: int, rows: Rows, shards: int = 1
) -> Groups:
    """Assigns the windows of a batch of packs to rows.

    Args:
        numbers: of each token its window in its pack, as `windows.window_numbers` gives them, -1 for padding.
        segments: of each token its clip in its pack.
        clips: most of a pack.
        rows: of each shard.
        shards: data shards, which have equal parts of the packs.

    Raises:
        ValueError: if the windows of a shard don't fit.
    """
    total, size = numbers.size // shards, sum(length * number for length, number, _ in rows)
    table = np.full((shards, size), total, np.int32)
    slot_window, slot_clip = np.full((2, shards, size), -1, np.int32)
    for shard, (packs, parts) in enumerate(zip(*(np.split(x, shards) for x in (numbers, segments)), strict=True)):
        offsets = np.cumsum([0, *(packs.max(axis=1) + 1)[:-1]])
        flat = np.where(packs >= 0, packs + offsets[:, None], -1).ravel()
        clip = (parts + clips * np.arange(len(parts))[:, None]).ravel()
        order, counts = _by_number(flat)
        lengths = counts[counts > 0]
        starts = np.cumsum(lengths) - lengths
        first = placed(np.stack([lengths, clip[order][starts]], axis=-1), rows)
        if first is None:
            raise ValueError(f"{len(lengths)} windows of up to {lengths.max()} tokens don't fit rows of {rows}")
        slots = np.repeat(first - starts, lengths) + np.arange(len(order))
        table[shard, slots], slot_window[shard, slots], slot_clip[shard, slots] = order, flat[order], clip[order]
    row_clips = _row_clips(slot_clip, clips * len(numbers) // shards, rows)
    return Groups(table, slot_window, slot_clip, row_clips, _places(table, total), rows)


def _row_clips(slot_clip: Int[np.ndarray, "shards slots"], none: int, rows: Rows) -> Int[np.ndarray, "shards k"]:
    """See `Groups`; `none` is where a row has fewer."""
    found = []
    ends = np.cumsum([length * number for length, number, _ in rows])[:-1]
    for part, (length, number, most) in zip(np.split(slot_clip, ends, axis=1), rows, strict=True):
        # Each clip once, the others as `none`, in ascending order.
        held = np.sort(np.where(part < 0, none, part).reshape(len(part), number, length))
        held[..., 1:] = np.where(held[..., 1:] == held[..., :-1], none, held[..., 1:])
        held = np.sort(held)[..., :most]
        missing = np.full((len(part), number, most - held.shape[-1]), none)
        found.append(np.concatenate([held, missing], axis=-1).reshape(len(part), -1))
    return np.concatenate(found, axis=1).astype(np.int32)


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
    return len(groups.slots) * sum(number * length**2 for length, number, _ in groups.rows)


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
    options = {length for length in options if length >= TEXT} or options

    def rows(length: int) -> tuple[int, int]:
        return length, max(text_rows_needed(tokens, length) for tokens in shards)

    # Each row has keys and values of a text of its own, about as many as `2 * TEXT`.
    return min(map(rows, sorted(options)), key=lambda row: row[1] * (row[0] + 2 * TEXT))


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
