"""What the contract says must come out, in the plainest Python: no store, no batches, no speed.

Written from the contract and decisions 2, 4 and 9 alone. `Oracle.feed` takes one partition's records in order, already
judged good; it holds every event of every user in a list and looks at all of them each time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass
class Held:
    """An event as it arrived."""

    event: Json
    late: bool = False
    decided: bool = False  # became a target, or never will

    @property
    def is_impression(self) -> bool:
        return bool(self.event["type"] == "impression")

    @property
    def is_action(self) -> bool:
        return self.event["type"] not in ("impression", "profile")

    @property
    def order(self) -> tuple[int, int, str, bytes]:
        kind = {"profile": 0, "impression": 1}.get(self.event["type"], 2)
        return (self.event["event_time"], kind, self.event["type"] * (kind == 2), self.event["event_id"].encode())


@dataclass(frozen=True)
class Target:
    """A target that was closed: where (offset), and what."""

    offset: int
    user: str
    event_id: str
    item: str
    labels: tuple[str, ...]


@dataclass
class Oracle:
    """One partition."""

    window_ms: int
    lateness_ms: int
    step_ms: int
    users: dict[str, list[Held]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    duplicates: int = 0
    newest: int | None = None
    watermark: int | None = None

    def feed(self, offset: int, event: Json) -> None:
        """One good record: an event, a heartbeat, or {"erase": user}."""
        if "erase" in event:
            self.users.pop(event["erase"], None)
            return
        if event["type"] != "heartbeat":
            self._hold(event)
        self.newest = max(event["event_time"], self.newest if self.newest is not None else event["event_time"])
        watermark = (self.newest - self.lateness_ms) // self.step_ms * self.step_ms
        if self.watermark is None or watermark > self.watermark:
            self.watermark = watermark
            self._close(offset)

    def sequences(self) -> Iterator[Json]:
        """The export: users sorted by id."""
        for user in sorted(self.users):
            held = sorted(self.users[user], key=lambda h: h.order)
            yield {"user_id": user, "events": [self._shown(h, held) for h in self._first_of_runs(held)]}

    @staticmethod
    def _first_of_runs(held: list[Held]) -> Iterator[Held]:
        """Of profiles, only the first of each constant run enters the sequence."""
        features: object = None
        for h in held:
            if h.event["type"] == "profile":
                if h.event.get("features", {}) == features:
                    continue
                features = h.event.get("features", {})
            yield h

    def _hold(self, event: Json) -> None:
        held = self.users.setdefault(event["user_id"], [])
        identity = (event["type"], event["event_time"], event["event_id"])
        if any((h.event["type"], h.event["event_time"], h.event["event_id"]) == identity for h in held):
            self.duplicates += 1
            return
        new = Held(event)
        held.append(new)
        if new.is_impression:
            new.late = new.decided = self._closed(event)
        elif new.is_action:
            impression = self._joined(new, held)
            new.late = impression is not None and self._closed(impression.event)

    def _closed(self, impression: Json) -> bool:
        return self.watermark is not None and self.watermark >= impression["event_time"] + self.window_ms

    def _joined(self, action: Held, held: list[Held]) -> Held | None:
        a = action.event
        fits = [
            h
            for h in held
            if h.is_impression
            and h.event["item_id"] == a["item_id"]
            and 0 <= a["event_time"] - h.event["event_time"] < self.window_ms
            and ("request_id" not in a or h.event.get("request_id") == a["request_id"])
        ]
        return max(fits, key=lambda h: h.order, default=None)

    def _close(self, offset: int) -> None:
        assert self.watermark is not None
        for user in sorted(self.users):
            held = sorted(self.users[user], key=lambda h: h.order)
            for h in held:
                if h.decided or not (h.is_impression or h.is_action):
                    continue
                if h.is_impression and self._closed(h.event):
                    h.decided = True
                    self.targets.append(self._target(offset, user, h, held))
                elif h.is_action and self.watermark >= h.event["event_time"]:
                    h.decided = True
                    if self._joined(h, held) is None:
                        self.targets.append(
                            Target(offset, user, h.event["event_id"], h.event["item_id"], (h.event["type"],))
                        )

    def _target(self, offset: int, user: str, impression: Held, held: list[Held]) -> Target:
        kinds = {h.event["type"] for h in held if h.is_action and not h.late and self._joined(h, held) is impression}
        return Target(offset, user, impression.event["event_id"], impression.event["item_id"], tuple(sorted(kinds)))

    def _shown(self, h: Held, held: list[Held]) -> Json:
        shown: Json = {"type": h.event["type"]}
        if "item_id" in h.event:
            shown["item_id"] = h.event["item_id"]
        shown |= {"event_time": h.event["event_time"], "event_id": h.event["event_id"]}
        if h.is_impression:
            kinds = {a.event["type"] for a in held if a.is_action and self._joined(a, held) is h}
            if kinds:
                shown["actions"] = sorted(kinds)
        if h.late:
            shown["late"] = True
        return shown
