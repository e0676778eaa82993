"""The readable specification: `tests/oracle.py` without anything that makes it fast.

It holds every event of every user in a list and looks at all of them each time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.oracle import Json, Target


@dataclass(eq=False)
class Held:
    """An event as it arrived."""

    event: Json
    late: bool = False
    decided: bool = False  # became a target, or never will

    @property
    def is_profile(self) -> bool:
        return bool(self.event["type"] == "profile")

    @property
    def is_impression(self) -> bool:
        return bool(self.event["type"] == "impression")

    @property
    def is_action(self) -> bool:
        return not self.is_profile and not self.is_impression

    @property
    def order(self) -> tuple[int, int, str, bytes]:
        kind = {"profile": 0, "impression": 1}.get(self.event["type"], 2)
        return (self.event["event_time"], kind, self.event["type"] * (kind == 2), self.event["event_id"].encode())


@dataclass
class SlowOracle:
    """One partition."""

    window_ms: int
    lateness_ms: int
    step_ms: int
    max_step_ms: int = field(default=0, kw_only=True)
    keep_ms: int = field(default=0, kw_only=True)
    users: dict[str, list[Held]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    duplicates: int = 0
    expired: int = 0
    late: int = 0
    newest: int | None = None
    watermark: int | None = None

    def feed(self, offset: int, event: Json) -> None:
        """One good record: an event, a heartbeat, or {"erase": user}."""
        if "erase" in event:
            self.users.pop(event["erase"], None)
            return
        if event["type"] != "heartbeat":
            if self._before_cut(event):
                self.expired += 1
                return
            if self._is_held(event):
                self.duplicates += 1
                return
            self._hold(event)
        if self.newest is None:
            self.newest = event["event_time"]
        else:
            furthest = self.newest + self.max_step_ms if self.max_step_ms > 0 else event["event_time"]
            self.newest = max(self.newest, min(event["event_time"], furthest))
        watermark = (self.newest - self.lateness_ms) // self.step_ms * self.step_ms
        if self.watermark is None or watermark > self.watermark:
            kept = {user: [h for h in held if not self._before_cut(h.event)] for user, held in self.users.items()}
            self.watermark = watermark
            self._close(offset, kept)

    def sequences(self) -> Iterator[Json]:
        """The export: users sorted by id."""
        for user in sorted(self.users):
            held = sorted(self.users[user], key=lambda h: h.order)
            holding = [h for h in held if h.is_profile and self._before_cut(h.event)][-1:]
            visible = holding + [h for h in held if not self._before_cut(h.event)]
            if visible:
                yield {"user_id": user, "events": [self._shown(h, visible) for h in self._first_of_runs(visible)]}

    @staticmethod
    def _first_of_runs(held: list[Held]) -> Iterator[Held]:
        """Of profiles, only the first of each constant run enters the sequence."""
        features: object = None
        for h in held:
            if h.is_profile:
                if h.event.get("features", {}) == features:
                    continue
                features = h.event.get("features", {})
            yield h

    def _before_cut(self, event: Json) -> bool:
        if self.keep_ms == 0 or self.watermark is None:
            return False
        return bool(event["event_time"] < self.watermark - self.keep_ms)

    def _is_held(self, event: Json) -> bool:
        same = ("type", "event_time", "event_id")
        return any(all(h.event[k] == event[k] for k in same) for h in self.users.get(event["user_id"], []))

    def _hold(self, event: Json) -> None:
        held = self.users.setdefault(event["user_id"], [])
        new = Held(event)
        held.append(new)
        if new.is_impression:
            new.late = new.decided = self._closed(event)
        elif new.is_action:
            impression = self._joined(new, [h for h in held if not self._before_cut(h.event)])
            new.late = impression is not None and self._closed(impression.event)
        self.late += new.late

    def _closed(self, impression: Json) -> bool:
        return self.watermark is not None and bool(self.watermark >= impression["event_time"] + self.window_ms)

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

    def _close(self, offset: int, kept: dict[str, list[Held]]) -> None:
        """kept: what trimming had left of each user before the watermark moved."""
        assert self.watermark is not None
        for user, held in kept.items():
            for h in held:
                if h.decided or h.is_profile:
                    continue
                if h.is_impression and self._closed(h.event):
                    h.decided = True
                    self._target(offset, user, h, self._kinds(h, [a for a in held if not a.late], held))
                elif h.is_action and self.watermark >= h.event["event_time"]:
                    h.decided = True
                    if self._joined(h, held) is None:
                        self._target(offset, user, h, [h.event["type"]])

    def _target(self, offset: int, user: str, h: Held, labels: list[str]) -> None:
        self.targets.append(Target(offset, user, h.event["event_id"], h.event["item_id"], tuple(labels)))

    def _kinds(self, impression: Held, actions: list[Held], held: list[Held]) -> list[str]:
        return sorted({a.event["type"] for a in actions if a.is_action and self._joined(a, held) is impression})

    def _shown(self, h: Held, visible: list[Held]) -> Json:
        shown: Json = {"type": h.event["type"]}
        if "item_id" in h.event:
            shown["item_id"] = h.event["item_id"]
        shown |= {"event_time": h.event["event_time"], "event_id": h.event["event_id"]}
        if h.is_impression and (kinds := self._kinds(h, visible, visible)):
            shown["actions"] = kinds
        if h.late:
            shown["late"] = True
        return shown
