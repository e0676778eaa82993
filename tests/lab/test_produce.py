"""Publishing a file: keys, order, pace, heartbeats that carry the file's clock, and the end that closes every label."""

import itertools
import json
from collections import defaultdict
from pathlib import Path

import pytest

from streamgr.clock import ManualClock, SystemClock
from streamgr.config import Config, Kafka, Sequence
from streamgr.errors import DataError, TryAgain, UsageError
from streamgr.events import Event, Heartbeat
from streamgr.kafka import topics
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.lab.datasets import Dataset
from streamgr.lab.produce import closing_ms, columns, publish
from streamgr.sequence.watermark import Watermark
from streamgr.service import Stop

WINDOW, LATENESS, STEP = 5_000, 2_000, 500
T = 1_700_000_000_000
PARTITIONS = 3


def settings(**change: float) -> Config:
    base = {"attribution_window_seconds": WINDOW / 1000, "lateness_seconds": LATENESS / 1000}
    return Config(sequence=Sequence(**{**base, "close_step_seconds": STEP / 1000, **change}))  # type: ignore[arg-type]


class Log:
    """A sender that keeps what it was given: (partition or None, key, the JSON, when)."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock, self.confirmed = clock, -1
        self.sent: list[tuple[int | None, bytes | None, dict[str, object], int]] = []

    def send(self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int | None = None) -> None:
        assert topic == "streamgr.events"
        assert value is not None
        self.sent.append((partition, key, json.loads(value), self.clock.now_ms()))

    def confirm(self, timeout: float | None = None) -> None:
        self.confirmed = len(self.sent)

    def beats(self, partition: int) -> list[int]:
        return [int(str(v["event_time"])) for p, k, v, _ in self.sent if p == partition and v["type"] == "heartbeat"]

    def times(self) -> list[int]:
        return [int(str(v["event_time"])) for _, k, v, _ in self.sent if k is not None]


class Waits(Stop):
    """Waiting moves the clock instead."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, seconds: float) -> bool:
        self._clock.advance(seconds + 0.001)
        return bool(self)


def lines(path: Path, times: list[int], bad_at: int = -1) -> Dataset:
    rows = [{"type": "click", "user_id": f"u{n % 7}", "item_id": "i", "event_time": t} for n, t in enumerate(times)]
    if bad_at >= 0:
        rows[bad_at]["item_id"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(path)


def sent(tmp_path: Path, config: Config, times: list[int], *, speed: float = 0.0, close: bool = False) -> Log:
    clock = ManualClock(T)
    log = Log(clock)
    done = publish(
        config, lines(tmp_path / "log.jsonl", times), log, PARTITIONS, speed=speed, close=close, clock=clock,
        stop=Waits(clock),
    )  # fmt: skip
    assert log.confirmed == len(log.sent)
    assert done.events == len(times) == len(log.times())
    assert done.heartbeats == len(log.sent) - len(times)
    assert (done.first_ms, done.last_ms, done.kinds) == (times[0], max(times), ["click"])
    return log


def test_events_go_out_in_order_under_their_user_and_nothing_else_for_a_few(tmp_path: Path) -> None:
    log = sent(tmp_path, settings(), [T, T + 60_000, T + 120_000])
    assert [(p, k, v["event_id"]) for p, k, v, _ in log.sent] == [
        (None, b"u0", "log-1"), (None, b"u1", "log-2"), (None, b"u2", "log-3")
    ]  # fmt: skip


def test_close_ends_past_every_open_label_in_every_partition(tmp_path: Path) -> None:
    config = settings()
    log = sent(tmp_path, config, [T, T + 10_333, T + 5_000], close=True)
    assert [p for p, _, v, _ in log.sent[3:]] == list(range(PARTITIONS))
    for partition in range(PARTITIONS):
        watermark = Watermark(LATENESS, STEP)
        watermark.advance(T + 10_333)
        watermark.advance(log.beats(partition)[-1])
        assert watermark.reached(T + 10_333 + WINDOW)
    assert closing_ms(config.sequence) == WINDOW + LATENESS + STEP


@pytest.mark.parametrize("close", [False, True])
def test_gaps_are_crossed_in_steps_that_one_record_may_move_a_watermark(tmp_path: Path, close: bool) -> None:
    limit = 3_000
    year = [T + n * 7_000 for n in range(50)] + [T + 400_000 + n for n in range(50)] + [T + 900_000]
    log = sent(tmp_path, settings(max_step_seconds=limit / 1000), year, close=close)
    for partition in range(PARTITIONS):  # a partition without a user of its own
        beats = [T, *log.beats(partition)]
        assert all(0 <= later - earlier <= limit for earlier, later in itertools.pairwise(beats))
        assert beats[-1] >= 900_000 + T + (WINDOW + LATENESS + STEP if close else -100_000)
        watermark = Watermark(LATENESS, STEP, limit)
        for time in beats:
            watermark.advance(time)
        assert not close or watermark.reached(T + 900_000 + WINDOW)


def test_a_quiet_partition_hears_the_clock_as_the_file_goes_on_but_no_heartbeat_lies_ahead_of_it(
    tmp_path: Path,
) -> None:
    log = sent(tmp_path, settings(), [T + n * 400 for n in range(400)])
    beats = log.beats(0)
    assert 5 < len(beats) <= 400 // (10 * PARTITIONS)
    latest = 0
    for _, key, value, _ in log.sent:
        time = int(str(value["event_time"]))
        if key is None:
            assert latest <= time <= latest + 400
        latest = max(latest, time)


def test_a_file_out_of_order_beyond_the_lateness_gets_no_clock(tmp_path: Path) -> None:
    by_user = [T + n * 400 for n in range(60)] + [T + n * 400 for n in range(300)]
    log = sent(tmp_path, settings(), by_user)
    assert all(v["type"] != "heartbeat" for _, _, v, _ in log.sent[70:])


def test_paced_events_leave_when_they_are_due_and_heartbeats_fill_the_wait(tmp_path: Path) -> None:
    times = [T, T + 1_000, T + 60_000]
    log = sent(tmp_path, settings(), times, speed=10.0)
    when = {int(str(v["event_time"])): at - T for _, k, v, at in log.sent if k is not None}
    for time in times:
        assert (time - T) / 10 <= when[time] <= (time - T) / 10 + 50
    waiting = [t for t in log.beats(1) if T + 1_000 < t <= T + 60_000]
    assert 20 <= len(waiting) <= 30  # one about every 0.2 s of the 5.9 s between
    assert waiting == sorted(waiting)


def test_told_to_stop_it_confirms_and_says_so(tmp_path: Path) -> None:
    clock = ManualClock(T)
    log, stop = Log(clock), Waits(clock)
    stop.set()
    with pytest.raises(TryAgain, match=r"after 0 events.*run it again"):
        publish(settings(), lines(tmp_path / "l.jsonl", [T]), log, 1, clock=clock, stop=stop)


def test_a_bad_row_ends_it_after_the_rows_before_are_confirmed(tmp_path: Path) -> None:
    clock = ManualClock(T)
    log = Log(clock)
    with pytest.raises(DataError, match=r"l\.jsonl:3: out_of_range"):
        publish(settings(), lines(tmp_path / "l.jsonl", [T] * 5, 2), log, 1, clock=clock, stop=Waits(clock))
    assert (len(log.times()), log.confirmed) == (2, 2)


def test_heartbeats_of_the_file_go_to_every_partition(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text(f'{{"type":"heartbeat","event_time":{T}}}\n')
    clock = ManualClock(T)
    log = Log(clock)
    done = publish(settings(), Dataset(path), log, PARTITIONS, clock=clock, stop=Waits(clock))
    assert [log.beats(p) for p in range(PARTITIONS)] == [[T]] * PARTITIONS
    assert (done.events, done.heartbeats) == (0, PARTITIONS)


def test_column_options() -> None:
    assert columns(["user_id=who", "type==click"]) == {"user_id": "who", "type": "=click"}
    with pytest.raises(UsageError, match="FIELD=COLUMN"):
        columns(["user_id"])


def test_through_a_broker_every_user_lives_in_one_partition(
    broker: EmbeddedBroker, prefix: str, tmp_path: Path
) -> None:
    config = Config(kafka=Kafka(bootstrap=broker.bootstrap, topic_prefix=prefix), sequence=settings().sequence)
    topics.apply(config.kafka, topics.load_specs(topics.specs_path(), prefix))
    dataset = lines(tmp_path / "log.jsonl", [T + n * 400 for n in range(300)])
    producer = Producer(config.kafka, client_id="test")
    partitions = topics.identity(config.kafka, config.topic("events")).partitions
    try:
        done = publish(config, dataset, producer, partitions, close=True, clock=SystemClock(), stop=Stop())
    finally:
        producer.close()
    consumer = Consumer(config.kafka, client_id="test")
    seen: dict[int, list[Event | Heartbeat]] = defaultdict(list)
    try:
        topic = config.topic("events")
        ends = {p: consumer.bounds(topic, p)[1] for p in consumer.partitions(topic)}
        consumer.assign({(topic, p): 0 for p in ends})
        while sum(map(len, seen.values())) < sum(ends.values()):
            for record in consumer.poll(timeout=1.0):
                assert record.append_ms > T + 1e10  # the broker's clock, not the log's
                value = json.loads(record.value or b"")
                seen[record.partition].append(
                    Heartbeat(value["event_time"])
                    if record.key is None
                    else Event(2, record.key.decode(), value["item_id"], value["event_id"], value["event_time"])
                )
    finally:
        consumer.close()
    users = [{e.user for e in events if isinstance(e, Event)} for events in seen.values()]
    assert sum(map(len, users)) == len(set().union(*users)) == 7
    assert sum(isinstance(e, Event) for events in seen.values() for e in events) == done.events == 300
    assert {events[-1] for events in seen.values()} == {Heartbeat(T + 299 * 400 + closing_ms(config.sequence))}
