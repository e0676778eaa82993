"""Jagged batches on a CPU: sequences of like length side by side in small padded blocks.

A block is sized so that its score matrix stays in the processor's cache; sorted by length first, so that little of it
is padding. Each token lies in exactly one block, so results are scattered, never summed: no order to depend on.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAIRS_A_BLOCK = 1 << 19
PADDING = 1.25  # the longest sequence of a block is at most this much longer than its shortest


@dataclass(frozen=True, slots=True)
class Block:
    """Some sequences of a jagged batch, padded to one length.

    tokens i64[b, n]: which token of the batch stands there (the sequence's first in padding); real bool[b, n].
    """

    tokens: NDArray[np.int64]
    real: NDArray[np.bool_]


def blocks(offsets: NDArray[np.int64], pairs: int = PAIRS_A_BLOCK) -> Iterator[Block]:
    """Cut the batch with these offsets i64[B+1] into blocks of about `pairs` pairs; empty sequences vanish."""
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    start = 0
    while start < len(order):
        shortest, end = lengths[order[start]], start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] ** 2 <= pairs:
            if lengths[order[end]] > PADDING * shortest + 4:
                break
            end += 1
        chosen = order[start:end]
        column = np.arange(lengths[chosen[-1]])
        real = column < lengths[chosen][:, None]
        yield Block(np.where(real, column, 0) + offsets[chosen][:, None], real)
        start = end


def pad(offsets: NDArray[np.int64]) -> Block:
    """The whole batch as one block: the plain twin of `blocks`."""
    lengths = np.diff(offsets)
    column = np.arange(lengths.max(initial=0))
    real = column < lengths[:, None]
    first = np.minimum(offsets[:-1], max(int(offsets[-1]) - 1, 0))
    return Block(np.where(real, column, 0) + first[:, None], real)
