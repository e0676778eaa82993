"""The same story through real clients, on a real Kafka and on the mock: publish, follow, fence, look, verify."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import pytest
import torch

from streamgr.clock import Deadline, SystemClock
from streamgr.config import Config, Kafka, Weights
from streamgr.errors import DataError, TryAgain
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.kafka.topics import apply, load_specs, specs_path
from streamgr.weights import views
from streamgr.weights.publisher import Publisher
from streamgr.weights.subscriber import Subscriber, Version
from tests.weights.kit import State, World, facts, publish, quiet, rejected, rejected_since

CLOCK = SystemClock()


@pytest.fixture
def config(broker: EmbeddedBroker, prefix: str) -> Config:
    kafka = Kafka(bootstrap=broker.bootstrap, topic_prefix=prefix)
    specs = load_specs(specs_path(), prefix)
    apply(kafka, [spec for spec in specs if spec.name in (f"{prefix}.weights", f"{prefix}.manifests")])
    return Config(kafka=kafka, weights=Weights(chunk_bytes=4_000, snapshot_every=5))


@pytest.fixture
def open_(config: Config) -> Iterator[Callable[[type], object]]:
    """Opens publishers and subscribers and closes them, and their producers, at the end."""
    with ExitStack() as stack:

        def consumer() -> Consumer:
            return Consumer(config.kafka, client_id="test")

        def open_one(kind: type) -> object:
            if kind is Subscriber:
                made = Subscriber(config, CLOCK, quiet(), consumer)
            else:
                producer = Producer(config.kafka, client_id="test", linger_seconds=0)
                stack.callback(producer.close)
                made = Publisher(config, CLOCK, quiet(), producer, consumer)
            stack.callback(made.close)
            return made

        yield open_one


def _until(reader: Subscriber, version: int) -> list[Version]:
    deadline, versions = Deadline(CLOCK, 20), []
    while not versions or versions[-1].manifest.version < version:
        assert not deadline.passed(), f"{version} did not come; {[v.manifest.version for v in versions]} did"
        if (got := reader.poll(0.2)) is not None:
            versions.append(got)
    return versions


def test_the_life_of_the_weights(config: Config, open_: Callable[[type], object]) -> None:
    before = rejected()
    early, first = open_(Subscriber), open_(Publisher)
    assert isinstance(early, Subscriber) and isinstance(first, Publisher)
    assert early.poll(0.1) is None
    first.claim()
    world, state = World(1), State()
    for _ in range(7):
        number, truth = publish(first, world)
        for version in _until(early, number):
            state.apply(version)
        assert state == truth

    late = open_(Subscriber)
    assert isinstance(late, Subscriber)
    fresh = State()
    got = _until(late, 7)
    for version in got:
        fresh.apply(version)
    assert fresh == state
    assert [v.manifest.version for v in got] == [6, 7], "a late reader starts at the newest snapshot"

    second = open_(Publisher)
    assert isinstance(second, Publisher)
    assert second.claim().last_version == 7
    with pytest.raises(TryAgain, match="another trainer has claimed"):
        publish(first, World(2))
    number, truth = publish(second, world)
    (version,) = _until(early, number)
    state.apply(version)
    assert (number, version.manifest.kind) == (8, "snapshot") and state == truth
    assert rejected_since(before) == {}

    listed = views.list_versions(config, CLOCK)
    assert [(v["version"], v["kind"], v["parent"], v["fenced"]) for v in listed] == [
        (1, "snapshot", None, False),
        *[(n, "delta", n - 1, False) for n in range(2, 6)],
        (6, "snapshot", None, False),
        (7, "delta", 6, False),
        (8, "snapshot", None, False),
    ]
    shown = views.show(config, CLOCK, 7)
    assert shown["positions"] == {"t.examples": {"0": 7, "3": 7}} and shown["learned"] == 7
    assert shown["tensors"]["dense/w"]["shape"] == [3, 2] and shown["digest"] == listed[6]["digest"]
    answer = views.verify(config, CLOCK, 7)
    assert answer == {
        "version": 7,
        "ok": True,
        "checked": [6, 7],
        "bytes": listed[5]["bytes"] + listed[6]["bytes"],
        "reason": None,
        "detail": None,
    }
    for question in (views.show, views.verify):
        with pytest.raises(DataError, match="no weights version 99; there are: 1 to 8"):
            question(config, CLOCK, 99)


def test_verify_names_the_damage(config: Config, open_: Callable[[type], object]) -> None:
    """A manifest over chunks that are not what it says, written by somebody who can write the topic."""
    made = open_(Publisher)
    assert isinstance(made, Publisher)
    made.claim()
    world = World(3)
    publish(made, world)
    send = made._producer.send_all

    def damaging(topic: str, records: Iterable[tuple[bytes, bytes]], *, partition: int) -> list[int]:
        return send(topic, [(key, bytes([value[0] ^ 1]) + value[1:]) for key, value in records], partition=partition)

    made._producer.send_all = damaging  # type: ignore[method-assign]
    publish(made, world)
    made._producer.send_all = send  # type: ignore[method-assign]
    publish(made, world)
    assert views.verify(config, CLOCK, 1)["ok"]
    answer = views.verify(config, CLOCK, 3)
    assert (answer["ok"], answer["reason"], answer["checked"]) == (False, "digest", [1])

    reader, before = open_(Subscriber), rejected()
    assert isinstance(reader, Subscriber)
    assert [v.manifest.version for v in _until(reader, 1)] == [1]
    assert reader.poll(0.5) is None
    assert rejected_since(before) == {"digest": 1, "gap": 1}


def test_the_mocks_short_log_is_a_gap_that_a_snapshot_heals(_mock: EmbeddedBroker, prefix: str) -> None:
    """About 5 MB a partition, then the oldest records go: a reader that stood still finds its place gone."""
    config = Config(kafka=Kafka(bootstrap=_mock.bootstrap, topic_prefix=prefix), weights=Weights(chunk_bytes=400_000))
    with ExitStack() as stack:

        def consumer() -> Consumer:
            return Consumer(config.kafka, client_id="test")

        producer = Producer(config.kafka, client_id="test", linger_seconds=0)
        made, reader = (
            Publisher(config, CLOCK, quiet(), producer, consumer),
            Subscriber(config, CLOCK, quiet(), consumer),
        )
        for part in (producer, made, reader):
            stack.callback(part.close)
        made.claim()
        publish(made, World(1))
        assert _until(reader, 1)
        generator = torch.Generator().manual_seed(1)
        noise = {"dense/w": torch.randn(300_000, generator=generator)}  # 1.2 MB, and lz4 makes nothing of it
        made.publish("snapshot", noise, facts())
        for _ in range(7):
            made._delta_bytes = 0
            noise = {"dense/w": torch.randn(300_000, generator=generator)}
            made.publish("delta", noise, facts())
        low, _ = made._manifests._consumer.bounds(config.topic("weights"), 0)
        assert low > 3, "the mock kept everything: this test tests nothing"
        before = rejected()
        assert reader.poll(1.0) is None
        assert rejected_since(before)["truncated"] >= 1
        made.publish("snapshot", noise, facts())
        (healed,) = _until(reader, 10)
        assert torch.equal(healed.payload["dense/w"], noise["dense/w"])
        assert [m.version for m in healed.covers] == list(range(2, 11))
