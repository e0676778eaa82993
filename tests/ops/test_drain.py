"""Told to leave, each role leaves within its budget and with 0, whatever it does and whether its broker is there."""

import json
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from streamgr.kafka import topics
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.serve import model
from tests.serve.test_scorer import ITEMS, Trainer, configured, running
from tests.system import System, free_port, wait_for

T = 1_700_000_000_000
BUDGETS = {"sequencer": 30.0, "trainer": 30.0, "scorer": 15.0}  # below the grace that containers are given
SETTINGS: dict[str, Any] = {
    "sequence__attribution_window_seconds": 2.0, "sequence__lateness_seconds": 0.5, "trainer__publish_seconds": 0.5,
}  # fmt: skip


def rows(count: int) -> str:
    return "".join(
        json.dumps({"type": kind, "user_id": f"u{n % 50}", "item_id": f"i{n % 7}", "event_time": T + 500 * n}) + "\n"
        for n in range(count)
        for kind in ("impression", "click")
    )


def left(role: "subprocess.Popen[bytes]", budget: float) -> tuple[int, bool]:
    """(exit code, whether in time)"""
    started = time.monotonic()
    role.send_signal(signal.SIGTERM)
    return role.wait(2 * budget), time.monotonic() - started < budget


@pytest.mark.parametrize("frozen", [False, True], ids=["gone", "hanging"])
def test_with_the_broker_away_in_the_middle_of_work(kafka_home: Path, tmp_path: Path, frozen: bool) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(rows(300))
    broker = EmbeddedBroker.start_kafka(tmp_path / "kafka", kafka_home)
    pid = int(subprocess.check_output(["pgrep", "-f", str(tmp_path / "kafka" / "server.properties")]).split()[0])
    try:
        with System(broker.bootstrap, "t", tmp_path, **SETTINGS) as system:
            system.run("topics", "apply")
            system.run("produce", str(log), "--close")
            roles = {role: system.start(role) for role in BUDGETS}
            wait_for("answers", lambda: system.get("/readyz")[0] == 200)
            system.publish(
                [(b"u1", row.encode(), None) for row in rows(400).splitlines()[-200:]]
            )  # there is work at hand
            subprocess.run(["kill", "-STOP" if frozen else "-KILL", str(pid)], check=True)
            threading.Event().wait(3.0)
            assert all(role.poll() is None for role in roles.values()), system.logs()
            assert {name: left(role, BUDGETS[name]) for name, role in roles.items()} == dict.fromkeys(
                BUDGETS, (0, True)
            ), system.logs()
    finally:
        subprocess.run(["kill", "-KILL", str(pid)], check=False, capture_output=True)
        broker.close()


@pytest.mark.parametrize("role", BUDGETS)
def test_before_the_broker_was_ever_there(tmp_path: Path, role: str) -> None:
    with System(f"127.0.0.1:{free_port()}", "t", tmp_path) as system:
        child = system.start(role)
        wait_for("its first words", lambda: "kafka_error" in system.logs() or "broker is away" in system.logs(), 90)
        assert left(child, BUDGETS[role]) == (0, True), system.logs()


@pytest.mark.parametrize("role", ["sequencer", "scorer"])
def test_while_it_reads_a_long_log_again(kafka: str, prefix: str, tmp_path: Path, role: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(rows(40_000))
    with System(kafka, prefix, tmp_path, **SETTINGS) as system:
        system.run("topics", "apply")
        system.run("produce", str(log))
        child = system.start(role)
        word = "partitions_assigned" if role == "sequencer" else "following"
        wait_for("it to begin", lambda: word in system.logs(), 90)
        assert left(child, BUDGETS[role]) == (0, True), system.logs()
        if role == "sequencer":
            system.run("sequencer", "--until-end")
            assert sum(len(row["events"]) for row in system.exported()) == 80_000


def test_while_a_version_is_being_taken_in(
    _mock: EmbeddedBroker, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(_mock.bootstrap, prefix, tmp_path)
    topics.ensure(config.kafka)
    begun, plain = threading.Event(), model.LiveWeights.install

    def slow(self: Any, *given: Any, **named: Any) -> Any:
        begun.set()
        threading.Event().wait(2.0)
        return plain(self, *given, **named)

    monkeypatch.setattr(model.LiveWeights, "install", slow)
    trainer = Trainer(config)
    trainer.weights.learn(ITEMS)
    with running(config) as role:
        trainer.publish()
        assert begun.wait(20)
        started = time.monotonic()
        role.close()
        assert time.monotonic() - started < BUDGETS["scorer"]
    trainer.close()
