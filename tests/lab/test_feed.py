"""The feed: holds its rate, closes the loop, waits for the trainer, and closes every label at the end."""

import io
import itertools
import json
from collections.abc import Callable

import pytest

from streamgr.clock import ManualClock
from streamgr.config import Config, Sequence
from streamgr.config import Feed as Settings
from streamgr.errors import ConfigError
from streamgr.lab.feed import Feed, Ranker, Ranking
from streamgr.service import Stop
from streamgr.telemetry import Health

START = 1_700_000_000_000
SEQUENCE = Sequence(attribution_window_seconds=1.5, lateness_seconds=0.5, close_step_seconds=0.2)


class Waits(Stop):
    """Waiting moves the clock instead."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, seconds: float) -> bool:
        self._clock.advance(seconds)
        return bool(self)


class Log:
    """A producer that keeps what it gets, with the time it got it."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.sent: list[tuple[int, bytes | None, int | None, dict[str, object]]] = []

    def send(self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int | None = None) -> None:
        assert topic == "streamgr.events"
        self.sent.append((self._clock.now_ms(), key, partition, json.loads(value or b"{}")))

    def confirm(self, timeout: float | None = None) -> None:
        """All of it is here."""

    def of(self, *kinds: str) -> list[tuple[int, bytes | None, int | None, dict[str, object]]]:
        return [record for record in self.sent if record[3]["type"] in kinds]


def run(
    seconds: float = 10.0,
    ask: Callable[[str, list[str]], Ranking] = lambda user, candidates: Ranking("scorer", candidates, 1.0),
    clock: ManualClock | None = None,
    rate: float = 200.0,
) -> tuple[Log, list[dict[str, dict[str, float]]]]:
    clock = clock or ManualClock(START)
    config = Config(feed=Settings(rate=rate, users=40), sequence=SEQUENCE)
    log, oracle = Log(clock), io.BytesIO()
    feed = Feed(config, clock, Health("feed", clock), Waits(clock), publisher=log, partitions=3, ask=ask, oracle=oracle)
    assert feed.run(seconds) == len(log.of("impression", "click", "like"))
    return log, [json.loads(line) for line in oracle.getvalue().splitlines()]


def test_it_holds_its_rate() -> None:
    log, _ = run(10.0, rate=200.0)
    assert len(log.of("impression", "click", "like")) == pytest.approx(2000, rel=0.03)


def test_events_are_as_the_contract_has_them_and_sent_when_they_happen() -> None:
    log, _ = run()
    ids = [event["event_id"] for _, _, _, event in log.of("impression", "click", "like")]
    assert len(set(ids)) == len(ids)
    impressions = {(e["user_id"], e["item_id"], e["request_id"]): e for _, _, _, e in log.of("impression")}
    for at, key, partition, event in log.of("impression", "click", "like"):
        assert key == str(event["user_id"]).encode() and partition is None
        assert abs(at - int(str(event["event_time"]))) <= 20
    for _, _, _, action in log.of("click", "like"):
        shown = impressions[action["user_id"], action["item_id"], action["request_id"]]
        assert 0 < int(str(action["event_time"])) - int(str(shown["event_time"])) < 1500


def test_the_truth_is_kept_of_every_impression_and_of_nothing_else() -> None:
    log, truth = run(3.0)
    known = {event: p for one in truth for event, p in one.items()}
    assert known.keys() == {event["event_id"] for _, _, _, event in log.of("impression")}
    assert all(0 < p["like"] < p["click"] < 1 for p in known.values())
    assert not any("p" in event or "quality" in event for _, _, _, event in log.sent)


def test_every_partition_hears_a_heartbeat_a_beat() -> None:
    log, _ = run(4.0)
    for partition in range(3):
        times = [at for at, _, p, _ in log.of("heartbeat") if p == partition]
        assert max(b - a for a, b in itertools.pairwise(times)) <= 250


def test_the_last_heartbeat_closes_every_label() -> None:
    log, _ = run(2.0)
    newest = max(int(str(e["event_time"])) for _, _, _, e in log.of("impression"))
    assert [(p, key) for _, key, p, e in log.sent[-3:] if e["type"] == "heartbeat"] == [(0, None), (1, None), (2, None)]
    for _, _, _, beat in log.sent[-3:]:
        watermark = int(str(beat["event_time"])) - 500
        assert watermark - watermark % 200 >= newest + 1500


def test_what_the_scorer_ranks_first_is_shown_first() -> None:
    favourite: list[str] = []

    def ask(user: str, candidates: list[str]) -> Ranking:
        favourite.append(min(candidates))
        return Ranking("scorer", sorted(candidates), 1.0)

    log, _ = run(5.0, ask)
    first = [event["item_id"] for _, _, _, event in log.of("impression") if event["position"] == 0]
    agree = sum(a == b for a, b in zip(first, favourite, strict=True)) / len(first)
    assert 0.6 < agree < 1.0, "mostly the best, sometimes another, so that new items are seen"


def test_without_a_scorer_it_goes_on_in_random_order() -> None:
    log, _ = run(5.0, lambda user, candidates: Ranking("unreachable", []))
    assert len(log.of("impression", "click", "like")) == pytest.approx(1000, rel=0.05)


def test_it_waits_while_the_trainer_is_far_behind_and_beats_on() -> None:
    clock = ManualClock(START)

    def ask(user: str, candidates: list[str]) -> Ranking:
        stuck = START + 3000 <= clock.now_ms() < START + 7000
        return Ranking("scorer", candidates, 21.0 if stuck else 1.0)

    log, _ = run(10.0, ask, clock)
    assert not [at for at, *_ in log.of("impression") if START + 3100 < at < START + 7000]
    assert len([at for at, *_ in log.of("heartbeat") if START + 3100 < at < START + 6900]) >= 3 * 15
    after = [at for at, *_ in log.of("impression", "click", "like") if at >= START + 7000]
    assert len(after) < 200 * 3 * 1.5, "what was held back is not sent in a burst"


def test_a_slow_scorer_does_not_lower_the_rate() -> None:
    clock = ManualClock(START)

    def ask(user: str, candidates: list[str]) -> Ranking:
        clock.advance(0.2)
        return Ranking("scorer", candidates, 1.0)

    log, _ = run(10.0, ask, clock)
    assert len(log.of("impression", "click", "like")) == pytest.approx(2000, rel=0.1)


def test_the_simulators_kinds_must_be_known() -> None:
    clock = ManualClock(START)
    config = Config(sequence=Sequence(actions=("bookmark",)))
    with pytest.raises(ConfigError, match="click"):
        Feed(
            config,
            clock,
            Health("feed", clock),
            Stop(),
            publisher=Log(clock),
            partitions=1,
            ask=lambda user, candidates: Ranking("scorer", []),
            oracle=io.BytesIO(),
        )


def test_a_scorer_that_is_not_there_is_left_alone_for_a_moment() -> None:
    clock = ManualClock(START)
    ranker = Ranker("127.0.0.1:1", 0.2, clock)
    assert ranker.ask("u", ["a"]).source == "unreachable"
    assert ranker.ask("u", ["a"]) == Ranking("unreachable", [])
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Ranker("localhost", 0.2, clock)
