"""What a producer does when the broker is away, comes back, or refuses."""

import threading
from pathlib import Path

import pytest

from streamgr.config import Kafka
from streamgr.errors import ConfigError, TryAgain
from streamgr.events import Record
from streamgr.kafka import topics
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.service import Stop


def test_an_outage_leaves_no_hole_and_no_double(kafka_home: Path, tmp_path: Path) -> None:
    """The broker stops under load and comes back on its old port and data; client objects live through it."""
    broker = EmbeddedBroker.start_kafka(tmp_path, kafka_home)
    settings = Kafka(bootstrap=broker.bootstrap)
    topics.apply(settings, topics.load_specs(topics.specs_path(), "t"))
    producer, consumer = Producer(settings, client_id="p"), Consumer(settings, client_id="c")
    consumer.assign({("t.events", 0): 0})
    for n in range(2000):
        producer.send("t.events", b"%d" % n, partition=0)
        if n == 1000:
            producer.confirm()
            broker.close()
    with pytest.raises(TryAgain, match=r"[0-9]+ records are not acknowledged"):
        producer.confirm(timeout=0.5)
    with EmbeddedBroker.start_kafka(tmp_path, kafka_home) as again:
        assert again.bootstrap == broker.bootstrap
        producer.confirm()
        assert consumer.bounds("t.events", 0) == (0, 2000)
        records: list[Record] = []
        while len(records) < 2000:
            records += consumer.poll()
        assert [r.value for r in records] == [b"%d" % n for n in range(2000)]
        consumer.close()
        producer.close()


def test_a_role_told_to_stop_gives_up_on_a_broker_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgr.kafka.producer.DRAIN_SECONDS", 0.3)
    stop = Stop()
    stop.set()
    producer = Producer(Kafka(bootstrap="127.0.0.1:1"), client_id="p", stop=stop)
    producer.send("t", b"")
    with pytest.raises(TryAgain, match="1 records are not acknowledged"):
        producer.confirm()
    producer.close()


def test_a_full_queue_holds_the_sender_up_and_then_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgr.kafka.producer.DRAIN_SECONDS", 0.5)
    settings = Kafka(bootstrap="127.0.0.1:1", librdkafka={"queue.buffering.max.messages": 10})
    producer = Producer(settings, client_id="p", queue_seconds=0.5)
    with pytest.raises(TryAgain, match="is full and does not move"):
        for _ in range(11):
            producer.send("t", b"")
    producer.close()
    stop, waits = Stop(), []

    def waiting() -> None:  # a role waits without end, and lives, until it is told to stop
        waits.append(1)
        if len(waits) == 3:
            stop.set()

    producer = Producer(settings, client_id="p", stop=stop, waiting=waiting)
    with pytest.raises(TryAgain, match="is full and does not move"):
        for _ in range(11):
            producer.send("t", b"")
    assert len(waits) >= 4
    producer.close()


def test_a_refused_record_breaks_the_producer_for_good(kafka: str, prefix: str) -> None:
    settings = Kafka(bootstrap=kafka, librdkafka={"topic.metadata.propagation.max.ms": 200})
    producer = Producer(settings, client_id="p")
    producer.send(f"{prefix}.nothing", b"")
    with pytest.raises(ConfigError, match=rf"{prefix}\.nothing.*streamgr topics apply"):
        producer.confirm(timeout=20)
    for attempt in (lambda: producer.send(f"{prefix}.nothing", b""), producer.confirm):
        with pytest.raises(ConfigError):
            attempt()
    producer.close()


def test_many_records_are_sent_at_once_and_waited_for_once(broker: EmbeddedBroker, prefix: str) -> None:
    settings = Kafka(bootstrap=broker.bootstrap)
    topics.apply(settings, topics.load_specs(topics.specs_path(), prefix))
    producer, consumer = Producer(settings, client_id="p"), Consumer(settings, client_id="c")
    before = producer.send_confirmed(f"{prefix}.weights", b"", partition=0)
    waits, confirm = [], producer.confirm
    producer.confirm = lambda timeout=None: (waits.append(len(producer._producer)), confirm(timeout))[1]  # type: ignore[method-assign]
    records = [(b"%d" % n, bytes([n]) * (100_000 + n)) for n in range(20)]
    assert producer.send_all(f"{prefix}.weights", records, partition=0) == [before + 1 + n for n in range(20)]
    assert producer.send_all(f"{prefix}.weights", [], partition=0) == []
    assert len(waits) == 2 and waits[0] > 1, "each was waited for before the next was sent"
    consumer.assign({(f"{prefix}.weights", 0): before + 1})
    got: list[Record] = []
    while len(got) < 20:
        got += consumer.poll()
    assert [(r.key, r.value) for r in got] == records
    consumer.close()
    producer.close()


def test_what_is_closed_while_it_waits_names_what_was_given_up() -> None:
    producer = Producer(Kafka(bootstrap="127.0.0.1:1"), client_id="p")
    threading.Timer(0.3, producer.close).start()
    with pytest.raises(TryAgain, match="2 of 2 records were given up"):
        producer.send_all("t", [(b"", b"a"), (b"", b"b")], partition=0)


def test_closing_forgets_only_what_was_never_confirmed() -> None:
    producer = Producer(Kafka(bootstrap="127.0.0.1:1"), client_id="p")
    producer.send("t", b"")
    producer.close()
    producer.confirm(timeout=1)
