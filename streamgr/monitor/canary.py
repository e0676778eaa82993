"""The canary: a marked event every so often, and how long it takes until its effect is served.

    append      the broker acknowledges the event; its append time is where both clocks start
    sequence    the scorer's `/v1/users/{id}/sequence` shows it: the next answer knows of it
    weights     the scorer serves weights whose horizon has passed the append time (now - `model_age_seconds` of an
                answer): what was learned up to this event, labels that still wait for their window left aside

It measures from outside what the roles' histograms measure from inside, and goes on when no user does. One canary at a
time, so a slow system makes them rarer. One that is not seen within the patience is lost, and counted at its hop.

What it does to learning: each canary is one impression without an action by a user of its own, at `canary_seconds` = 30
2,880 a day beside all others; like any impression it is an example (a negative) of its item. The item is the next of
`ITEMS` ids in turn, so it takes a few rows of the ID table, never more, and may appear in `/v1/retrieve` like any item
that was shown, lowly placed, since nobody has ever clicked on it; whoever minds leaves ids of this prefix out, or sets
`canary_seconds` = 0. While it waits the canary asks the scorer a few times a second: those answers are part of
`streamgr_score_model_age_seconds`. Online quality leaves its users out.
"""

import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from streamgr.clock import Clock, Deadline
from streamgr.config import Monitor
from streamgr.errors import StreamgrError
from streamgr.monitor.outcomes import CANARY
from streamgr.service import Stop
from streamgr.telemetry import Log, counter, histogram

SEQUENCE = histogram("canary_sequence_seconds", "From a canary's append to its sight in the scorer's sequence.")
WEIGHTS = histogram("canary_weights_seconds", "From a canary's append to weights served whose horizon has passed it.")
LOST = counter("canary_lost", "Canaries not seen within the patience, by the hop they were lost at.", ("hop",))
HOPS = ("append", "sequence", "weights")
for _hop in HOPS:
    LOST.labels(_hop)  # 0 is a value too

USERS, ITEMS = 16, 8
LOOK_SECONDS = (0.05, 1.0)  # between two looks: at first, at last
ASK_SECONDS = 2.0
MAX_BYTES = 1 << 20

Seen = Callable[[str, float | None, int], None]  # hop, seconds or None for lost, now (ms)


class Publisher(Protocol):
    """What the canary needs of `kafka.producer.Producer`."""

    def send_stamped(self, topic: str, value: bytes, *, key: bytes, timeout: float | None = None) -> int: ...


class Canary:
    """`fly` one, or `run` one after the other until `stop`."""

    def __init__(
        self,
        settings: Monitor,
        topic: str,
        publisher: Publisher,
        *,
        clock: Clock,
        log: Log,
        stop: Stop,
        seen: Seen,
    ) -> None:
        """`seen` hears of every result."""
        self._settings, self._topic, self._publisher = settings, topic, publisher
        self._clock, self._log, self._stop, self._seen = clock, log, stop, seen
        self._scorer = settings.scorer.rstrip("/")
        self._begun, self._number = clock.now_ms(), 0
        self._why = ""  # the scorer's last silence

    def start(self) -> threading.Thread:
        """`run` in a thread of its own."""
        thread = threading.Thread(target=self.run, name="canary", daemon=True)
        thread.start()
        return thread

    def run(self) -> None:
        """One after the other, `canary_seconds` from start to start at best."""
        while not self._stop:
            due = Deadline(self._clock, self._settings.canary_seconds)
            self.fly()
            self._stop.wait(due.remaining())

    def fly(self) -> dict[str, float | None]:
        """One canary; seconds by hop, None where it was lost or we were told to stop."""
        self._number += 1
        user, item = f"{CANARY}{self._number % USERS}", f"{CANARY}item-{self._number % ITEMS}"
        event_id = f"{CANARY}{self._begun:x}-{self._number}"
        event = {
            "type": "impression",
            "event_id": event_id,
            "user_id": user,
            "item_id": item,
            "event_time": self._clock.now_ms(),
            "request_id": event_id,
            "surface": "canary",
        }
        patience = Deadline(self._clock, self._settings.canary_patience_seconds)
        try:
            append_ms = self._publisher.send_stamped(
                self._topic, msgspec.json.encode(event), key=user.encode(), timeout=patience.remaining()
            )
        except StreamgrError as error:
            self._why = str(error)
            self._lose("append")
            return {"sequence": None, "weights": None}
        return {
            "sequence": self._await("sequence", append_ms, patience, lambda: self._in_sequence(user, event_id)),
            "weights": self._await("weights", append_ms, patience, lambda: self._horizon_ms(user, item) >= append_ms),
        }

    def _await(self, hop: str, append_ms: int, patience: Deadline, looks: Callable[[], bool]) -> float | None:
        """Look again and again until it is seen or lost."""
        pause, longest = LOOK_SECONDS
        while True:
            try:
                if looks():
                    break
                self._why = "asked, and not seen"
            except (OSError, ValueError, KeyError, TypeError) as error:  # away, not ready, or no scorer at all
                self._why = str(error) or type(error).__name__
            if patience.passed():
                self._lose(hop)
                return None
            if self._stop.wait(min(pause, max(0.01, patience.remaining()))):
                return None
            pause = min(longest, pause * 1.3)
        now_ms = self._clock.now_ms()
        seconds = max(0, now_ms - append_ms) / 1000
        (SEQUENCE if hop == "sequence" else WEIGHTS).observe(seconds)
        self._seen(hop, seconds, now_ms)
        return seconds

    def _lose(self, hop: str) -> None:
        if self._stop:
            return
        LOST.labels(hop).inc()
        patience = self._settings.canary_patience_seconds
        self._log.warning("canary_lost", f"not seen within {patience:g} s: {self._why}", hop=hop, number=self._number)
        self._seen(hop, None, self._clock.now_ms())

    def _in_sequence(self, user: str, event_id: str) -> bool:
        shown = self._ask(f"/v1/users/{urllib.parse.quote(user, safe='')}/sequence?last=5")
        return any(event["event_id"] == event_id for event in shown["events"])

    def _horizon_ms(self, user: str, item: str) -> float:
        """The horizon of the weights that answer now."""
        answer = self._ask("/v1/rank", {"user_id": user, "candidates": [item]})
        return self._clock.now_ms() - float(answer["model_age_seconds"]) * 1000

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises `OSError` where there is no answer, `ValueError` where it is none."""
        request = urllib.request.Request(  # noqa: S310 (the configuration has checked it)
            self._scorer + path,
            None if body is None else msgspec.json.encode(body),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:  # noqa: S310
                found: dict[str, Any] = json.loads(answer.read(MAX_BYTES))
                return found
        except urllib.error.HTTPError as error:
            with error:
                raise OSError(f"{error.code} from {path.partition('?')[0]}") from None
