"""The whole role against a broker: start before anything is there, follow, swap, answer, drain, start again."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamgr.clock import SystemClock
from streamgr.config import Config, Kafka, Scorer, State, Telemetry
from streamgr.errors import ConfigError
from streamgr.kafka import topics
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.serve import scorer
from streamgr.service import Stop
from streamgr.telemetry import Health, Log
from streamgr.weights import views
from tests.serve.kit import Weights, settings
from tests.weights.scribe import Scribe

ITEMS = [f"i{n}" for n in range(20)]
CLOCK = SystemClock()


def configured(bootstrap: str, prefix: str, directory: Path, **keys: Any) -> Config:
    return msgspec.structs.replace(
        settings(),
        kafka=Kafka(bootstrap=bootstrap, topic_prefix=prefix),
        state=State(directory=str(directory), cache_bytes=1 << 20, write_buffer_bytes=1 << 20),
        scorer=Scorer(port=0, **keys),
        telemetry=Telemetry(log_level="warning"),
    )


class Trainer:
    """Publishes what it has."""

    def __init__(self, config: Config) -> None:
        self.weights = Weights(config)
        self._producer = Producer(config.kafka, client_id="trainer")
        self._scribe = Scribe(config, self._producer)
        self._scribe.claim()

    def publish(self, items: list[str] | None = None) -> int:
        rows = None if items is None else self.weights.learn(items)
        return self._scribe.write(self.weights.publish(rows, horizon_ms=CLOCK.now_ms() - 3000)).version

    def close(self) -> None:
        self._producer.close()


class Running:
    def __init__(self, config: Config) -> None:
        self.stop, self.failure = Stop(), None
        self.health = Health("scorer", CLOCK)
        self.role = scorer.Scorer(config, CLOCK, Log("scorer", config.telemetry, CLOCK), self.health, self.stop)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.until("it listens", lambda: self.role.port)

    def _run(self) -> None:
        try:
            self.role.run()
        except BaseException as error:
            self.failure = error

    def until(self, what: str, condition: Callable[[], Any], seconds: float = 30.0) -> Any:
        pause, end = threading.Event(), CLOCK.monotonic() + seconds
        while not (found := condition()):
            assert CLOCK.monotonic() < end, f"waited {seconds} s until {what}; ready: {self.health.ready()}"
            assert self._thread.is_alive(), self.failure
            pause.wait(0.05)
        return found

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.role.port}{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def close(self) -> None:
        self.stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def running(config: Config) -> Iterator[Running]:
    role = Running(config)
    try:
        yield role
    finally:
        role.close()
    assert role.failure is None


def publish_events(config: Config, events: list[dict[str, Any]]) -> None:
    producer = Producer(config.kafka, client_id="feed")
    for event in events:
        producer.send(config.topic("events"), json.dumps(event).encode(), key=event["user_id"].encode())
    producer.confirm(20)
    producer.close()


def shown(user: str, n: int, first: int = 0) -> list[dict[str, Any]]:
    now = CLOCK.now_ms() - 60_000
    return [
        {"type": "impression" if i % 2 else "click", "event_id": f"e{i}", "user_id": user, "item_id": ITEMS[i % 20],
         "event_time": now + i}
        for i in range(first, first + n)
    ]  # fmt: skip


def test_a_scorers_life(broker: EmbeddedBroker, prefix: str, tmp_path: Path) -> None:
    config = configured(broker.bootstrap, prefix, tmp_path)
    topics.apply(config.kafka, topics.load_specs(topics.specs_path(), prefix))
    ask = {"user_id": "u1", "candidates": ITEMS[:4], "at": CLOCK.now_ms() + 3_600_000}  # later: another answer
    with running(config) as role:
        role.until("it follows", lambda: role.ask("/readyz")[1]["sequences"] == "ok")
        assert role.ask("/v1/rank", ask) == (503, {"error": "no_weights"})
        status, conditions = role.ask("/readyz")
        assert (status, conditions["weights"]) == (503, "no version yet")

        trainer = Trainer(config)
        trainer.weights.learn(ITEMS)
        first = trainer.publish()
        role.until("it is ready", lambda: role.ask("/readyz")[0] == 200)
        cold = role.ask("/v1/rank", ask)[1]
        assert (cold["weights_version"], cold["cold"], cold["sequence_length"]) == (first, True, 0)
        assert 3.0 <= cold["model_age_seconds"] < 30.0

        publish_events(config, shown("u1", 7))  # an event changes the next answer, long before it changes the weights
        role.until("it has followed", lambda: role.ask("/v1/rank", ask)[1]["sequence_length"] == 7)
        warm = role.ask("/v1/rank", ask)[1]
        assert warm["cold"] is False and warm["weights_version"] == first
        assert {i["item_id"]: i["score"] for i in warm["items"]} != {i["item_id"]: i["score"] for i in cold["items"]}
        assert len(role.ask("/v1/users/u1/sequence")[1]["events"]) == 7
        assert {i["item_id"] for i in role.ask("/v1/retrieve", {"user_id": "u1", "k": 99})[1]["items"]} == set()
        named = role.ask("/v1/retrieve", {"user_id": "u2", "k": 99})[1]["items"]
        assert {i["item_id"] for i in named} == set(ITEMS[:7])  # the others' names have not been heard yet

        delta = trainer.publish(ITEMS[:10])
        role.until("it has swapped", lambda: role.ask("/v1/rank", ask)[1]["weights_version"] == delta)
        assert role.ask("/v1/rank", ask)[1]["items"] != warm["items"]
        assert role.ask("/livez")[0] == 200

        views.rollback(config, CLOCK)
        role.until("it has gone back", lambda: role.ask("/v1/rank", ask)[1]["weights_version"] == first)
        back = {i["item_id"]: i["score"] for i in role.ask("/v1/rank", ask)[1]["items"]}
        assert back == pytest.approx({i["item_id"]: i["score"] for i in warm["items"]}, abs=1e-6)
        views.unpin(config)
        role.until("it is let go", lambda: role.ask("/v1/rank", ask)[1]["weights_version"] == delta)

    with running(config) as again:  # its sequences are where they were, the newest weights are found
        again.until("it is ready", lambda: again.ask("/readyz")[0] == 200)
        again.until("it has caught up", lambda: again.ask("/v1/rank", ask)[1]["weights_version"] == delta)
        assert again.ask("/v1/rank", ask)[1]["sequence_length"] == 7
    trainer.close()


def test_a_pin_that_cannot_be_met_is_a_scorers_reason_not_to_be_ready(
    broker: EmbeddedBroker, prefix: str, tmp_path: Path
) -> None:
    config = configured(broker.bootstrap, prefix, tmp_path)
    topics.apply(config.kafka, topics.load_specs(topics.specs_path(), prefix))
    trainer = Trainer(config)
    trainer.weights.learn(ITEMS)
    trainer.publish()
    pinned = msgspec.structs.replace(trainer.weights.publish().manifest, version=41)
    trainer._scribe.pin(pinned)
    with running(config) as role:
        why = "pinned at version 41, which cannot be had"
        role.until("it says why not", lambda: role.ask("/readyz")[1]["weights"] == why)
        views.unpin(config)
        role.until("it is ready", lambda: role.ask("/readyz")[0] == 200)
    trainer.close()


def test_a_stop_lets_the_request_at_work_finish(
    broker: EmbeddedBroker, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(broker.bootstrap, prefix, tmp_path)
    topics.apply(config.kafka, topics.load_specs(topics.specs_path(), prefix))
    begun, go_on = threading.Event(), threading.Event()
    plain = scorer.Ranker.rank

    def slow(self: Any, ask: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return plain(self, ask)

    trainer = Trainer(config)
    trainer.weights.learn(ITEMS)
    trainer.publish()
    trainer.close()
    answers: list[Any] = []
    with running(config) as role:
        role.until("it is ready", lambda: role.ask("/readyz")[0] == 200)
        monkeypatch.setattr(scorer.Ranker, "rank", slow)
        asking = threading.Thread(
            target=lambda: answers.append(role.ask("/v1/rank", {"user_id": "u", "candidates": ["i1"]}))
        )
        asking.start()
        assert begun.wait(10)
        role.stop.set()
        role.until("it is not ready any more", lambda: not role.health.ready()[0])
        assert role.health.ready()[1]["accepting"] == "draining"
        go_on.set()
        asking.join(10)
    assert answers[0][0] == 200


def test_a_missing_topic_ends_the_role_with_the_remedy(kafka: str, prefix: str, tmp_path: Path) -> None:
    config = configured(kafka, prefix, tmp_path)
    stop, health = Stop(), Health("scorer", CLOCK)
    role = scorer.Scorer(config, CLOCK, Log("scorer", config.telemetry, CLOCK), health, stop)
    with pytest.raises(ConfigError, match="topics apply"):
        role.run()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    config = configured("127.0.0.1:1", "t", tmp_path)
    listening = scorer._listen(config)
    assert listening.proto == socket.IPPROTO_TCP  # else asyncio sets no TCP_NODELAY: 40 ms more for every answer
    taken = msgspec.structs.replace(config, scorer=Scorer(port=listening.getsockname()[1]))
    with pytest.raises(ConfigError, match=r"scorer\.port"):
        scorer._listen(taken)
    listening.close()


def test_a_sample_of_the_answers_reaches_the_scores(broker: EmbeddedBroker, prefix: str, tmp_path: Path) -> None:
    config = configured(broker.bootstrap, prefix, tmp_path, score_sample=0.5)
    topics.apply(config.kafka, topics.load_specs(topics.specs_path(), prefix))
    trainer = Trainer(config)
    trainer.weights.learn(ITEMS)
    trainer.publish()
    trainer.close()
    with running(config) as role:
        role.until("it is ready", lambda: role.ask("/readyz")[0] == 200)
        for n in range(10):
            assert role.ask("/v1/rank", {"user_id": f"u{n}", "candidates": ["i1", "i2"]})[0] == 200
    consumer = Consumer(config.kafka, client_id="test")
    topic = config.topic("scores")
    ends = {p: consumer.bounds(topic, p)[1] for p in consumer.partitions(topic)}
    assert sum(ends.values()) == 5
    consumer.assign({(topic, p): 0 for p in ends})
    records = []
    while len(records) < 5:
        records += consumer.poll(timeout=1.0)
    consumer.close()
    samples = [json.loads(record.value or b"") for record in records]
    assert {sample["user_id"] for sample in samples} == {"u1", "u3", "u5", "u7", "u9"}
    assert all(sample["kind"] == "rank" and len(sample["answer"]["items"]) == 2 for sample in samples)


def test_without_a_broker_it_lives_says_why_and_leaves_when_told(tmp_path: Path) -> None:
    config = configured("127.0.0.1:1", "t", tmp_path)
    with running(config) as role:
        assert role.ask("/livez")[0] == 200
        status, conditions = role.ask("/readyz")
        assert status == 503 and conditions["sequences"] == "waiting for the broker"
        assert role.ask("/v1/rank", {"user_id": "u", "candidates": ["a"]}) == (503, {"error": "no_weights"})
        assert role.ask("/v1/users/u/sequence") == (503, {"error": "not_ready"})
