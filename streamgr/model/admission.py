"""Admission: a small count-min sketch that lets an id into the table once it has come often enough.

The error is one-sided: a key whose true count (since the last halving) has reached the threshold is never refused.
Conservative update, the whole batch at once: every cell of a key is raised to its new estimate, so the result does
not depend on the order of the batch. Counts are halved after a fixed number of counted keys, not by any clock.
"""

import numpy as np
from numpy.typing import NDArray

from streamgr.model.hashing import U64, fmix64

ROWS = 4
WIDTH_LIMIT = 1 << 20
LIMIT = int(np.iinfo(np.uint16).max)


class Sketch:
    """Counts of keys without a slot. cells u16[4, width]; `counted` keys since the last halving."""

    def __init__(self, slots: int) -> None:
        self.width = min(WIDTH_LIMIT, 1 << max(8, (slots - 1).bit_length()))
        self.cells = np.zeros((ROWS, self.width), np.uint16)
        self.counted = 0

    def count(self, keys: U64, times: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add `times[i]` to each distinct key, return its estimate i64[n], this batch included."""
        columns = np.empty((ROWS, len(keys)), np.int64)
        white = keys
        for row in range(ROWS):
            white = fmix64(white + np.uint64(row + 1))
            columns[row] = (white & np.uint64(self.width - 1)).astype(np.int64)
        before = np.take_along_axis(self.cells, columns, 1).min(0).astype(np.int64)
        estimate: NDArray[np.int64] = np.minimum(before + times, LIMIT)
        for row in range(ROWS):
            np.maximum.at(self.cells[row], columns[row], estimate.astype(np.uint16))
        self.counted += int(times.sum())
        if self.counted >= 8 * self.width:
            self.cells >>= 1
            self.counted = 0
        return estimate
