"""Measures of predictions, pure: columns in, one number out; None where a measure is undefined, never a guess.

Normalized entropy (NE) and AUC judge probabilities of one action kind; hit rate and NDCG judge the rank of the true
item. Ranks start at 1; a rank below 1 means "not found". Ties count against the ranker (`pessimistic_rank`), or a
constant scorer would win.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPSILON = 1e-7  # a probability of exactly 0 or 1 would cost infinitely much once it is wrong


def base_rate(labels: ArrayLike) -> float | None:
    """The share of positives; None without labels."""
    y = np.asarray(labels, np.float64)
    return float(y.mean()) if len(y) else None


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Mean of -(y ln p + (1-y) ln(1-p)) in nats; None without labels."""
    y, p = _paired(labels, probabilities)
    if not len(y):
        return None
    p = np.clip(p, EPSILON, 1 - EPSILON)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


def normalized_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Log loss divided by the entropy of these labels' base rate: 1 is no better than the base rate, lower is better.

    None where the labels are all the same (nothing to divide by).
    """
    rate, loss = base_rate(labels), log_loss(labels, probabilities)
    if rate is None or loss is None or rate in (0.0, 1.0):
        return None
    return loss / -(rate * float(np.log(rate)) + (1 - rate) * float(np.log1p(-rate)))


def auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """The chance that a positive scores above a negative, ties half; None where either is missing."""
    y, s = _paired(labels, scores)
    positive = y > 0
    n_positive = int(positive.sum())
    n_negative = len(y) - n_positive
    if not n_positive or not n_negative:
        return None
    _, place, count = np.unique(s, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    rank = (last - (count - 1) / 2)[place]  # the mean of the 1-based ranks that equal scores share
    return float((rank[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def calibration(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Sum of predicted over number of seen positives: 1 is calibrated; None without positives."""
    y, p = _paired(labels, probabilities)
    return float(p.sum() / y.sum()) if y.sum() else None


def hit_rate(ranks: Sequence[int] | NDArray[np.int64], k: int = 10) -> float | None:
    """The share of ranks in 1..k; None without ranks."""
    r = np.asarray(ranks, np.int64)
    return float(((r >= 1) & (r <= k)).mean()) if len(r) else None


def ndcg(ranks: Sequence[int] | NDArray[np.int64], k: int = 10) -> float | None:
    """Mean of 1/log2(rank + 1) for ranks in 1..k, else 0: one relevant item a query; None without ranks."""
    r = np.asarray(ranks, np.int64)
    found = (r >= 1) & (r <= k)
    gains = np.zeros(len(r))
    gains[found] = 1 / np.log2(r[found] + 1)
    return float(gains.mean()) if len(r) else None


def pessimistic_rank(scores: ArrayLike, true_index: int) -> int:
    """The rank of one item among all: 1 + how many others score at least as high."""
    s = np.asarray(scores)
    return int((s >= s[true_index]).sum())


def _paired(labels: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y, v = np.asarray(labels, np.float64), np.asarray(values, np.float64)
    if y.shape != v.shape or y.ndim != 1:
        raise ValueError(f"labels {y.shape} and values {v.shape} must be columns of one length")
    return y, v
