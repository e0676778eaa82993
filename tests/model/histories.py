"""Random histories for the model's tests."""

import numpy as np

from streamgr.events import FIRST_ACTION, IMPRESSION, PROFILE, History

START = 1_700_000_000_000
ACTIONS = 2


def random_history(n: int, seed: int, *, span_ms: int = 60_000, requests: int | None = None) -> History:
    """Impressions in requests of several items, actions, ties in time, and ids that repeat."""
    r = np.random.default_rng(seed)
    kinds = r.integers(IMPRESSION, FIRST_ACTION + ACTIONS, n).astype(np.uint8)
    asked = r.integers(0, max(n // 3, 1) + 1 if requests is None else requests, n).astype(np.uint64)
    times = START + np.sort(r.integers(0, span_ms, n) // 7 * 7)
    return History(kinds, r.integers(1, 50, n).astype(np.uint64), times, np.where(kinds == IMPRESSION, asked, 0))


def cut(history: History, n: int) -> History:
    """The first n events."""
    return History(history.kinds[:n], history.items[:n], history.times[:n], history.requests[:n])


def acted_history(n: int, seed: int, *, window_ms: int, items: int = 6) -> History:
    """Few items shown again and again, acted on within and beyond the window, by request or not, and profiles."""
    r = np.random.default_rng(seed)
    kinds = r.choice([PROFILE, IMPRESSION, FIRST_ACTION, FIRST_ACTION + 1], n, p=[0.1, 0.45, 0.3, 0.15]).astype(
        np.uint8
    )
    times = START + np.sort(r.integers(0, max(1, n * window_ms // 6), n) // 5 * 5)
    requests = np.where(r.random(n) < 0.5, r.integers(1, n // 4 + 2, n), 0).astype(np.uint64)
    return History(kinds, r.integers(1, items + 1, n).astype(np.uint64), times, np.where(kinds == PROFILE, 0, requests))
