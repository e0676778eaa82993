"""Served scores and what became of them: the join of a sample of answers with the events that followed.

    score        the scorer answered: for this user these items at these probabilities, by this weights version
    impression   one of them was shown: it belongs to the latest score of its user and item that is not older than
                 `serve_ms` (both at their records' times: the scorer's clock and the broker's)
    action       what the user did with it: it labels the latest impression of its item (and of its request, where it
                 names one) that came less than the attribution window before it, in event time; the system's own rule

The topics are read side by side, so their records may come in any order. Nothing is decided before `grace_ms` have
passed over the window; from then on the result does not depend on the order any more (a test holds the join to a plain
twin that sees everything at once). Events of users without a sampled score are let go after the grace.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from streamgr.events import FIRST_ACTION, IMPRESSION, Event
from streamgr.telemetry import counter

JOINED = counter("online_scores_joined", "Sampled scores of single items, by what became of them.", ("outcome",))
for _outcome in ("positive", "negative", "not_shown", "dropped"):
    JOINED.labels(_outcome)  # 0 is a value too

CANARY = "streamgr-canary-"  # users and items of this prefix are nobody's
LOOK, JUDGE, CLOSE = range(3)  # what is due; of one moment in this order
HELD_EVENTS = 200_000  # more than this many at once: the oldest go undecided, and are counted


@dataclass(frozen=True, slots=True)
class Score:
    """One sampled answer. `p`: item -> action kind -> probability; `time_ms`: when the scorer gave it."""

    user: str
    time_ms: int
    version: int
    p: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Judged:
    """A scored item that was shown, decided: the probability and the label of each kind. `at_ms`: when it was shown."""

    version: int
    at_ms: int
    partition: int
    p: Mapping[str, float]
    labels: frozenset[str]


@dataclass(slots=True)
class _Seen:
    """An impression or an action, and when it came."""

    event: Event
    append_ms: int
    partition: int


@dataclass(slots=True)
class _User:
    """What is held of one user: scores, impressions and actions by item, and which (score, item) were shown."""

    scores: list[Score] = field(default_factory=list)
    shown: dict[str, list[_Seen]] = field(default_factory=dict)
    acted: dict[str, list[_Seen]] = field(default_factory=dict)
    used: set[tuple[int, int, str]] = field(default_factory=set)
    last_ms: int = 0

    def forget(self, before_ms: int) -> int:
        """Let go of events that came before; returns how many are left."""
        left = 0
        for held in (self.shown, self.acted):
            for item, seen in list(held.items()):
                held[item] = [one for one in seen if one.append_ms > before_ms]
                left += len(held[item])
                if not held[item]:
                    del held[item]
        return left


class Outcomes:
    """Takes scores and events in any order; `settle` returns what is decided. Times in ms."""

    def __init__(
        self, kinds: tuple[str, ...], window_ms: int, serve_ms: int, grace_ms: int, held_events: int = HELD_EVENTS
    ) -> None:
        """`kinds`: the action kinds in the order of their bits."""
        self._kinds, self._window_ms, self._serve_ms, self._grace_ms = kinds, window_ms, serve_ms, grace_ms
        self._wait_ms = window_ms + grace_ms  # from an impression to its verdict
        self._users: dict[str, _User] = {}
        self._due: list[tuple[int, int, str, int, _Seen | Score]] = []  # a heap: (ms, step, user, number, what)
        self._number, self._swept_ms, self._bound = 0, 0, held_events
        self.held = 0  # events in memory

    def score(self, score: Score) -> None:
        """A sampled answer; the same one again changes nothing."""
        if score.user.startswith(CANARY):
            return
        user = self._users.setdefault(score.user, _User())
        if all((s.time_ms, s.version, s.p) != (score.time_ms, score.version, score.p) for s in user.scores):
            user.scores.append(score)
            self._push(score.time_ms + self._serve_ms + self._wait_ms, CLOSE, score.user, score)

    def event(self, event: Event, append_ms: int, partition: int) -> None:
        """An impression or an action, the same again changes nothing; profiles say nothing here."""
        if event.kind < IMPRESSION or event.user.startswith(CANARY):
            return
        user = self._users.setdefault(event.user, _User())
        held = user.shown if event.kind == IMPRESSION else user.acted
        seen = held.setdefault(event.item, [])
        if any(_same(one.event, event) for one in seen):
            return
        one = _Seen(event, append_ms, partition)
        seen.append(one)
        self.held += 1
        user.last_ms = max(user.last_ms, append_ms)
        if event.kind == IMPRESSION:
            self._push(append_ms + self._grace_ms, LOOK, event.user, one)

    def settle(self, now_ms: int) -> list[Judged]:
        """What is decided by now, each once; `now_ms`: the time up to which the topics have been read."""
        decided = []
        while self._due and self._due[0][0] <= now_ms:
            _, step, name, _, what = heapq.heappop(self._due)
            user = self._users.get(name)
            if user is None:
                continue
            if isinstance(what, Score):
                self._close(user, what)
            elif step == LOOK and self._score_of(user, what):  # by now its score is here, or it has none
                self._push(what.append_ms + self._wait_ms, JUDGE, name, what)
            elif step == JUDGE and (judged := self._judge(user, what)):
                decided.append(judged)
        if now_ms - self._swept_ms >= self._grace_ms or self.held > self._bound:
            self._swept_ms = now_ms
            self._sweep(now_ms)
        return decided

    def _judge(self, user: _User, one: _Seen) -> Judged | None:
        """The fate of an impression whose score was sampled."""
        score, item = self._score_of(user, one), one.event.item
        if score is None:
            return None
        user.used.add((score.time_ms, score.version, item))
        labels = frozenset(
            self._kinds[action.event.kind - FIRST_ACTION]
            for action in user.acted.get(item, ())
            if self._joined(action.event, user.shown.get(item, [])) is one
        )
        JOINED.labels("positive" if labels else "negative").inc()
        return Judged(score.version, one.append_ms, one.partition, score.p[item], labels)

    def _score_of(self, user: _User, one: _Seen) -> Score | None:
        """The score that an impression was shown for."""
        item, at = one.event.item, one.append_ms
        found = [s for s in user.scores if item in s.p and 0 <= at - s.time_ms <= self._serve_ms]
        return max(found, key=lambda s: (s.time_ms, s.version), default=None)

    def _joined(self, action: Event, shown: list[_Seen]) -> _Seen | None:
        """The impression that an action labels."""
        before = [
            one
            for one in shown
            if 0 <= action.time - one.event.time < self._window_ms
            and (not action.request or action.request == one.event.request)
        ]
        return max(before, key=lambda one: (one.event.time, one.event.event_id.encode()), default=None)

    def _close(self, user: _User, score: Score) -> None:
        """No impression of this score can come any more."""
        if score in user.scores:
            items = {(score.time_ms, score.version, item) for item in score.p}
            JOINED.labels("not_shown").inc(len(items - user.used))
            user.used -= items
            user.scores.remove(score)

    def _sweep(self, now_ms: int) -> None:
        """Forget what nothing waits for any more; and, above the bound, the users seen longest ago."""
        self.held = 0
        for name, user in list(self._users.items()):
            # of a user with scores, an impression that is judged may still take an action from one that is not
            left = user.forget(now_ms - (2 * self._wait_ms + self._serve_ms if user.scores else self._grace_ms))
            self.held += left
            if not left and not user.scores:
                del self._users[name]
        for name in sorted(self._users, key=lambda name: self._users[name].last_ms):
            if self.held <= self._bound:
                return
            user = self._users.pop(name)
            self.held -= sum(len(seen) for held in (user.shown, user.acted) for seen in held.values())
            JOINED.labels("dropped").inc(sum(len(score.p) for score in user.scores))

    def _push(self, due_ms: int, step: int, user: str, what: _Seen | Score) -> None:
        self._number += 1
        heapq.heappush(self._due, (due_ms, step, user, self._number, what))


def _same(a: Event, b: Event) -> bool:
    return (a.kind, a.event_id, a.time) == (b.kind, b.event_id, b.time)
