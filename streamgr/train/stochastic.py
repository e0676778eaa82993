"""Stochastic length (arXiv 2402.17152, section 2.2.1): learn long histories from a part of them, a new one each time.

    threshold = N^(alpha / 2)        N: `sequence.history_length`
    a history of n > threshold rows is learned whole with probability N^alpha / n^2, else from `threshold` of its rows

so a step costs O(N^alpha) instead of O(N^2) a user. Rows are drawn without repetition, by weights that fall with their
age, w = 1 - age / sum of ages; targets stay, and with them the impressions of their requests, which say when those
were. Only the lesson is shortened: judged, and served, is the whole history.
"""

from dataclasses import replace

import numpy as np

from streamgr.events import IMPRESSION
from streamgr.sequence.examples import Example


def shorten(example: Example, alpha: float, longest: int, rng: np.random.Generator) -> Example:
    """The example as it is learned this time; itself where it is short, or lucky. longest: N."""
    history, n = example.history, len(example.history)
    threshold = int(longest ** (alpha / 2))
    if n <= threshold or rng.random() < longest**alpha / n**2:
        return example
    stays = np.zeros(n, bool)
    stays[example.target_index] = True
    asked = np.unique(history.requests[example.target_index])
    stays |= (history.kinds == IMPRESSION) & (history.requests != 0) & np.isin(history.requests, asked)
    others = np.flatnonzero(~stays)
    count = min(max(0, threshold - (n - len(others))), len(others))
    age = (history.times[-1] - history.times[others]).astype(np.float64)
    weight = 1 - age / max(1.0, float(age.sum()))
    race = np.log(np.maximum(weight, 1e-12)) + rng.gumbel(size=len(others))  # the largest: a draw by weight, unrepeated
    stays[others[np.argpartition(race, len(others) - count)[len(others) - count :]]] = True
    rows = np.flatnonzero(stays)
    return replace(
        example, history=history.take(rows), target_index=np.searchsorted(rows, example.target_index).astype(np.int64)
    )
