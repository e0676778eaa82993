"""What a consumer does when the log, the group or the broker does not play along."""

import random
import threading
from collections.abc import Callable
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from streamgr.clock import SystemClock
from streamgr.config import Kafka
from streamgr.errors import BrokerUnreachable, ConfigError, RetentionPassed
from streamgr.events import Record
from streamgr.kafka import topics
from streamgr.kafka.client import KAFKA_ERRORS
from streamgr.kafka.consumer import REBALANCES, RENEWALS, STRAYS, Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.service import Stop

NOWHERE = Kafka(bootstrap="127.0.0.1:1")


@pytest.fixture
def real(kafka: str, prefix: str) -> Kafka:
    settings = Kafka(bootstrap=kafka, topic_prefix=prefix)
    topics.apply(settings, topics.load_specs(topics.specs_path(), prefix))
    return settings


def drain(consumer: Consumer, done: Callable[[], bool], records: list[Record], seconds: float = 30.0) -> None:
    clock = SystemClock()
    end = clock.monotonic() + seconds
    while not done():
        assert clock.monotonic() < end
        records += consumer.poll()


def test_retention_that_overtook_a_position_is_named_and_never_jumped(real: Kafka, prefix: str) -> None:
    topic = f"{prefix}.events"
    producer = Producer(real, client_id="p")
    for _ in range(10):
        producer.send(topic, b"", partition=0)
    producer.confirm()
    producer.close()
    admin = AdminClient({"bootstrap.servers": real.bootstrap})
    admin.delete_records([TopicPartition(topic, 0, 6)])[TopicPartition(topic, 0, 6)].result(10)
    consumer, records = Consumer(real, client_id="c"), list[Record]()
    consumer.assign({(topic, 0): 2})
    with pytest.raises(RetentionPassed, match=rf"{topic}\[0\]@2: the log starts at 6.*by 4 records.*remedy: restore"):
        drain(consumer, lambda: False, records)
    assert records == []
    consumer.assign({(topic, 0): consumer.bounds(topic, 0)[0]})
    drain(consumer, lambda: len(records) == 4, records)
    consumer.close()


def test_the_mock_drops_what_no_longer_fits_and_that_is_named_too(prefix: str) -> None:
    with EmbeddedBroker.start_mock() as mock:
        settings, topic = Kafka(bootstrap=mock.bootstrap), f"{prefix}.weights"
        producer = Producer(settings, client_id="p")
        for n in range(16):
            producer.send(topic, random.Random(n).randbytes(500_000), partition=0)  # lz4 must not shrink it
        producer.confirm()
        consumer = Consumer(settings, client_id="c")
        low, high = consumer.bounds(topic, 0)
        assert 0 < low < high == 16
        consumer.assign({(topic, 0): 0})
        with pytest.raises(RetentionPassed, match=rf"{topic}\[0\]@0: the log starts at {low}"):
            drain(consumer, lambda: False, [])
        consumer.close()
        producer.close()


def test_two_members_share_a_topic_and_every_record_is_read_once(real: Kafka, prefix: str) -> None:
    """Positions live in `store` as they would in the partitions' databases; the second member joins midway."""
    topic, group = f"{prefix}.events", f"{prefix}-sequencer"
    store, seen, lock = dict.fromkeys(range(4), 0), list[tuple[int, int]](), threading.Lock()
    owners: dict[int, str] = {}
    calls: list[tuple[str, str, tuple[int, ...]]] = []

    class Member(threading.Thread):
        def __init__(self, label: str) -> None:
            super().__init__(name=label)
            self.consumer = Consumer(real, client_id=label, group=group)
            self.leave = Stop()
            self.coming: set[int] = set()
            self.consumer.subscribe(topic, self.on_assign, self.on_revoke, self.on_revoke)

        def on_assign(self, partitions: list[int]) -> None:
            with lock:
                calls.append((self.name, "assign", tuple(partitions)))
                assert not owners.keys() & set(partitions), "a partition has two owners"
                owners.update(dict.fromkeys(partitions, self.name))
                self.coming |= set(partitions)

        def on_revoke(self, partitions: list[int]) -> None:
            with lock:
                calls.append((self.name, "revoke", tuple(partitions)))
                self.coming -= set(partitions)
                for p in partitions:
                    assert owners.pop(p) == self.name

        def run(self) -> None:
            while not self.leave:
                if self.coming:
                    partition = self.coming.pop()
                    self.consumer.start(topic, partition, store[partition])
                for record in self.consumer.poll(100, 0.05):
                    with lock:
                        assert owners[record.partition] == self.name and record.offset == store[record.partition]
                        store[record.partition] += 1
                        seen.append((record.partition, record.offset))
            self.consumer.close()

    def wait(condition: Callable[[], bool]) -> None:
        clock = SystemClock()
        end = clock.monotonic() + 30
        while not condition():
            assert clock.monotonic() < end, (store, owners, calls)
            Stop().wait(0.02)

    producer, first = Producer(real, client_id="p"), Member("first")
    first.start()
    wait(lambda: len(owners) == 4)
    second = Member("second")
    second.start()
    for n in range(4000):
        producer.send(topic, b"", partition=n % 4)
        if n % 100 == 0:
            producer.confirm()
    producer.confirm()
    wait(lambda: sorted(owners.values()) == ["first", "first", "second", "second"])
    first.leave.set()
    for _ in range(400):
        producer.send(topic, b"", partition=0)
    producer.confirm()
    wait(lambda: store == {0: 1400, 1: 1000, 2: 1000, 3: 1000} and set(owners.values()) == {"second"})
    second.leave.set()
    first.join(30)
    second.join(30)
    producer.close()
    assert len(seen) == len(set(seen)) == 4400 and not owners
    moved = [c for c in calls if c[:2] == ("first", "revoke")]
    assert moved and len(moved[0][2]) == 2, f"cooperative: only what moves is revoked, {calls}"


class FakeLibrdkafka:
    """Stands in for librdkafka's consumer: hands out `messages`, remembers what it was told."""

    def __init__(self, conf: dict[str, Any]) -> None:
        self.conf, self.messages, self.told = conf, list[Any](), list[tuple[str, list[tuple[int, int]]]]()

    def subscribe(self, topics: list[str], **callbacks: Any) -> None:
        self.callbacks = callbacks

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        self.told.append(("assign", [(p.partition, p.offset) for p in partitions]))

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        self.told.append(("unassign", [(p.partition, p.offset) for p in partitions]))

    def poll(self, timeout: float) -> Any:
        return self.messages.pop(0) if self.messages else None

    def consume(self, count: int, timeout: float) -> list[Any]:
        taken, self.messages = self.messages[:count], self.messages[count:]
        return taken

    def get_watermark_offsets(self, partition: TopicPartition, cached: bool) -> tuple[int, int]:
        return -1001, -1001


class FakeMessage:
    def __init__(self, partition: int, offset: int) -> None:
        self._at = (partition, offset)

    def __getattr__(self, name: str) -> Callable[[], Any]:
        partition, offset = self._at
        values = {"topic": "t", "partition": partition, "offset": offset, "timestamp": (2, 5), "error": None}
        return lambda: values.get(name, b"")


def fake(monkeypatch: pytest.MonkeyPatch) -> tuple[Consumer, FakeLibrdkafka]:
    monkeypatch.setattr(confluent_kafka, "Consumer", FakeLibrdkafka)
    consumer = Consumer(NOWHERE, client_id="c", group="g")
    inner: Any = consumer._consumer
    return consumer, inner


def parts(*numbers: int) -> list[TopicPartition]:
    return [TopicPartition("t", n) for n in numbers]


def test_lost_is_told_apart_from_revoked_and_strays_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer, inner = fake(monkeypatch)
    calls: list[tuple[str, list[int]]] = []
    strays, lost = STRAYS._value.get(), REBALANCES.labels("lost")._value.get()
    consumer.subscribe(
        "t",
        lambda ps: calls.append(("assign", ps)),
        lambda ps: calls.append(("revoke", ps)),
        lambda ps: calls.append(("lost", ps)),
    )
    inner.callbacks["on_assign"](inner, parts(2, 1, 3, 4))
    for partition in (1, 2, 3):
        consumer.start("t", partition, 10 * partition)
    inner.callbacks["on_revoke"](inner, parts(2, 4))  # 4 was never started
    inner.messages = [FakeMessage(1, 10), FakeMessage(2, 20), FakeMessage(3, 30)]
    assert [r.partition for r in consumer.poll()] == [1, 3]  # 2 was prefetched before it went
    inner.callbacks["on_lost"](inner, parts(1, 3))
    inner.messages = [FakeMessage(1, 11)]
    assert consumer.poll() == []
    assert calls == [("assign", [1, 2, 3, 4]), ("revoke", [2, 4]), ("lost", [1, 3])]
    started = [("assign", [(p, 10 * p)]) for p in (1, 2, 3)]
    gone = [("unassign", [p for p, _ in parts]) for parts in ([(2, 0)], [(1, 0), (3, 0)])]
    assert inner.told[:4] == [("assign", []), *started]
    assert [(kind, [p for p, _ in parts]) for kind, parts in inner.told[4:]] == gone
    assert STRAYS._value.get() == strays + 2 and REBALANCES.labels("lost")._value.get() == lost + 1


def test_nothing_of_a_partition_is_handed_out_after_its_revocation_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer, inner = fake(monkeypatch)

    def fails(_: list[int]) -> None:
        raise OSError("disk full")

    consumer.subscribe("t", lambda ps: None, fails, fails)
    inner.callbacks["on_assign"](inner, parts(0))
    consumer.start("t", 0, 0)
    with pytest.raises(OSError, match="disk full"):
        inner.callbacks["on_revoke"](inner, parts(0))
    inner.messages = [FakeMessage(0, 0)]
    assert consumer.poll() == []


def test_exactness_settings_reach_librdkafka(monkeypatch: pytest.MonkeyPatch) -> None:
    _, inner = fake(monkeypatch)
    wanted = {
        "group.id": "g",
        "auto.offset.reset": "error",
        "enable.auto.commit": False,
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": 10_000,
        "fetch.wait.max.ms": 50,
    }
    assert wanted.items() <= inner.conf.items()


def test_an_error_of_a_rebalance_callback_comes_out_of_poll(real: Kafka, prefix: str) -> None:
    consumer = Consumer(real, client_id="c", group=f"{prefix}-g")

    def refuse(_: list[int]) -> None:
        raise ConfigError("the store belongs to another topic")

    consumer.subscribe(f"{prefix}.events", refuse, lambda _: None, lambda _: None)
    with pytest.raises(ConfigError, match="another topic"):
        drain(consumer, lambda: False, [])
    consumer.close()


def test_a_broker_that_is_away_is_waited_for_within_the_callers_bounds() -> None:
    consumer = Consumer(NOWHERE, client_id="c")
    errors = KAFKA_ERRORS.labels("consumer")._value.get()
    with pytest.raises(BrokerUnreachable, match=r"check kafka.bootstrap \(127.0.0.1:1\)") as caught:
        consumer.partitions("t", wait_seconds=0.5)
    assert caught.value.exit_code == 69
    consumer.assign({("t", 0): 0})
    assert consumer.poll(timeout=0.3) == []  # a role goes on asking
    assert KAFKA_ERRORS.labels("consumer")._value.get() > errors
    consumer.close()


class Lost:
    """A client that has lost its partitions for good, as librdkafka's may; for the rest it is the real one."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def get_watermark_offsets(self, *_: Any, **__: Any) -> tuple[int, int]:
        raise confluent_kafka.KafkaException(confluent_kafka.KafkaError(confluent_kafka.KafkaError._UNKNOWN_PARTITION))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_client_without_answers_is_replaced_and_reads_on_from_where_we_are(
    real: Kafka, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamgr.kafka.consumer.DESPAIR_SECONDS", 0.5)
    topic, records = f"{prefix}.events", list[Record]()
    producer = Producer(real, client_id="p")
    for n in range(20):
        producer.send(topic, str(n).encode(), partition=n % 2)
    producer.confirm()
    consumer = Consumer(real, client_id="c")
    consumer.assign({(topic, 0): 0, (topic, 1): 0})
    consumer.pause(topic, [1])
    records += consumer.poll(3, timeout=10.0)
    before, consumer._consumer = RENEWALS._value.get(), Lost(consumer._consumer)  # type: ignore[assignment]
    assert consumer.bounds(topic, 0) == (0, 10)
    assert RENEWALS._value.get() == before + 1
    drain(consumer, lambda: len(records) == 10, records)
    assert [(r.partition, r.offset) for r in records] == [(0, n) for n in range(10)]
    assert consumer.poll(timeout=1.0) == [], "what was paused stays so"
    consumer.resume(topic, [1])
    drain(consumer, lambda: len(records) == 20, records)
    assert [r.offset for r in records[10:]] == list(range(10))
    consumer.close()
    producer.close()


def test_a_client_is_replaced_while_the_broker_is_away_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgr.kafka.consumer.DESPAIR_SECONDS", 0.5)
    consumer, before = Consumer(NOWHERE, client_id="c"), RENEWALS._value.get()
    with pytest.raises(BrokerUnreachable):
        consumer.bounds("t", 0, wait_seconds=5.0)
    assert RENEWALS._value.get() > before
    consumer.close()


def test_a_role_told_to_stop_does_not_wait_for_the_broker() -> None:
    stop = Stop()
    stop.set()
    consumer = Consumer(NOWHERE, client_id="c", stop=stop)
    clock = SystemClock()
    start = clock.monotonic()
    with pytest.raises(BrokerUnreachable):
        consumer.bounds("t", 0)
    assert clock.monotonic() - start < 10
    consumer.close()


def test_no_position_below_zero() -> None:
    consumer = Consumer(NOWHERE, client_id="c")
    with pytest.raises(ConfigError, match="-2 is not an offset"):
        consumer.assign({("t", 0): -2})
    consumer.close()
