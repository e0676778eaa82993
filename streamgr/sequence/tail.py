"""The newest part of one user's sequence, decoded, as columns.

A partition has one writer, so its cache of tails is exact: a tail holds every event (impressions and actions, no
profiles) with time >= `since`, stored or about to be. Columns are `array`s, which grow at the end and open in the
middle at the speed of memmove, and become numpy arrays without a copy of more than the slice. Sequence order: time,
then impressions before actions by kind name, then event id (decision 9).
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamgr.events import FIRST_ACTION, IMPRESSION, PROFILE, History

EVER, NOTHING = -(1 << 62), 1 << 62  # `since` of a whole sequence, and of one that is not loaded yet


def ranks(actions: Sequence[str]) -> list[int]:
    """rank[kind] in sequence order among events of one time: profile, impression, actions by name."""
    rank = {name: FIRST_ACTION + place for place, name in enumerate(sorted(actions))}
    return [PROFILE, IMPRESSION, *(rank[name] for name in actions)]


class Token(NamedTuple):
    """One row of a tail. Fields as in `state.codec.Stored`; request: `events.request_key`."""

    time: int
    kind: int
    event_id: str
    item: int
    request: int
    append_ms: int
    due: int
    late: bool


class Tail:
    """Columns in sequence order, oldest first; row i of each is one event. Only its partition writes it."""

    __slots__ = ("appends", "dues", "ids", "items", "kinds", "lates", "requests", "since", "times")

    def __init__(self, since: int = EVER) -> None:
        self.since = since
        self.times, self.kinds = array("q"), array("B")
        self.items, self.requests = array("Q"), array("Q")
        self.appends, self.dues, self.lates = array("q"), array("q"), array("B")
        self.ids: list[str] = []

    def __len__(self) -> int:
        return len(self.times)

    def place(self, time: int, kind: int, event_id: str, rank: Sequence[int]) -> int:
        """Where the event belongs; -1 - i where row i is this very event."""
        times = self.times
        n = len(times)
        if not n or times[n - 1] < time:
            return n
        i = bisect_left(times, time)
        order = (rank[kind], event_id)
        while i < n and times[i] == time:
            here = (rank[self.kinds[i]], self.ids[i])
            if here == order:
                return -1 - i
            if here > order:
                break
            i += 1
        return i

    def insert(self, i: int, token: Token) -> None:
        """Put a row before row i (at the end: i = len)."""
        time, kind, event_id, item, request, append_ms, due, late = token
        if i == len(self.times):
            self.times.append(time)
            self.kinds.append(kind)
            self.ids.append(event_id)
            self.items.append(item)
            self.requests.append(request)
            self.appends.append(append_ms)
            self.dues.append(due)
            self.lates.append(late)
        else:
            self.times.insert(i, time)
            self.kinds.insert(i, kind)
            self.ids.insert(i, event_id)
            self.items.insert(i, item)
            self.requests.insert(i, request)
            self.appends.insert(i, append_ms)
            self.dues.insert(i, due)
            self.lates.insert(i, late)

    def extend_back(self, older: Iterable[Token], since: int, rank: Sequence[int]) -> None:
        """Put events before all others, in any order; the tail is whole down to `since` from then on."""
        rows = sorted(older, key=lambda t: (t.time, rank[t.kind], t.event_id))
        if rows:
            times, kinds, ids, items, requests, appends, dues, lates = zip(*rows, strict=True)
            self.times = array("q", times) + self.times
            self.kinds = array("B", kinds) + self.kinds
            self.ids = [*ids, *self.ids]
            self.items = array("Q", items) + self.items
            self.requests = array("Q", requests) + self.requests
            self.appends = array("q", appends) + self.appends
            self.dues = array("q", dues) + self.dues
            self.lates = array("B", lates) + self.lates
        self.since = since

    def trim(self, keep_from: int) -> None:
        """Forget rows before the first of row `keep_from`'s time."""
        cut = bisect_left(self.times, self.times[keep_from])
        if cut:
            self.since = self.times[cut]
            columns = (self.times, self.kinds, self.ids, self.items, self.requests, self.appends, self.dues, self.lates)
            for column in columns:
                del column[:cut]

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

    def columns(self, start: int, end: int) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint64]]:
        """kinds, items, requests of rows start to end (copies)."""
        return (
            np.frombuffer(self.kinds[start:end], np.uint8),
            np.frombuffer(self.items[start:end], np.uint64),
            np.frombuffer(self.requests[start:end], np.uint64),
        )
