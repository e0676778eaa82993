"""What an operator can ask and order, through the command line, on a real Kafka and on the mock."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import msgspec
import pytest

from streamgr.cli import main
from streamgr.clock import Deadline, SystemClock
from streamgr.config import Config, Kafka
from streamgr.config import Weights as WeightsSettings
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.kafka.topics import apply, load_specs, specs_path
from streamgr.serve.model import LiveWeights
from streamgr.weights.subscriber import Subscriber, Version
from tests.serve.kit import ACTIONS, NOW, Weights
from tests.weights.kit import quiet, rejected, rejected_since
from tests.weights.scribe import Churn, Scribe
from tests.weights.test_fuzz import LIFE_MS, SMALL

CLOCK = SystemClock()
Ask = Callable[..., list[dict]]


@pytest.fixture
def config(broker: EmbeddedBroker, prefix: str) -> Config:
    kafka = Kafka(bootstrap=broker.bootstrap, topic_prefix=prefix)
    ours = {f"{prefix}.weights", f"{prefix}.manifests"}
    apply(kafka, [spec for spec in load_specs(specs_path(), prefix) if spec.name in ours])
    return Config(kafka=kafka, weights=WeightsSettings(chunk_bytes=2_000))


@pytest.fixture
def ask(config: Config, capsys: pytest.CaptureFixture[str]) -> Ask:
    """`streamgr weights …`: its JSON lines, its exit code checked."""

    def run(*argv: str, code: int = 0) -> list[dict]:
        sets = [f"kafka.bootstrap={config.kafka.bootstrap}", f"kafka.topic_prefix={config.kafka.topic_prefix}"]
        capsys.readouterr()
        assert main(["weights", *argv, *(word for s in sets for word in ("--set", s))]) == code
        printed = capsys.readouterr()
        run.error = printed.err  # type: ignore[attr-defined]
        return [json.loads(line) for line in printed.out.splitlines()]

    return run


class Kit:
    def __init__(self, config: Config, stack: ExitStack) -> None:
        producer = Producer(config.kafka, client_id="test", linger_seconds=0)
        self.scribe, self.churn = Scribe(config, producer), Churn(Weights(SMALL), LIFE_MS, NOW)
        self.subscriber = Subscriber(config, CLOCK, quiet(), lambda: Consumer(config.kafka, client_id="test"))
        self.live = LiveWeights(ACTIONS, CLOCK, quiet())
        stack.callback(producer.close)
        stack.callback(self.subscriber.close)

    def publish(self, *kinds: str) -> None:
        for kind in kinds:
            self.churn.step()
            self.scribe.write(self.churn.publish(kind))

    def until(self, version: int) -> None:
        deadline = Deadline(CLOCK, 20)
        while self.live.version != version:
            assert not deadline.passed(), f"serves {self.live.version}, not {version}"
            self.live.follow(self.subscriber, 0.2)


@pytest.fixture
def kit(config: Config) -> Iterator[Kit]:
    with ExitStack() as stack:
        yield Kit(config, stack)


def test_pin_roll_back_and_let_go(kit: Kit, ask: Ask) -> None:
    before = rejected()
    kit.scribe.claim()
    kit.publish("snapshot", "delta", "delta", "snapshot", "delta")
    kit.until(5)
    (told,) = ask("rollback")
    assert (told["pinned"], told["epoch"], told["why"]) == (4, kit.scribe.epoch, "rollback")
    kit.until(4)
    assert [(v["version"], v["pinned"]) for v in ask("list")] == [(n, n == 4) for n in range(1, 6)]
    ask("pin", "2", "--why", "clicks fell")
    kit.until(2)
    kit.publish("delta")
    assert not kit.live.follow(kit.subscriber, 0.5) and kit.live.version == 2
    assert ask("show", "2")[0]["pinned"] and not ask("show", "4")[0]["pinned"]
    assert ask("pin", "--remove")[0]["pinned"] is None
    kit.until(6)
    assert not any(v["pinned"] for v in ask("list"))
    assert rejected_since(before) == {}

    for argv in (["pin"], ["pin", "3", "--remove"]):
        ask(*argv, code=2)
    ask("pin", "99", code=65)
    assert "there are: 1 to 6" in ask.error  # type: ignore[attr-defined]


def test_the_newest_of_a_fenced_trainer_is_not_what_a_rollback_means(kit: Kit, ask: Ask) -> None:
    kit.scribe.claim()
    kit.publish("snapshot", "delta")
    old = kit.scribe.epoch
    kit.scribe.claim(2)
    kit.publish("snapshot")
    new, kit.scribe.epoch = kit.scribe.epoch, old
    kit.publish("snapshot")  # 4, by the old one: too late
    assert [v["fenced"] for v in ask("list")] == [False, False, False, True]
    assert ask("rollback")[0]["pinned"] == 2
    ask("pin", "4", code=65)
    assert "fenced off" in ask.error  # type: ignore[attr-defined]
    assert kit.scribe.epoch < new


def test_verify_computes_the_state_from_the_chain(kit: Kit, ask: Ask) -> None:
    kit.scribe.claim()
    kit.publish("snapshot", "delta", "snapshot", "delta", "delta")
    listed = ask("list")
    assert ask("verify", "5") == [
        {
            "version": 5,
            "ok": True,
            "checked": [3, 4, 5],
            "bytes": sum(v["bytes"] for v in listed[2:]),
            "reason": None,
            "detail": None,
        }
    ]
    kit.churn.step()
    version = kit.churn.publish("delta")
    fewer = {n: t[:-1] if n.startswith("table/") else t for n, t in version.payload.items()}
    kit.scribe.write(Version(version.manifest, fewer, ()))
    kit.publish("delta")
    for number, checked in (("6", [3, 4, 5]), ("7", [3, 4, 5])):
        (verdict,) = ask("verify", number, code=65)
        assert (verdict["ok"], verdict["reason"], verdict["checked"]) == (False, "digest", checked)
        assert "the state is" in verdict["detail"]


def test_verify_names_the_damage(kit: Kit, ask: Ask) -> None:
    """A manifest over chunks that are not what it says, written by somebody who can write the topic."""
    kit.scribe.claim()
    kit.publish("snapshot")
    kit.churn.step()
    version = kit.churn.publish("delta")
    sound = kit.scribe.write(version)
    chunks = [msgspec.structs.replace(sound.chunks[0], sha256="0" * 64), *sound.chunks[1:]]
    third = msgspec.structs.replace(version.manifest, version=3, parent=1)
    kit.scribe.write(Version(third, version.payload, ()), chunks=chunks)
    assert ask("verify", "2")[0]["ok"]
    (verdict,) = ask("verify", "3", code=65)
    assert (verdict["ok"], verdict["reason"], verdict["checked"]) == (False, "digest", [1])
