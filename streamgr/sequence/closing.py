"""What one step of the watermark closes: the users who have something due, by key; their targets, cut into examples.

An example's history is the sequence as it stood after the record that moved the watermark, cut to `history_length`
events, with the auxiliary rows of that window (`auxiliary`).
What is older than is kept does not belong to it: judged by the watermark before the step, for so far back can every
process look that may have to say the same again.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streamgr.sequence import examples as wire
from streamgr.sequence import join
from streamgr.sequence.auxiliary import window
from streamgr.sequence.items import Items
from streamgr.sequence.tail import EVER, Tail
from streamgr.sequence.timers import Timers
from streamgr.sequence.users import Users

Emit = Callable[[bytes, bytes], None]  # takes an example: its user as the key, and its bytes


def nobody(key: bytes, value: bytes) -> None:
    """Where examples go that nobody wants."""


@dataclass(frozen=True, slots=True)
class Step:
    """The watermark moves from `before` (-1: there was none) to `upto`, by the record at `offset`; times in ms."""

    before: int
    upto: int
    offset: int
    append_ms: int


@dataclass(slots=True)
class Closed:
    """How much was closed. targets: impressions and organic actions."""

    examples: int = 0
    targets: int = 0
    impressions: int = 0


class Closer:
    """Closes the labels of one partition. `last`: the position of its last example, which the next one names."""

    def __init__(
        self,
        users: Users,
        items: Items,
        timers: Timers,
        *,
        window_ms: int,
        keep_ms: int,
        history_length: int,
        auxiliary_length: int,
        fingerprint: str,
        last: wire.Position,
    ) -> None:
        """keep_ms: 0 for ever. history_length: 0 for the targets alone, then without auxiliary rows."""
        self._users, self._items, self._timers = users, items, timers
        self._window, self._keep, self._history = window_ms, keep_ms, history_length
        self._auxiliary = auxiliary_length if history_length else 0
        self._fingerprint, self.last = fingerprint, last

    def close(self, step: Step, emit: Emit, touched: set[bytes]) -> Closed:
        """Emit every target that falls due, and add the users looked at to `touched`."""
        closed, window = Closed(), self._window
        oldest = step.before - self._keep if self._keep else EVER
        for uid, behind in self._timers.due(step.before, step.upto):
            tail = self._users.find(uid)
            if tail is None:  # erased since
                continue
            touched.add(uid)
            first = step.before - window + 1
            self._users.cover(uid, tail, first if behind is None else min(behind, first), self._history)
            found = join.targets(tail, step.before, step.upto, window, behind=behind, oldest=oldest)
            for chunk in join.chunks(found.rows, self._history):
                position = (step.offset, closed.examples)
                example = self._example(uid, tail, found.rows[chunk], found.labels[chunk], position, step)
                emit(tail.user.encode(), wire.encode(example))
                closed.examples += 1
            closed.targets += len(found.rows)
            closed.impressions += found.impressions
        self._users.closed = step.upto
        return closed

    def _example(  # noqa: PLR0917
        self, uid: bytes, tail: Tail, rows: list[int], labels: list[int], position: wire.Position, step: Step
    ) -> wire.WireExample:
        """What the closing of these rows teaches, with the window that ends with them."""
        end = rows[-1] + 1
        start = max(0, end - self._history) if self._history else rows[0]
        cut = step.before - self._keep if self._keep else EVER
        if self._keep:
            start = max(start, bisect_left(tail.times, cut))
        columns = tail.kinds[start:end], tail.items[start:end], tail.times[start:end], tail.requests[start:end]
        index: Sequence[int] = [row - start for row in rows]
        if self._auxiliary:
            profiles, upto = self._users.profiles(uid), tail.times[end - 1] + 1
            if len(profiles) or tail.features is not None:
                history, moved = window(tail, profiles, start, end, upto, cut, self._auxiliary)
                columns = history.kinds, history.items, history.times, history.requests  # type: ignore[assignment]
                index = index if moved is None else (np.array(index) + moved[index]).tolist()
        kinds, items, times, requests = (column.tobytes() for column in columns)
        prev, self.last = self.last, position
        return wire.WireExample(
            wire.FORMAT,
            self._fingerprint,
            position,
            prev,
            tail.user,
            step.upto,
            step.append_ms,
            kinds,
            items,
            times,
            requests,
            array("I", index).tobytes(),
            array("I", labels).tobytes(),
            array("q", [tail.appends[row] for row in rows]).tobytes(),
            [self._items.text(tail.items[row]) for row in rows],
            [tail.ids[row] for row in rows],
        )
