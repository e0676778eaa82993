"""What the contract says must come out, in plain Python: no store, no batches.

Written from the contract and decisions 2, 4, 9 and 10 alone. `Oracle.feed` takes one partition's records in order,
already judged good (`tests/rulebook.py`). Only erased users are ever forgotten: trimming (`keep_ms`) refuses what
arrives too old, narrows what `sequences` shows, and no action joins an impression that is older than the cut. The cut
is that of the watermark as it stood before the record.

It differs from its plain twin, `tests/slow_oracle.py`, in what makes it fast enough for a million events: a heap of
what the watermark decides when, and each user's impressions and actions in sorted lists by item and request, so that
a join is one bisection. `tests/test_oracle.py` runs both on the same streams.
"""

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

Json = dict[str, Any]
Place = tuple[str, str | None]  # an item and a request; None for whatever request
Row = tuple[Any, ...]  # (event_time, event_id bytes, type, Held): sorts as the sequence does, and never compares Held


@dataclass(frozen=True)
class Target:
    """A target that was closed: where (offset), and what."""

    offset: int
    user: str
    event_id: str
    item: str
    labels: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Held:
    """An event as it arrived."""

    event: Json
    late: bool = False

    @property
    def is_action(self) -> bool:
        return self.event["type"] not in ("impression", "profile")

    @property
    def order(self) -> tuple[int, int, str, bytes]:
        kind = {"profile": 0, "impression": 1}.get(self.event["type"], 2)
        return (self.event["event_time"], kind, self.event["type"], self.event["event_id"].encode())


@dataclass(slots=True, eq=False)
class User:
    """One user's events, by identity (type, time, id) and by what joins look for."""

    name: str
    held: dict[tuple[str, int, str], Held] = field(default_factory=dict)
    impressions: dict[Place, list[Row]] = field(default_factory=lambda: defaultdict(list))
    actions: dict[Place, list[Row]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Oracle:
    """One partition."""

    window_ms: int
    lateness_ms: int
    step_ms: int
    max_step_ms: int = field(default=0, kw_only=True)
    keep_ms: int = field(default=0, kw_only=True)
    users: dict[str, User] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    duplicates: int = 0
    expired: int = 0
    late: int = 0  # impressions and actions, as they arrived
    newest: int | None = None
    watermark: int | None = None
    _due: list[tuple[int, int, User, Held]] = field(default_factory=list, init=False, repr=False)  # a heap
    _ties: Iterator[int] = field(default_factory=count, init=False, repr=False)

    def feed(self, offset: int, event: Json) -> None:
        """One good record: an event, a heartbeat, or {"erase": user}."""
        if "erase" in event:
            self.users.pop(event["erase"], None)
            return
        if event["type"] != "heartbeat" and not self._hold(event):
            return
        self._see(event["event_time"])
        assert self.newest is not None
        watermark = (self.newest - self.lateness_ms) // self.step_ms * self.step_ms
        if self.watermark is None or watermark > self.watermark:
            cut, self.watermark = self._cut, watermark
            self._close(offset, cut)

    def sequences(self) -> Iterator[Json]:
        """The export: users sorted by id."""
        for name in sorted(self.users):
            user = self.users[name]
            visible = self._visible(sorted(user.held.values(), key=lambda h: h.order))
            joined: defaultdict[Held | None, set[str]] = defaultdict(set)
            for h in visible:
                if h.is_action:
                    joined[self._joined(user, h.event, self._cut)].add(h.event["type"])
            if visible:
                yield {"user_id": name, "events": [_shown(h, joined.get(h)) for h in _first_of_runs(visible)]}

    def _see(self, event_time: int) -> None:
        if self.newest is None:
            self.newest = event_time
        elif event_time > self.newest:
            self.newest = min(event_time, self.newest + self.max_step_ms) if self.max_step_ms else event_time

    @property
    def _cut(self) -> float:
        """Nothing before it is kept."""
        return self.watermark - self.keep_ms if self.keep_ms and self.watermark is not None else -math.inf

    def _visible(self, held: list[Held]) -> list[Held]:
        """What trimming leaves of a sequence: nothing before the cut but the last profile, which still holds."""
        cut = self._cut
        profiles = [h for h in held if h.event["event_time"] < cut and h.event["type"] == "profile"]
        return profiles[-1:] + [h for h in held if h.event["event_time"] >= cut]

    def _hold(self, event: Json) -> bool:
        """Take an event in; False for one that changes nothing."""
        at, kind, item = event["event_time"], event["type"], event.get("item_id", "")
        if at < self._cut:
            self.expired += 1
            return False
        user = self.users.get(event["user_id"])
        if user is None:
            user = self.users[event["user_id"]] = User(event["user_id"])
        identity = (kind, at, event["event_id"])
        if identity in user.held:
            self.duplicates += 1
            return False
        held = user.held[identity] = Held(event)
        row = (at, event["event_id"].encode(), kind, held)
        request = event.get("request_id")
        if kind == "impression":
            insort(user.impressions[item, None], row)
            if request is not None:
                insort(user.impressions[item, request], row)
            held.late = self._closed(event)
            if not held.late:
                heappush(self._due, (at + self.window_ms, next(self._ties), user, held))
        elif kind != "profile":
            insort(user.actions[item, request], row)
            impression = self._joined(user, event, self._cut)
            held.late = impression is not None and self._closed(impression.event)
            heappush(self._due, (at, next(self._ties), user, held))
        self.late += held.late
        return True

    def _closed(self, impression: Json) -> bool:
        return self.watermark is not None and bool(self.watermark >= impression["event_time"] + self.window_ms)

    def _joined(self, user: User, action: Json, cut: float) -> Held | None:
        """The impression that an action belongs to, of those held now and not older than the cut."""
        at = action["event_time"]
        rows = user.impressions.get((action["item_id"], action.get("request_id")), [])
        after = bisect_left(rows, (at + 1,))
        if after == 0 or at - rows[after - 1][0] >= self.window_ms or rows[after - 1][0] < cut:
            return None
        impression: Held = rows[after - 1][-1]
        return impression

    def _close(self, offset: int, cut: float) -> None:
        """Decide everything that the watermark has come to: impressions' labels, and which actions are organic."""
        assert self.watermark is not None
        while self._due and self._due[0][0] <= self.watermark:
            _, _, user, h = heappop(self._due)
            if self.users.get(user.name) is not user:
                continue  # erased since
            if not h.is_action:
                labels = self._labels(user, h, cut)
            elif self._joined(user, h.event, cut) is None:
                labels = (h.event["type"],)
            else:
                continue
            self.targets.append(Target(offset, user.name, h.event["event_id"], h.event["item_id"], labels))

    def _labels(self, user: User, impression: Held, cut: float) -> tuple[str, ...]:
        """The kinds of action that joined it in time.

        Later actions join later impressions, so the first that belongs elsewhere ends the search.
        """
        event = impression.event
        kinds: set[str] = set()
        for request in {None, event.get("request_id")}:
            rows = user.actions.get((event["item_id"], request), [])
            for n in range(bisect_left(rows, (event["event_time"],)), len(rows)):
                action: Held = rows[n][-1]
                if self._joined(user, action.event, cut) is not impression:
                    break
                if not action.late:
                    kinds.add(action.event["type"])
        return tuple(sorted(kinds))


def _first_of_runs(held: list[Held]) -> Iterator[Held]:
    """Of profiles, only the first of each constant run enters the sequence."""
    features: object = None
    for h in held:
        if h.event["type"] == "profile":
            if h.event.get("features", {}) == features:
                continue
            features = h.event.get("features", {})
        yield h


def _shown(h: Held, kinds: set[str] | None) -> Json:
    shown: Json = {"type": h.event["type"]}
    if "item_id" in h.event:
        shown["item_id"] = h.event["item_id"]
    shown |= {"event_time": h.event["event_time"], "event_id": h.event["event_id"]}
    if kinds:
        shown["actions"] = sorted(kinds)
    if h.late:
        shown["late"] = True
    return shown
