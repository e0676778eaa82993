"""The digest of a table's whole state, kept at the cost of what changes: so each version proves all that is served.

    H(row) = fmix64(fmix64(key + row C) + until D + field E + sum_i word_i odd_i)     of the row as the wire has it
    digest = sum of H over all rows held, modulo 2^64

A sum needs no order, and a row that changes takes its old term out and puts its new one in. The publisher keeps one sum
over what it has published and writes it into each manifest; a reader keeps one over what it has applied, and serves
nothing whose sum is not the manifest's. A single changed word always shows; anything else is missed once in 2^64. It
guards against loss and mistakes, not against forgery: the chunks' sha256 are what a version's bytes are held to.

A snapshot begins again at nothing: it holds every row that a reader then has.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgr.model.hashing import U64, fmix64

ROW, UNTIL, FIELD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
BLOCK = 1 << 12  # rows hashed together: their words stay in the cache


def row_hashes(part: Mapping[str, Tensor]) -> U64:
    """u64[n] of rows as `IdTable.rows` gives them."""
    n = len(part["rows"])
    if not n:
        return np.zeros(0, np.uint64)
    rows, keys, until = (part[name].numpy().view(np.uint64) for name in ("rows", "keys", "until_ms"))
    field = part["field"].numpy().astype(np.uint64)
    raw: NDArray[np.uint8] = part["weight"].contiguous().view(torch.uint8).numpy().reshape(n, -1)
    if spare := -raw.shape[1] % 8:
        raw = np.concatenate([raw, np.zeros((n, spare), np.uint8)], 1)
    words = np.ascontiguousarray(raw).view(np.uint64)
    odd = fmix64(np.arange(1, words.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    inner = fmix64(keys + rows * ROW) + until * UNTIL + field * FIELD
    for at in range(0, n, BLOCK):
        inner[at : at + BLOCK] += (words[at : at + BLOCK] * odd).sum(1, dtype=np.uint64)
    return fmix64(inner)


class StateDigest:
    """The running sum over a table of `rows` rows. One owner."""

    def __init__(self, rows: int) -> None:
        self.clear(rows)

    @property
    def text(self) -> str:
        """16 hex digits."""
        return f"{int(self._sum):016x}"

    def replace(self, rows: NDArray[np.int64], hashes: U64) -> U64:
        """These distinct rows i64[n] now hold this, u64[n]; returns what they held, which undoes it."""
        before = self.hashes[rows]
        with np.errstate(over="ignore"):
            self._sum += hashes.sum(dtype=np.uint64) - before.sum(dtype=np.uint64)
        self.hashes[rows] = hashes
        return before

    def clear(self, rows: int) -> None:
        """Nothing is held any more, by a table of so many rows: a snapshot begins."""
        self.hashes: U64 = np.zeros(rows, np.uint64)  # of each row's bytes; 0: holds nothing
        self._sum = np.uint64(0)
