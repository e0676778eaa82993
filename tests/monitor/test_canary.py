"""The canary against a small real HTTP scorer, whose sequences and weights are a little behind."""

import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from streamgr.clock import SystemClock
from streamgr.config import Monitor, Telemetry
from streamgr.errors import TryAgain
from streamgr.monitor.canary import ITEMS, LOST, SEQUENCE, USERS, WEIGHTS, Canary
from streamgr.monitor.outcomes import CANARY
from streamgr.service import Stop
from streamgr.telemetry import Log

CLOCK = SystemClock()


class FakeScorer:
    """Speaks the contract's two calls; publishing is what makes it know of an event, after a while."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.appended: dict[str, int] = {}
        self.sequence_ms, self.weights_ms = 150, 400
        self.down = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                user = urllib.parse.unquote(self.path.split("/")[3])
                seen = [
                    event
                    for event in fake.events
                    if event["user_id"] == user
                    and CLOCK.now_ms() - fake.appended[event["event_id"]] >= fake.sequence_ms
                ]
                self._answer({"user_id": user, "events": seen[-5:]})

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self._answer({"items": [], "weights_version": 3, "model_age_seconds": fake.weights_ms / 1000})

            def _answer(self, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(503 if fake.down else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def send_stamped(self, topic: str, value: bytes, *, key: bytes, timeout: float | None = None) -> int:
        event = json.loads(value)
        assert topic == "streamgr.events" and key.decode() == event["user_id"]
        self.appended[event["event_id"]] = CLOCK.now_ms()
        self.events.append(event)
        return self.appended[event["event_id"]]


@pytest.fixture
def scorer() -> Iterator[FakeScorer]:
    made = FakeScorer()
    yield made
    made.server.shutdown()
    made.server.server_close()


def canary(scorer: FakeScorer, seen: list[Any], stop: Stop | None = None, **settings: Any) -> Canary:
    monitor = Monitor(scorer=scorer.url, **{"canary_patience_seconds": 5.0} | settings)
    log = Log("monitor", Telemetry(log_level="error"), CLOCK)
    stop = Stop() if stop is None else stop
    heard = lambda hop, seconds, ms: seen.append((hop, seconds))  # noqa: E731
    return Canary(monitor, "streamgr.events", scorer, clock=CLOCK, log=log, stop=stop, seen=heard)


def count(histogram: Any) -> float:
    return float(sum(bucket.get() for bucket in histogram._buckets))


def test_it_measures_both_ways_apart(scorer: FakeScorer) -> None:
    seen: list[Any] = []
    before = count(SEQUENCE), count(WEIGHTS)
    found = canary(scorer, seen).fly()
    assert found["sequence"] is not None and 0.15 <= found["sequence"] < 0.15 + 0.3
    assert found["weights"] is not None and 0.4 <= found["weights"] < 0.4 + 0.4
    assert seen == [("sequence", found["sequence"]), ("weights", found["weights"])]
    assert (count(SEQUENCE), count(WEIGHTS)) == (before[0] + 1, before[1] + 1)


def test_its_events_are_marked_few_and_its_ids_come_again(scorer: FakeScorer) -> None:
    scorer.sequence_ms = scorer.weights_ms = 0
    flown = canary(scorer, [])
    for _ in range(2 * USERS):
        flown.fly()
    events = scorer.events
    assert all(e[key].startswith(CANARY) for e in events for key in ("user_id", "item_id", "event_id"))
    assert len({e["item_id"] for e in events}) == ITEMS and len({e["user_id"] for e in events}) == USERS
    assert len({e["event_id"] for e in events}) == len(events) == 2 * USERS
    assert {e["type"] for e in events} == {"impression"}


def test_one_that_is_not_seen_is_lost_at_its_hop(scorer: FakeScorer) -> None:
    seen: list[Any] = []
    before = {hop: LOST.labels(hop)._value.get() for hop in ("append", "sequence", "weights")}
    scorer.weights_ms = 60_000
    found = canary(scorer, seen, canary_patience_seconds=0.6).fly()
    assert found["sequence"] is not None and found["weights"] is None
    scorer.down = True
    assert canary(scorer, seen, canary_patience_seconds=0.2).fly() == {"sequence": None, "weights": None}
    after = {hop: LOST.labels(hop)._value.get() - n for hop, n in before.items()}
    assert after == {"append": 0, "sequence": 1, "weights": 2}
    assert [hop for hop, seconds in seen if seconds is None] == ["weights", "sequence", "weights"]


def test_a_broker_that_does_not_acknowledge_is_the_first_hop(
    scorer: FakeScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise TryAgain("1 records are not acknowledged")

    monkeypatch.setattr(scorer, "send_stamped", refuse)
    before, seen = LOST.labels("append")._value.get(), list[Any]()
    canary(scorer, seen).fly()
    assert LOST.labels("append")._value.get() == before + 1 and seen == [("append", None)]


def test_told_to_stop_it_leaves_and_nothing_is_lost(scorer: FakeScorer) -> None:
    stop, seen = Stop(), list[Any]()
    scorer.sequence_ms = 60_000
    before = LOST.labels("sequence")._value.get()
    thread = canary(scorer, seen, stop, canary_patience_seconds=60.0).start()
    stop.set()
    thread.join(3)
    assert not thread.is_alive() and LOST.labels("sequence")._value.get() == before
