"""NumPy's random numbers of many generators at once: making a generator takes longer than reading a small clip."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# Of NumPy's SeedSequence (M. E. O'Neill's seed_seq_fe), 32 bits each.
POOL = 4
INIT_A, MULT_A, INIT_B, MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
MIX_L, MIX_R, SHIFT = 0xCA01F9DD, 0x4973F715, np.uint32(16)
# Of PCG64, 128 bits.
MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
LOW32, LOW64 = 2**32 - 1, 2**64 - 1

Wide = tuple[np.ndarray, np.ndarray]  # numbers of 128 bits: their upper and lower 64


def uniform(before: Sequence[int], numbers: Sequence[int], after: Sequence[int] = ()) -> Float[np.ndarray, " n"]:
    """`np.random.default_rng([*before, number, *after]).random()` of each number, to the last bit.

    NumPy promises that SeedSequence and PCG64 stay as they are.

    Args:
        before, after: what all seeds have.
        numbers: what differs.
    """
    if max(*before, *numbers, *after, 0) > LOW32:  # SeedSequence makes several words of one
        return np.array([np.random.default_rng([*before, number, *after]).random() for number in numbers])
    words = [*map(np.uint32, before), np.array(numbers, np.uint32), *map(np.uint32, after)]
    with np.errstate(over="ignore"):
        return _first(_state(_pool(words, len(numbers))))


def _pool(entropy: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """SeedSequence's pool, of words of entropy."""
    constant = INIT_A

    def hashed(value: np.ndarray) -> np.ndarray:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * MULT_A & LOW32
        value = value * np.uint32(constant)
        return value ^ (value >> SHIFT)

    def mixed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = np.uint32(MIX_L) * x - np.uint32(MIX_R) * y
        return result ^ (result >> SHIFT)

    zero = np.zeros(count, np.uint32)
    words = [zero + word for word in entropy] + [zero] * max(0, POOL - len(entropy))
    pool = [hashed(word) for word in words[:POOL]]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for word in words[POOL:]:
        for target in range(POOL):
            pool[target] = mixed(pool[target], hashed(word))
    return pool


def _state(pool: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Four words of 64 bits, as SeedSequence makes them of its pool."""
    constant, words = INIT_B, []
    for number in range(8):
        value = pool[number % POOL] ^ np.uint32(constant)
        constant = constant * MULT_B & LOW32
        value = value * np.uint32(constant)
        words.append((value ^ (value >> SHIFT)).astype(np.uint64))
    return [words[2 * number] | words[2 * number + 1] << np.uint64(32) for number in range(4)]


def _first(state: Sequence[np.ndarray]) -> Float[np.ndarray, " n"]:
    """The first number in [0, 1) of PCG64 with these seeds."""
    start, stream = (state[0], state[1]), (state[2], state[3])
    one, top = np.uint64(1), np.uint64(63)
    increment = stream[0] << one | stream[1] >> top, stream[1] << one | one
    # Seeding takes a step from 0, adds the start and takes another; drawing takes a third.
    value = _sum(increment, start)
    for _ in range(2):
        value = _sum(_times_multiplier(value), increment)
    turn = value[0] >> np.uint64(58)
    folded = value[0] ^ value[1]
    drawn = folded >> turn | folded << (np.uint64(64) - turn & top)
    return (drawn >> np.uint64(11)) * 2.0**-53


def _sum(a: Wide, b: Wide) -> Wide:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _times_multiplier(a: Wide) -> Wide:
    half, mask = np.uint64(32), np.uint64(LOW32)
    high, low = np.uint64(MULTIPLIER >> 64), np.uint64(MULTIPLIER & LOW64)
    # The lower 64 bits of both as two halves, for the upper half of their product.
    a1, a0, b1, b0 = a[1] >> half, a[1] & mask, low >> half, low & mask
    middle = a1 * b0 + (a0 * b0 >> half)
    carried = (middle & mask) + a0 * b1
    upper = a1 * b1 + (middle >> half) + (carried >> half)
    return upper + a[0] * low + a[1] * high, a[1] * low
