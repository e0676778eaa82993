"""Hashing of 64-bit ids: the murmur3 finaliser, a bijection that whitens them, and what is drawn from it.

Sequential and structured ids land as evenly as random ones, and no id is reserved: every u64 is legal. All of it is
integer arithmetic modulo 2^64, so every machine and backend agrees to the bit.

    bits of fmix64(key)   0-31 spare, 32-55 first bucket, 56-63 tag

The buckets of a table twice as large are those of the smaller one with one more bit on top, so growth splits a bucket
in two and moves nothing across.
"""

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

SECOND = np.uint64(0x9E3779B97F4A7C15)
FALLBACK = np.uint64(0xD1B54A32D192ED03)


def fmix64(keys: U64) -> U64:
    """The murmur3 64-bit finaliser, u64[n] -> u64[n], bijective."""
    h: U64 = keys ^ (keys >> np.uint64(33))
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    h ^= h >> np.uint64(33)
    return h


def tags(white: U64) -> U64:
    """One byte of each whitened key, u64[n], 1 to 255: what a bucket is searched by before any key is read."""
    top: U64 = np.maximum(white >> np.uint64(56), np.uint64(1))
    return top


def first_buckets(white: U64, count: int) -> I64:
    """The first bucket, among `count` (a power of two), of each whitened key; i64[n]."""
    return ((white >> np.uint64(32)) & np.uint64(count - 1)).view(np.int64)


def second_buckets(white: U64, count: int) -> I64:
    """The second bucket, never the first where count > 1: the two differ by an odd number's bits."""
    apart = (fmix64(white ^ SECOND) >> np.uint64(32)) | np.uint64(1)
    return (((white >> np.uint64(32)) ^ apart) & np.uint64(count - 1)).view(np.int64)


def fallback_rows(keys: U64, rows: int) -> tuple[I64, I64]:
    """The two shared rows that stand for a key without a slot: one in each half of rows 1..`rows`."""
    half = np.uint64(rows // 2)
    white = fmix64(keys ^ FALLBACK)
    low, high = white & np.uint64(0xFFFFFFFF), white >> np.uint64(32)
    return (low % half).astype(np.int64) + 1, (high % half + half).astype(np.int64) + 1
