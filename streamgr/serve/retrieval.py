"""Exact retrieval: every live item against one query, best first under one total order.

Similarity is the cosine that training used: the query arrives normalised, the items' inverse norms are kept beside
the table. Rows are read in blocks, so that the extra memory does not grow with the table. Ties are broken by the
item's key: the same weights and the same history give the same answer everywhere.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_ROWS = 16_384


def similarities(
    query: torch.Tensor, weight: torch.Tensor, inverse_norms: torch.Tensor, rows: torch.Tensor
) -> NDArray[np.float32]:
    """Cosine of `query` f32[D] (normalised) with the table's `rows` i64[k]; f32[k].

    weight f32[R, D], inverse_norms f32[R].
    """
    out = torch.empty(len(rows), dtype=torch.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        torch.mv(weight.index_select(0, block), query, out=out[start : start + len(block)])
    result: NDArray[np.float32] = (out * inverse_norms.index_select(0, rows)).numpy()
    return result


def best_first(scores: NDArray[np.float32], keys: NDArray[np.uint64], first: int) -> Iterator[int]:
    """The indices of `scores` f32[k] from the best down, ties by `keys` u64[k] ascending.

    Lazy: sorts about `first` of them, and more only when more are asked for.
    """
    done, want = 0, max(1, first)
    while done < len(scores):
        if want < len(scores):
            threshold = np.partition(scores, len(scores) - want)[len(scores) - want]
            head = np.flatnonzero(scores >= threshold)  # a prefix of the total order: ties at its edge are all in it
        else:
            head = np.arange(len(scores))
        order = head[np.lexsort((keys[head], -scores[head]))]
        yield from order[done:].tolist()
        done, want = len(order), want * 8
