"""The newest part of one user's sequence, decoded, as columns.

A partition has one writer, so what it keeps of its users is exact: a tail holds every event (impressions and actions,
no profiles) with time >= `since`, stored or about to be. Columns are `array`s: they grow at the end, open in the middle
at the speed of memmove, are searched as bytes and go onto the wire as they are. Event ids, most of the weight, are held
only as long as they are wanted: where the label is open, and until the row is in the store. Sequence order: time, then
impressions before actions by kind name, then event id (decision 9).
"""

import sys
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from streamgr.events import FIRST_ACTION, IMPRESSION, PROFILE, History

if sys.byteorder != "little":
    raise ImportError("columns go onto the wire as they lie in memory: streamgr needs a little-endian machine")

EVER, NOTHING = -(1 << 62), 1 << 62  # `since` of a whole sequence, and of one of which nothing is loaded yet

# What a row waits for. DECIDED: for nothing, it was a target or never will be one. LATE: nor will it, it came too late.
# SHOWN: an impression whose label is open. ORGANIC: an action that joins nothing so far, and that the watermark has not
# reached.
DECIDED, LATE, SHOWN, ORGANIC = 0, 1, 2, 3


def ranks(actions: Sequence[str]) -> list[int]:
    """rank[kind] in sequence order among events of one time: profile, impression, actions by name."""
    rank = {name: FIRST_ACTION + place for place, name in enumerate(sorted(actions))}
    return [PROFILE, IMPRESSION, *(rank[name] for name in actions)]


class Token(NamedTuple):
    """One row of a tail. item: `events.item_key`; request: `events.request_key`; state: as above."""

    time: int
    kind: int
    event_id: str
    item: int
    request: int
    append_ms: int
    state: int


Pairs = tuple[tuple[str, int], ...]  # what an event says of its user: (feature, `events.feature_key`), by name

# (time, rank, event id, kind, item, request, append_ms, state, features)
Row = tuple[int, int, str, int, int, int, int, int, Pairs]


class Tail:
    """Columns in sequence order, oldest first; row i of each is one event. Only its partition writes it.

    ids: "" for an id that is let go. features: of each row; None as long as no row has any. scheduled: the step at
    which the user's labels were last asked to be closed (`timers`), so as to ask once.
    """

    __slots__ = (
        "_let_go",
        "appends",
        "features",
        "ids",
        "items",
        "kinds",
        "requests",
        "scheduled",
        "since",
        "states",
        "times",
        "user",
    )

    def __init__(self, user: str = "", since: int = EVER) -> None:
        self.user, self.since, self.scheduled = user, since, -1
        self.times, self.kinds, self.states = array("q"), array("B"), array("B")
        self.items, self.requests, self.appends = array("Q"), array("Q"), array("q")
        self.ids: list[str] = []
        self.features: list[Pairs] | None = None
        self._let_go = 0  # rows before this one have no id, unless it is wanted

    def __len__(self) -> int:
        return len(self.times)

    def at(self, time: int) -> tuple[int, int]:
        """The rows of one time: from, to."""
        start = bisect_left(self.times, time)
        return start, bisect_left(self.times, time + 1, start)

    def lacks_ids(self, time: int) -> bool:
        """Whether ids have been let go that `place` needs."""
        start, end = self.at(time)
        return "" in self.ids[start:end]

    def recall(self, time: int, stored: list[tuple[int, str]], rank: Sequence[int]) -> None:
        """Put ids back. stored: (rank, event id) of every stored event of this time."""
        start, end = self.at(time)
        here = {(rank[self.kinds[row]], self.ids[row]) for row in range(start, end)}
        missing = iter(sorted(set(stored) - here))  # both are in sequence order
        for row in range(start, end):
            if not self.ids[row]:
                self.ids[row] = next(missing)[1]
        self._let_go = min(self._let_go, start)

    def let_go(self, upto: int) -> None:
        """Let go of ids before row `upto`, all of it stored, but for those of open labels."""
        if (begin := self._let_go) < upto:
            states = self.states[begin:upto]
            self.ids[begin:upto] = [i if s > LATE else "" for i, s in zip(self.ids[begin:upto], states, strict=True)]
            self._let_go = upto

    def place(self, time: int, kind: int, event_id: str, rank: Sequence[int]) -> int:
        """Where the event belongs; -1 - i where row i is this very event. Needs the ids of its time (`lacks_ids`)."""
        times, n = self.times, len(self.times)
        if not n or times[-1] < time:
            return n
        kinds, ids = self.kinds, self.ids
        order = (rank[kind], event_id)
        if times[-1] == time and order > (rank[kinds[-1]], ids[-1]):
            return n
        start, end = self.at(time)
        i = bisect_left(range(start, end), order, key=lambda row: (rank[kinds[row]], ids[row])) + start
        if i < end and (rank[kinds[i]], ids[i]) == order:
            return -1 - i
        return i

    def insert(self, i: int, token: Token) -> None:
        """Put a row before row i (at the end: `append`)."""
        for column, value in zip(self._columns(), token, strict=True):
            column.insert(i, value)
        if self.features is not None:
            self.features.insert(i, ())

    def append(  # noqa: PLR0917
        self, time: int, kind: int, event_id: str, item: int, request: int, append_ms: int, state: int
    ) -> None:
        """Put a row at the end: what nearly every event asks for, without a loop."""
        self.times.append(time)
        self.kinds.append(kind)
        self.ids.append(event_id)
        self.items.append(item)
        self.requests.append(request)
        self.appends.append(append_ms)
        self.states.append(state)
        if self.features is not None:
            self.features.append(())

    def say(self, row: int, features: Pairs) -> None:
        """Note what a row says of its user."""
        if self.features is None:
            self.features = [()] * len(self)
        self.features[row] = features

    def extend_back(self, older: list[Row], since: int) -> None:
        """Put events before all others, in any order; the tail is whole down to `since` from then on."""
        if older:
            older.sort()
            times, _, ids, *others, features = zip(*older, strict=True)
            if self.features is not None or any(features):
                self.features = [*features, *(self.features or [()] * len(self))]
            for column, values in zip(self._columns(), (times, others[0], ids, *others[1:]), strict=True):
                column[:0] = array(column.typecode, values) if isinstance(column, array) else values
            self._let_go = 0
        self.since = since

    def trim(self, keep_from: int) -> None:
        """Forget rows before the first of row `keep_from`'s time."""
        if cut := bisect_left(self.times, self.times[keep_from]):
            self.since = self.times[cut]
            self._let_go = max(0, self._let_go - cut)
            for column in self._columns():
                del column[:cut]
            if self.features is not None:
                del self.features[:cut]

    def covers(self, time: int, tokens: int = 0) -> bool:
        """Whether it holds every event from `time` on, and `tokens` more before that (or all there are)."""
        return self.since == EVER or (self.since <= time and bisect_left(self.times, time) >= tokens)

    def window(self, start: int, end: int) -> History:
        """Rows start to end as the model's window (copies)."""
        return History(
            np.frombuffer(self.kinds[start:end], np.uint8),
            np.frombuffer(self.items[start:end], np.uint64),
            np.frombuffer(self.times[start:end], np.int64),
            np.frombuffer(self.requests[start:end], np.uint64),
        )

    def _columns(self) -> tuple[Any, ...]:
        """In the order of `Token`'s fields."""
        return (self.times, self.kinds, self.ids, self.items, self.requests, self.appends, self.states)
