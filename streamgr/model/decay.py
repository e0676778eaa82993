"""The forward-decayed count of an id, in fixed point: one word that orders evictions and estimates frequencies.

    L = log2 sum_i 2^(t_i / half life)        (Cormode et al., ICDE 2009: forward decay)

The count as it stands at time t is 2^(L - t / half life), so the order of two ids never changes with time and nothing
ages in the background. A short half life gives LRU, a long one LFU. Everything is integers (20 bits after the point),
because the logarithms of two maths libraries differ in their last bits and then so would the tables.
"""

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]

FRACTION = 20  # bits after the point
NEVER = int(np.iinfo(np.int64).min) // 2  # the score of what has never been seen; far below any other
LATEST_MS = 1 << 46  # later times (past the year 4199) count as this one, so that no product overflows
STEP = 8  # the table below resolves 2^-12
SOFTPLUS = np.rint(np.log2(1 + np.exp2(-np.arange(26 << 12) / 4096.0)) * (1 << FRACTION)).astype(np.int64)


def at(times: I64, half_life_ms: int) -> I64:
    """The score of one event at each time (ms), i64[n]: the time in half lives."""
    t = np.clip(times, 0, LATEST_MS)  # quotient and remainder apart, so that neither overflows
    score: I64 = ((t // half_life_ms) << FRACTION) + ((t % half_life_ms) << FRACTION) // half_life_ms
    return score


def times(count: I64) -> I64:
    """What `count` (>= 1) events at once have more than one, i64[n]."""
    more: I64 = np.rint(np.log2(count) * (1 << FRACTION)).astype(np.int64)
    return more


def counts(most: int) -> I64:
    """`times` of 0 to `most` events, i64[most + 1] (0 of none): a table for who has other logarithms than numpy's."""
    table = np.zeros(most + 1, np.int64)
    table[1:] = times(np.arange(1, most + 1))
    return table


def add(old: I64, seen: I64) -> I64:
    """The score of both together, i64[n]: log2(2^a + 2^b), symmetric."""
    gap = np.minimum(np.abs(old - seen) >> STEP, len(SOFTPLUS) - 1)
    both: I64 = np.maximum(old, seen) + SOFTPLUS[gap]
    return both


def ratio(scores: I64, total: int) -> NDArray[np.float64]:
    """The share f64[n] that each has in a total; 0 for what has never been seen."""
    share: NDArray[np.float64] = np.exp2(np.minimum(scores - total, 0) / (1 << FRACTION))
    return share
