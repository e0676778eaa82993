"""Exact retrieval: every live item against the queries, best first under one total order.

Similarity is the cosine that training used: queries arrive normalised, the items' inverse norms are kept beside the
table. Rows are read in blocks, and of each block only what may still be among the best k is kept, so the extra memory
grows with k and not with the table. Ties are broken by the item's key: the same weights and the same history give the
same answer everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamgr.model.hashing import U64

BLOCK_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class Items:
    """What is searched: the table's weight f32[R, D] and inverse_norms f32[R]; rows i64[n] and keys u64[n] of items."""

    weight: Tensor
    inverse_norms: Tensor
    rows: Tensor
    keys: U64

    def similarities(self, queries: Tensor, start: int, end: int) -> NDArray[np.float32]:
        """Cosines f32[b, end - start] of normalised queries f32[b, D] with the items `start` to `end`."""
        rows = self.rows[start:end]
        scores = queries @ self.weight.index_select(0, rows).T * self.inverse_norms.index_select(0, rows)
        result: NDArray[np.float32] = scores.numpy()
        return result


@dataclass(slots=True)
class Best:
    """The best k so far: scores f32[<= k] and index i64[<= k] of the items, best first; ties by key, ascending."""

    k: int
    scores: NDArray[np.float32]
    index: NDArray[np.int64]

    def offer(self, scores: NDArray[np.float32], start: int, keys: U64, without: U64) -> None:
        """Take in the items from `start` on, but for those that are in `without`."""
        floor = self.scores[-1] if len(self.scores) == self.k else -np.inf
        new = np.flatnonzero(scores >= floor)
        if len(without):
            new = new[~np.isin(keys[start + new], without)]
        scores, index = np.concatenate([self.scores, scores[new]]), np.concatenate([self.index, start + new])
        if len(scores) > self.k:
            edge = np.partition(scores, len(scores) - self.k)[len(scores) - self.k]
            head = np.flatnonzero(scores >= edge)  # ties at the edge are all in it
            scores, index = scores[head], index[head]
        order = np.lexsort((keys[index], -scores))[: self.k]
        self.scores, self.index = scores[order], index[order]


def nearest(queries: Tensor, items: Items, k: int, without: Sequence[U64] = ()) -> list[Best]:
    """The best k >= 1 items of each query f32[b, D] (of length 1); without[i] u64[*]: keys that query i leaves out."""
    best = [Best(k, np.zeros(0, np.float32), np.zeros(0, np.int64)) for _ in range(len(queries))]
    nothing = np.zeros(0, np.uint64)
    for start in range(0, len(items.rows), BLOCK_ROWS):
        scores = items.similarities(queries, start, start + BLOCK_ROWS)
        for i, held in enumerate(best):
            held.offer(scores[i], start, items.keys, without[i] if without else nothing)
    return best
