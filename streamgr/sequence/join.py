"""Joins and targets of one user (decisions 2 and 9): pure functions of a tail.

An action joins the latest impression of its item (and request, where it names one) that came less than a window before
it. The join is computed from what is there now, never remembered, so it cannot depend on the order of arrival. What is
remembered with an event when it arrives is whether it was late and what it waits for (`tail`).
"""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamgr.events import FIRST_ACTION, IMPRESSION, PROFILE
from streamgr.sequence.tail import DECIDED, LATE, ORGANIC, SHOWN, Tail

NEAR, FARTHER = 64, 8  # rows searched first, and how much wider each further search is
FEW = 256  # rows up to which a plain loop beats numpy
SPAN = 256  # rows that the targets of one example span at most, so that it fits into a message whatever its texts

_ACTION = re.compile(b"[^" + bytes((PROFILE, IMPRESSION)) + b"]")


@dataclass(frozen=True, slots=True)
class Targets:
    """Rows of a tail that are targets now, in sequence order, and the labels of each.

    labels: bit b for action kind b (an organic action: its own). impressions: how many of them are impressions.
    """

    rows: list[int]
    labels: list[int]
    impressions: int


def find(tail: Tail, end: int, after: int, item: int, request: int) -> int:
    """The row of the impression, later than `after` (ms), that an action placed before row `end` joins; -1 without.

    Goes back in time over the items as bytes, the nearest first, as most actions follow at once.
    """
    start = bisect_right(tail.times, after, 0, end)
    wanted, width = array("Q", (item,)).tobytes(), NEAR
    while start < end:
        from_row = max(start, end - width)
        block = tail.items[from_row:end].tobytes()
        at = block.rfind(wanted)
        while at >= 0:
            row = from_row + (at >> 3)
            if not at & 7 and tail.kinds[row] == IMPRESSION and (not request or tail.requests[row] == request):
                return row
            at = block.rfind(wanted, 0, at + 7)  # the next occurrence begins at least a byte before
        end, width = from_row, width * FARTHER
    return -1


def targets(tail: Tail, before: int, upto: int, window_ms: int, *, behind: int | None, oldest: int) -> Targets:
    """What becomes a target as the watermark moves from `before` to `upto` (ms); it is decided from then on.

    behind: time of the oldest action that the watermark had passed when it came. oldest: impressions before it are out
    of the sequence (ms).
    """
    times, kinds, items, states = tail.times, tail.kinds, tail.items, tail.states
    shown = _waiting(tail, before - window_ms + 1, upto - window_ms, SHOWN)
    organic = _waiting(tail, before + 1 if behind is None else behind, upto, ORGANIC)
    labels = dict.fromkeys(shown, 0)
    if shown:
        wanted, begin = {items[row] for row in shown}, shown[0] + 1
        end = bisect_left(times, times[shown[-1]] + window_ms, begin)
        for row in _acted(tail, begin, end, wanted):
            if states[row] != LATE:
                joined = find(tail, row, max(times[row] - window_ms, oldest - 1), items[row], tail.requests[row])
                if joined in labels:
                    labels[joined] |= 1 << (kinds[row] - FIRST_ACTION)
    for row in shown:
        states[row] = DECIDED
    for row in organic:
        states[row] = DECIDED
        if find(tail, row, max(times[row] - window_ms, oldest - 1), items[row], tail.requests[row]) < 0:
            labels[row] = 1 << (kinds[row] - FIRST_ACTION)
    if not organic:
        return Targets(shown, list(labels.values()), len(shown))
    rows = sorted(labels)
    return Targets(rows, [labels[row] for row in rows], len(shown))


def _acted(tail: Tail, begin: int, end: int, wanted: set[int]) -> list[int]:
    """The rows from begin to end that are actions on one of these items, ascending."""
    items, kinds = tail.items[begin:end], tail.kinds[begin:end].tobytes()
    if end - begin <= FEW:
        return [begin + m.start() for m in _ACTION.finditer(kinds) if items[m.start()] in wanted]
    acted = np.flatnonzero(np.frombuffer(kinds, np.uint8) >= FIRST_ACTION)
    among = np.isin(np.frombuffer(items, np.uint64)[acted], np.fromiter(wanted, np.uint64, len(wanted)))
    return [begin + row for row in acted[among].tolist()]


def _waiting(tail: Tail, first: int, last: int, state: int) -> list[int]:
    """The rows of the times from `first` to `last` (ms) that wait in `state`, ascending."""
    start = bisect_left(tail.times, first)
    block, rows = tail.states[start : bisect_right(tail.times, last)].tobytes(), []
    at = block.find(state)
    while at >= 0:
        rows.append(start + at)
        at = block.find(state, at + 1)
    return rows


def chunks(rows: list[int], history_length: int) -> Iterator[slice]:
    """Cut targets, in sequence order, so that those of one example span at most half of its window."""
    span = min(max(1, history_length // 2), SPAN) if history_length else SPAN
    begin = 0
    for i, row in enumerate(rows):
        if row - rows[begin] >= span:
            yield slice(begin, i)
            begin = i
    if rows:
        yield slice(begin, len(rows))


def first_open(tail: Tail, watermark: int | None, window_ms: int) -> int:
    """The first row whose label may still be open: rows from here on (and a window before) must stay at hand."""
    return 0 if watermark is None else bisect_left(tail.times, watermark - window_ms + 1)
