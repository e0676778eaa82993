"""Hashing of 64-bit ids: the murmur3 finaliser, a bijection that whitens them, and what is drawn from it.

Sequential and structured ids land as evenly as random ones, and no id is reserved: every u64 is legal. All of it is
integer arithmetic modulo 2^64, so every machine and backend agrees to the bit.
"""

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

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


def buckets(keys: U64, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The two buckets, among `count` (a power of two), where each key may live; different where count > 1."""
    mask = np.uint64(count - 1)
    white = fmix64(keys)
    first = (white >> np.uint64(32)) & mask
    second = (fmix64(white ^ SECOND) >> np.uint64(32)) & mask
    second = np.where(second == first, (first + np.uint64(1)) & mask, second)
    return first.astype(np.int64), second.astype(np.int64)


def fallback_rows(keys: U64, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The two shared rows that stand for a key without a slot: one in each half of rows 1..`rows`."""
    half = np.uint64(rows // 2)
    white = fmix64(keys ^ FALLBACK)
    low, high = white & np.uint64(0xFFFFFFFF), white >> np.uint64(32)
    return (low % half).astype(np.int64) + 1, (high % half + half).astype(np.int64) + 1
