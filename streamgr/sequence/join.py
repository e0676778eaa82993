"""Joins and targets of one user (decisions 2 and 9): pure functions of a tail.

An action joins the latest impression of its item (and request, where it names one) that came at most a window before
it. The join is computed from what is there now, never remembered, so it cannot depend on the order of arrival. What is
remembered with an event when it arrives is its `due` (the watermark at which it becomes a target, or never) and whether
it was late.
"""

from bisect import bisect_left, bisect_right
from typing import NamedTuple

import numpy as np

from streamgr.events import FIRST_ACTION, IMPRESSION
from streamgr.sequence.tail import Tail
from streamgr.state.codec import NEVER


class Target(NamedTuple):
    """The row of the tail that is a target now, and its labels: bit b for kind b (an organic action: its own)."""

    row: int
    labels: int


def find(tail: Tail, end: int, time: int, item: int, request: int, *, window_ms: int) -> int:
    """The row of the impression that an action at `time`, placed before row `end`, joins; -1 if it is organic."""
    start = bisect_right(tail.times, time - window_ms, 0, end)
    if start == end:
        return -1
    kinds, items, requests = tail.columns(start, end)
    fits = (items == np.uint64(item)) & (kinds == IMPRESSION)
    if request:
        fits &= requests == np.uint64(request)
    found = np.flatnonzero(fits)
    return start + int(found[-1]) if len(found) else -1


def joined(tail: Tail, i: int, window_ms: int) -> int:
    """The row of the impression that the action in row i joins; -1 if it is organic."""
    return find(tail, i, tail.times[i], tail.items[i], tail.requests[i], window_ms=window_ms)


def targets(tail: Tail, after: int, upto: int, window_ms: int) -> list[Target]:
    """What becomes a target as the watermark moves from `after` to `upto` (ms), in sequence order."""
    dues = np.frombuffer(tail.dues[:], np.int64)
    rows = np.flatnonzero((dues > max(after, NEVER)) & (dues <= upto)).tolist()
    if not rows:
        return []
    kinds = tail.kinds
    labels = {i: 0 for i in rows if kinds[i] == IMPRESSION}
    if labels:
        first = next(iter(labels))
        acted = np.flatnonzero(np.frombuffer(kinds[first:], np.uint8) >= FIRST_ACTION)
        until = tail.times[next(reversed(labels))] + window_ms
        for j in (acted + first).tolist():
            if tail.times[j] >= until:
                break
            if not tail.lates[j] and (i := joined(tail, j, window_ms)) in labels:
                labels[i] |= 1 << (kinds[j] - FIRST_ACTION)
    found = []
    for i in rows:
        if kinds[i] == IMPRESSION:
            found.append(Target(i, labels[i]))
        elif joined(tail, i, window_ms) < 0:
            found.append(Target(i, 1 << (kinds[i] - FIRST_ACTION)))
    return found


def chunks(found: list[Target], history_length: int) -> list[list[Target]]:
    """Cut targets, in sequence order, so that those of one example span at most half of its window."""
    span = max(1, history_length // 2)
    cut: list[list[Target]] = []
    for target in found:
        if cut and target.row - cut[-1][0].row < span:
            cut[-1].append(target)
        else:
            cut.append([target])
    return cut


def first_open(tail: Tail, watermark: int | None, window_ms: int) -> int:
    """The first row whose label may still be open: rows from here on (and a window before) must stay at hand."""
    return 0 if watermark is None else bisect_left(tail.times, watermark - window_ms + 1)
