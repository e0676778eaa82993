"""The one contract that every broker we run on must meet: a real Kafka and the mock cluster."""

import random
from collections.abc import Callable, Iterator

import pytest
from confluent_kafka import Consumer as Raw
from confluent_kafka import TopicPartition

from streamgr.clock import SystemClock
from streamgr.config import Kafka
from streamgr.errors import ConfigError, DataError
from streamgr.events import Record
from streamgr.kafka import topics
from streamgr.kafka.consumer import LAG, POSITION_TIME, Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import MAX_MESSAGE_BYTES, Producer


@pytest.fixture
def settings(broker: EmbeddedBroker, prefix: str) -> Kafka:
    settings = Kafka(bootstrap=broker.bootstrap, topic_prefix=prefix)
    assert not [f for f in topics.apply(settings, topics.load_specs(topics.specs_path(), prefix)) if f.level == "fail"]
    return settings


@pytest.fixture
def topic(prefix: str) -> str:
    return f"{prefix}.events"


@pytest.fixture
def producer(settings: Kafka) -> Iterator[Producer]:
    producer = Producer(settings, client_id="test-producer")
    yield producer
    producer.close()


@pytest.fixture
def consumer(settings: Kafka) -> Iterator[Consumer]:
    consumer = Consumer(settings, client_id="test-consumer")
    yield consumer
    consumer.close()


def until(consumer: Consumer, enough: Callable[[list[Record]], object], seconds: float = 20.0) -> list[Record]:
    clock, records = SystemClock(), list[Record]()
    end = clock.monotonic() + seconds
    while not enough(records):
        assert clock.monotonic() < end, f"only {len(records)} records"
        records += consumer.poll()
    return records


def test_what_is_sent_arrives_in_order_with_key_value_and_append_time(
    settings: Kafka, producer: Producer, consumer: Consumer, topic: str
) -> None:
    before = SystemClock().now_ms()
    for n in range(300):
        producer.send(topic, b"%d" % n, key=b"k", partition=n % 2)
    assert producer.send_confirmed(topic, None, key=b"user", partition=3) == 0
    assert consumer.partitions(topic) == [0, 1, 2, 3]
    assert [consumer.bounds(topic, p) for p in range(4)] == [(0, 150), (0, 150), (0, 0), (0, 1)]
    consumer.assign({(topic, p): 0 for p in range(4)})
    records = until(consumer, lambda records: len(records) == 301)
    for p in (0, 1):
        mine = [r for r in records if r.partition == p]
        assert [(r.offset, r.value) for r in mine] == [(i, b"%d" % (2 * i + p)) for i in range(150)]
    (erasure,) = (r for r in records if r.partition == 3)
    assert erasure[:5] == (topic, 3, 0, b"user", None)
    assert all(before - 1000 <= r.append_ms <= SystemClock().now_ms() + 1000 for r in records)


def test_reading_starts_at_exactly_the_given_positions_and_assign_replaces(
    producer: Producer, consumer: Consumer, topic: str
) -> None:
    for n in range(50):
        producer.send(topic, b"%d" % n, partition=0)
        producer.send(topic, b"%d" % n, partition=1)
    producer.confirm()
    consumer.assign({(topic, 0): 17})
    assert [r.offset for r in until(consumer, lambda r: len(r) == 33)] == list(range(17, 50))
    consumer.assign({(topic, 1): 48})
    assert [(r.partition, r.offset) for r in until(consumer, lambda r: len(r) == 2)] == [(1, 48), (1, 49)]
    consumer.assign({(topic, 1): 50})  # the end itself is a position
    assert consumer.poll(timeout=0.3) == []


@pytest.mark.parametrize("max_records", [1, 2, 1000])
def test_a_poll_never_returns_more_than_asked(
    producer: Producer, consumer: Consumer, topic: str, max_records: int
) -> None:
    for n in range(7):
        producer.send(topic, b"%d" % n, partition=0)
    producer.confirm()
    consumer.assign({(topic, 0): 0})
    seen: list[int] = []
    while len(seen) < 7:
        batch = consumer.poll(max_records, 1.0)
        assert len(batch) <= max_records
        seen += [r.offset for r in batch]
    assert seen == list(range(7))


def test_the_timeout_is_no_added_latency(producer: Producer, consumer: Consumer, topic: str) -> None:
    producer.send_confirmed(topic, b"first", partition=0)
    consumer.assign({(topic, 0): 0})
    until(consumer, lambda r: r)
    clock = SystemClock()
    producer.send_confirmed(topic, b"second", partition=0)
    start = clock.monotonic()
    assert [r.value for r in consumer.poll(1000, 10.0)] == [b"second"]
    assert clock.monotonic() - start < 3.0


def test_pausing_skips_nothing(producer: Producer, consumer: Consumer, topic: str) -> None:
    for n in range(2000):
        producer.send(topic, b"%d" % n, partition=n % 2)
    producer.confirm()
    consumer.assign({(topic, 0): 0, (topic, 1): 0})
    records = until(consumer, lambda r: r)
    consumer.pause(topic, [0])
    late = until(consumer, lambda r: sum(x.partition == 1 for x in records + r) == 1000)
    late += consumer.poll(timeout=0.2)
    assert not [r for r in late if r.partition == 0]
    consumer.resume(topic, [0])
    records += late + until(consumer, lambda r: sum(x.partition == 0 for x in records + late + r) == 1000)
    for p in (0, 1):
        assert [r.offset for r in records if r.partition == p] == list(range(1000))


def test_a_key_chooses_the_partition_as_kafkas_own_clients_do(
    producer: Producer, consumer: Consumer, topic: str
) -> None:
    assert murmur2(b"foobar") == -790332482 & 0xFFFFFFFF  # a vector of Apache Kafka's UtilsTest
    keys = [b"foobar", b"21", "Zoë".encode(), *(b"user-%d" % n for n in range(40))]
    for key in keys:
        producer.send(topic, b"", key=key)
    producer.confirm()
    consumer.assign({(topic, p): 0 for p in range(4)})
    found = {r.key: r.partition for r in until(consumer, lambda r: len(r) == len(keys))}
    assert found == {key: (murmur2(key) & 0x7FFFFFFF) % 4 for key in keys}


def test_headers_travel(settings: Kafka, producer: Producer, topic: str) -> None:
    producer.send_confirmed(topic, b"v", partition=2, headers=[("reason", b"invalid_json"), ("offset", b"7")])
    raw = Raw({"bootstrap.servers": settings.bootstrap, "group.id": "raw", "enable.auto.commit": False})
    raw.assign([TopicPartition(topic, 2, 0)])
    message = raw.poll(10)
    assert message is not None and message.headers() == [("reason", b"invalid_json"), ("offset", b"7")]
    raw.close()


def test_two_megabytes_pass_and_what_is_larger_than_the_producer_takes_is_named(
    producer: Producer, consumer: Consumer, topic: str
) -> None:
    large = random.Random(1).randbytes(2_000_000)  # lz4 does not shrink it
    producer.send_confirmed(topic, large, partition=0)
    consumer.assign({(topic, 0): 0})
    assert until(consumer, lambda r: r)[0].value == large
    with pytest.raises(DataError, match=r"larger.*remedy"):
        producer.send(topic, bytes(MAX_MESSAGE_BYTES + 1), partition=0)
    assert producer.send_confirmed(topic, b"the producer goes on", partition=0) == 1


def test_a_missing_topic_is_a_configuration_error(consumer: Consumer, prefix: str) -> None:
    with pytest.raises(ConfigError, match=rf"{prefix}\.nothing.*streamgr topics apply"):
        consumer.partitions(f"{prefix}.nothing")


def test_a_position_beyond_the_end_is_not_taken_for_retention(
    producer: Producer, consumer: Consumer, topic: str
) -> None:
    producer.send_confirmed(topic, b"", partition=0)
    consumer.assign({(topic, 0): 77})
    with pytest.raises(DataError, match=rf"{topic}\[0\]@77.*recreated or truncated"):
        until(consumer, lambda r: False)


def test_a_lone_member_gets_all_partitions_from_the_positions_it_names(
    settings: Kafka, producer: Producer, topic: str, prefix: str
) -> None:
    for n in range(40):
        producer.send(topic, b"%d" % n, partition=n % 4)
    producer.confirm()
    calls: list[tuple[str, list[int]]] = []

    def on_assign(partitions: list[int]) -> None:
        calls.append(("assign", partitions))

    member = Consumer(settings, client_id="member", group=f"{prefix}-group")
    member.subscribe(topic, on_assign, lambda ps: calls.append(("revoke", ps)), lambda ps: calls.append(("lost", ps)))
    until(member, lambda r: calls or r)
    for p in calls[0][1]:
        member.start(topic, p, 3 + p)
    records = until(member, lambda r: len(r) == 22)
    assert {p: [r.offset for r in records if r.partition == p] for p in range(4)} == {
        p: list(range(3 + p, 10)) for p in range(4)
    }
    member.commit({(topic, p): 10 for p in range(4)})
    member.close()
    member.close()
    assert calls == [("assign", [0, 1, 2, 3]), ("revoke", [0, 1, 2, 3])]


def test_lag_and_position_time_are_exported(producer: Producer, consumer: Consumer, topic: str) -> None:
    for n in range(100):
        producer.send(topic, b"%d" % n, partition=0)
    producer.confirm()
    consumer.assign({(topic, 0): 0})
    records = consumer.poll(10, 10.0)
    assert consumer.lag() == {(topic, 0): 100 - len(records)}
    assert LAG.labels(topic)._value.get() == 100 - len(records)
    assert POSITION_TIME.labels(topic)._value.get() == records[-1].append_ms / 1000


def murmur2(data: bytes) -> int:
    """Kafka's murmur2, written down independently of librdkafka."""
    m, mask, length = 0x5BD1E995, 0xFFFFFFFF, len(data)
    h = (0x9747B28C ^ length) & mask
    for i in range(0, length - length % 4, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        h = (h * m & mask) ^ ((k ^ k >> 24) * m & mask)
    if tail := data[length - length % 4 :]:
        h = (h ^ int.from_bytes(tail, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15
