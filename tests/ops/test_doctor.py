"""Each thing that an operator can get wrong is found, with its remedy and exit code; what is right is left alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition

from streamgr import doctor
from streamgr.cli import main
from streamgr.clock import SystemClock
from streamgr.config import Config, Kafka, State, Telemetry, load
from streamgr.doctor import broker as there
from streamgr.doctor import machine, model, roles, stores
from streamgr.doctor.case import Case
from streamgr.doctor.upgrade import STEPS, steps
from streamgr.errors import ConfigError, UsageError
from streamgr.kafka import topics
from streamgr.kafka.client import Admin
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.model import attention_blocks
from streamgr.sanity import Finding, findings
from streamgr.state import store as state_store
from streamgr.telemetry import Health, Probes
from tests.kafka.test_sasl import ROOT
from tests.sequence.test_maintenance import LOG, filled
from tests.sequence.test_partition import MEMORY, records
from tests.serve.kit import Weights
from tests.serve.test_scorer import configured
from tests.system import System, free_port, wait_for
from tests.weights.scribe import Scribe

CLOCK = SystemClock()
SASL = '{"security.protocol"="SASL_%s","sasl.mechanism"="PLAIN"}'


class Ahead(SystemClock):
    """A machine whose clock is wrong."""

    def __init__(self, seconds: float) -> None:
        self._ahead_ms = int(seconds * 1000)

    def now_ms(self) -> int:
        return super().now_ms() + self._ahead_ms


def case(config: Config, *urls: str, clock: Any = CLOCK, environ: dict[str, str] | None = None, **origin: str) -> Case:
    return Case(config, origin, environ or {}, clock, urls)


def only(level: str, found: Any) -> Finding:
    """The one finding of this level."""
    (finding,) = [f for f in found if f.level == level]
    assert isinstance(finding, Finding)
    assert level == "ok" or finding.remedy
    return finding


def levels(found: Any) -> set[str]:
    return {finding.level for finding in found}


@pytest.fixture
def nowhere(tmp_path: Path) -> Config:
    """An installation whose broker does not answer."""
    return Config(kafka=Kafka(bootstrap=f"127.0.0.1:{free_port()}"), state=State(directory=str(tmp_path / "state")))


# --- as a whole ---


def test_a_sound_installation_at_work_has_no_failure(kafka: str, prefix: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [
        {"type": kind, "user_id": f"u{n}", "item_id": f"i{n % 3}", "event_time": 1_700_000_000_000 + 1000 * n}
        for n in range(40) for kind in ("impression", "click")
    ]  # fmt: skip
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with System(
        kafka, prefix, tmp_path, state__snapshots_directory=str(tmp_path / "snapshots"), state__snapshot_seconds=1.0,
        sequence__attribution_window_seconds=2.0, sequence__lateness_seconds=0.5, trainer__publish_seconds=0.5,
    ) as system:  # fmt: skip
        told = system.run("doctor", code=78)
        assert f"fail  topics: missing: {prefix}.dead-letters" in told and "->  streamgr topics apply" in told
        system.run("topics", "apply")
        system.run("produce", str(log), "--close")
        ports = {role: free_port() for role in ("sequencer", "trainer", "scorer")}
        for role, port in ports.items():
            system.start(role, "--set", f"telemetry.port={port}")
        wait_for("answers", lambda: system.get("/readyz")[0] == 200)
        wait_for("snapshots", lambda: system.logs().count("snapshot_published") >= 4)
        urls = [f"http://127.0.0.1:{port}" for port in ports.values()]
        told = system.run("doctor", "--json", *(word for url in urls for word in ("--url", url)))
    rows = [json.loads(line) for line in told.splitlines()]
    assert not [row for row in rows if row["level"] == "fail"]
    checks = {name for name, _ in (*doctor.HERE, *doctor.BROKER, *doctor.THERE, *doctor.ROLES)}
    assert {row["check"] for row in rows} == checks
    assert all(row["remedy"] for row in rows if row["level"] != "ok")
    said = "\n".join(row["what"] for row in rows)
    for words in ("held by process", "whole", "Kafka 4 or later", "the sequencer is 0 records", "is live and ready"):
        assert words in said
    assert not (tmp_path / "state" / "doctor").exists()


def test_without_a_broker_the_rest_is_still_looked_at(nowhere: Config, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(doctor.examine(case(nowhere)))
    failure = only("fail", found)
    assert (failure.check, failure.exit_code, doctor.exit_code(found)) == ("broker", 69, 69)
    assert any("not looked at therefore: topics" in f.what for f in found)
    assert "ok    broker" not in "\n".join(map(str, found))


def test_a_stream_side_installation_skips_what_needs_torch(kafka: str, prefix: str, tmp_path: Path) -> None:
    topics.ensure(Kafka(bootstrap=kafka, topic_prefix=prefix))
    (tmp_path / "state" / "trainer" / "checkpoints").mkdir(parents=True)
    code = "import sys; sys.modules['torch'] = None; from streamgr.cli import main; sys.exit(main(['doctor']))"
    environment = {
        **os.environ, "STREAMGR_KAFKA__BOOTSTRAP": kafka, "STREAMGR_KAFKA__TOPIC_PREFIX": prefix,
        "STREAMGR_STATE__DIRECTORY": str(tmp_path / "state"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = [line.split(":")[0] for line in done.stdout.splitlines() if "skipped: no torch here" in line]
    assert skipped == ["ok    checkpoints", "ok    torch", "ok    attention", "ok    weights"]


def test_the_exit_code_is_that_of_the_first_failure() -> None:
    def finding(level: str, code: int) -> Finding:
        return Finding(level, "x", "y", "z", code)

    assert doctor.exit_code([finding("ok", 0), finding("warn", 0)]) == 0
    assert doctor.exit_code([finding("warn", 0), finding("fail", 73), finding("fail", 78)]) == 73


# --- the configuration ---


@pytest.mark.parametrize(
    ("level", "words", "keys"),
    [
        ("warn", "position_buckets", {"sequence.history_length": "600"}),
        ("warn", "batch_tokens", {"trainer.batch_tokens": "100"}),
        ("fail", "ttl_seconds", {"table.ttl_seconds": "600"}),
        ("fail", "max_slots", {"table.max_slots": "1000"}),
        ("warn", "accept_loss", {"trainer.accept_loss": "true"}),
        ("fail", "quarter of weights.retention_bytes", {"table.slots": "4194304"}),
        ("warn", "publish_seconds", {"trainer.publish_seconds": "45"}),
        ("warn", "checkpoint_seconds", {"trainer.checkpoint_seconds": "1"}),
        ("warn", "compared_targets", {"weights.compared_targets": "6000"}),
        ("warn", "lost together", {"state.snapshots_directory": "state/snapshots"}),
        ("fail", "both 9464", {"scorer.port": "9464"}),
        ("warn", "wants no token", {"scorer.host": "0.0.0.0"}),
        ("warn", "in clear", {"scorer.host": "0.0.0.0", "scorer.token": "0123456789abcdef"}),
        ("fail", "never sent", {"kafka.sasl_password": "x"}),
        ("fail", "wants sasl.username", {"kafka.librdkafka": SASL % "SSL"}),
        (
            "warn", "without TLS",
            {"kafka.librdkafka": (SASL % "PLAINTEXT")[:-1] + ',"sasl.username"="u"}', "kafka.sasl_password": "x"},
        ),
        (
            "warn", "anybody can be the broker",
            {"kafka.librdkafka": '{"security.protocol"="SSL","enable.ssl.certificate.verification"=false}'},
        ),
    ],
)  # fmt: skip
def test_values_against_each_other(
    level: str, words: str, keys: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = load([], {}, keys)
    finding = only(level, findings(config))
    assert words in finding.what and finding.remedy
    argv = ["config", "check", *(word for key, value in keys.items() for word in ("--set", f"{key}={value}"))]
    assert main(argv) == (78 if level == "fail" else 0)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("profile", sorted((ROOT / "config").glob("*.toml")), ids=lambda p: p.name)
def test_what_we_ship_is_sane(profile: Path) -> None:
    assert not [f for f in findings(load([profile], {})[0]) if f.level == "fail"]


def test_secrets_in_clear_or_for_everybody_are_named(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2")
    variable = "STREAMGR_KAFKA__SASL_PASSWORD_FILE"
    environ = {variable: str(secret)}
    config, origin = load([], environ)
    secret.chmod(0o644)
    assert "everybody" in only("warn", machine.secrets(Case(config, origin, environ, CLOCK))).what
    secret.chmod(0o400)
    assert levels(machine.secrets(Case(config, origin, environ, CLOCK))) == {"ok"}
    config, origin = load([], {}, {"kafka.sasl_password": "hunter2", "kafka.librdkafka": '{"ssl.key.password" = "x"}'})
    found = list(machine.secrets(Case(config, origin, {}, CLOCK)))
    assert [variable in f.remedy for f in found] == [True, True] and "hunter2" not in str(found)
    missing = Kafka(librdkafka={"security.protocol": "SSL", "ssl.ca.location": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=r"none cannot be used"):
        list(machine.secrets(case(Config(kafka=missing))))


# --- the machine ---


def test_a_directory_that_cannot_be_written_is_73(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = only("fail", machine.directories(case(Config(state=State(directory=str(tmp_path / "file" / "state"))))))
    assert found.exit_code == 73


def test_little_room_is_a_warning_and_none_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    config = Config(state=State(directory=str(tmp_path)))
    for free, level, code in ((1 << 40, "ok", 0), (1 << 30, "warn", 0), (1 << 20, "fail", 73)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(1 << 41, 0, free))
        (found,) = machine.disk(case(config))
        assert (found.level, found.exit_code) == (level, code)


def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch, nowhere: Config) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1024, 4096))
    assert "ulimit" in only("warn", machine.open_files(case(nowhere))).remedy


def test_stores_are_opened_and_their_holder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(state=State(directory=str(tmp_path)))
    path = filled(tmp_path, 0, records(LOG, append_ms=1_700_000_100_000))
    assert "held by nobody" in only("ok", stores.stores(case(config))).what
    held = state_store.Store(path, MEMORY)
    assert f"held by process {os.getpid()}" in only("ok", stores.stores(case(config))).what
    held.close()
    with monkeypatch.context() as patch:
        patch.setattr(state_store, "SCHEMA", 99)
        found = only("fail", stores.stores(case(config)))
    assert found.exit_code == 65 and "this version reads 99" in found.what
    table = max(path.glob("*.log"), key=lambda file: file.stat().st_size)
    (path / "CURRENT").write_text("MANIFEST-999999\n")
    assert table.exists() and only("fail", stores.stores(case(config))).exit_code in (65, 75)
    (path / "DAMAGED").touch()
    assert "sets it aside" in only("warn", stores.stores(case(config))).remedy


def test_a_damaged_checkpoint_is_a_warning_and_none_at_all_a_failure(tmp_path: Path) -> None:
    home = tmp_path / "trainer" / "checkpoints"
    config = Config(state=State(directory=str(tmp_path)))
    assert "no trainer has run" in only("ok", stores.checkpoints(case(config))).what
    (home / f"{7:012d}").mkdir(parents=True)
    (home / f"{7:012d}" / "checkpoint.json").write_text("{")
    found = list(stores.checkpoints(case(config)))
    assert levels(found) == {"warn", "fail"} and doctor.exit_code(found) == 65
    (home / f"{7:012d}" / "checkpoint.json").write_text('{"format": 9, "code": "9.9"}')
    failure = only("fail", doctor._each([("checkpoints", stores.checkpoints)], case(config)))
    assert failure.exit_code == 65 and "start the version that wrote it: 9.9" in failure.remedy


# --- the model ---


def test_the_fast_path_is_held_against_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(model.attention(case(Config()))) == {"ok"}
    right = attention_blocks.attend
    monkeypatch.setattr(attention_blocks, "attend", lambda *given: right(*given) * 1.001)
    assert only("fail", model.attention(case(Config()))).exit_code == 1


def test_a_device_that_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = load([], {}, {"trainer.device": "cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert only("fail", model.torch_and_device(case(config))).exit_code == 78


@pytest.fixture
def published(_mock: EmbeddedBroker, prefix: str, tmp_path: Path) -> Iterator[tuple[Config, Weights, Scribe]]:
    """A trainer that has published one version."""
    config = configured(_mock.bootstrap, prefix, tmp_path)
    topics.ensure(config.kafka)
    weights, producer = Weights(config), Producer(config.kafka, client_id="trainer")
    scribe = Scribe(config, producer)
    scribe.claim()
    weights.learn(["a", "b", "c"])
    scribe.write(weights.publish())
    yield config, weights, scribe
    producer.close()


def test_a_chain_that_is_not_whole_is_65(published: tuple[Config, Weights, Scribe]) -> None:
    config, weights, scribe = published
    assert "whole" in only("ok", model.weights(case(config))).what
    scribe.pin(scribe.write(weights.publish(weights.learn(["d"]))))
    assert "are held at version 2" in only("warn", model.weights(case(config))).what
    scribe.write(weights.publish(weights.learn(["e"])), state_digest="not this")
    found = only("fail", model.weights(case(config)))
    assert found.exit_code == 65 and "digest" in found.what


def test_who_may_publish(published: tuple[Config, Weights, Scribe]) -> None:
    config, weights, scribe = published
    assert f"epoch {scribe.epoch} holds the claim" in only("ok", model.claims(case(config))).what
    old = scribe.epoch
    scribe.claim(1)
    assert "nothing published since" in only("warn", model.claims(case(config))).what
    new, scribe.epoch = scribe.epoch, old
    scribe.write(weights.publish(weights.learn(["d"])))
    scribe.epoch = new
    assert any("two trainers" in f.remedy for f in model.claims(case(config)))


# --- the broker ---


@pytest.fixture
def real(kafka: str, prefix: str, tmp_path: Path) -> Config:
    config = configured(kafka, prefix, tmp_path)
    topics.ensure(config.kafka)
    return config


def test_clocks_that_differ_are_measured(real: Config) -> None:
    for ahead, level in ((0.0, "ok"), (-3.0, "warn"), (3.0, "warn"), (60.0, "fail")):
        (found,) = there.clock(case(real, clock=Ahead(ahead)))
        assert found.level == level, found
    assert found.exit_code == 78 and "behind ours" in found.what


def test_a_topic_that_is_not_as_specified_is_78(real: Config) -> None:
    assert levels(there.topics(case(real))) == {"ok"}
    admin = Admin(real.kafka)
    events = next(
        s for s in topics.load_specs(topics.specs_path(), real.kafka.topic_prefix) if s.name.endswith(".events")
    )
    spec = topics.TopicSpec(
        events.name, "", events.partitions, {**events.config, "message.timestamp.type": "CreateTime"}
    )
    topics._alter(admin, spec, ["message.timestamp.type"])
    found = only("fail", there.topics(case(real)))
    assert found.exit_code == 78 and "message.timestamp.type is CreateTime" in found.what


def send(config: Config, count: int) -> None:
    producer = Producer(config.kafka, client_id="feed")
    for n in range(count):
        producer.send(config.topic("events"), b"{}", key=b"u", partition=n % 4)
    producer.confirm(20)
    producer.close()


def test_a_log_that_forgets_before_it_could_be_read_again(real: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    send(real, 40)
    assert levels(there.retention(case(real))) == {"ok"}
    assert "none are taken" in only("warn", there.snapshots(case(real))).what
    monkeypatch.setattr(there, "REPLAY_EVENTS_PER_SECOND", 1e-5)
    assert only("fail", there.retention(case(real))).exit_code == 78


def test_a_reader_that_is_behind_or_overtaken(real: Config) -> None:
    assert all("has reported yet" in f.what for f in there.lag(case(real)))
    send(real, 40)
    admin, topic, group = Admin(real.kafka).client, real.topic("events"), real.group("sequencer")
    at = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, p, 4) for p in range(4)])
    admin.alter_consumer_group_offsets([at])[group].result(20)
    found = next(f for f in there.lag(case(real)) if "sequencer" in f.what)
    assert found.level == "ok" and "24 records" in found.what
    late = next(f for f in there.lag(case(real, clock=Ahead(20 * 86_400))) if "sequencer" in f.what)
    assert late.level == "warn" and "half of the retention" in late.remedy
    for future in admin.delete_records([TopicPartition(topic, 1, 8)]).values():
        future.result(20)
    gone = next(f for f in there.lag(case(real)) if "sequencer" in f.what)
    assert (gone.level, gone.exit_code) == ("fail", 65) and "@4, the log starts at 8" in gone.what


# --- roles, upgrades ---


def test_roles_are_asked(nowhere: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health("sequencer", CLOCK, "assigned")
    probes = Probes(Telemetry(port=0), health)
    url = f"http://127.0.0.1:{probes.port}/"
    try:
        assert "assigned: starting" in only("warn", roles.roles(case(nowhere, url))).what
        health.hold("assigned")
        assert levels(roles.roles(case(nowhere, url))) == {"ok"}
    finally:
        probes.close()
    assert only("fail", roles.roles(case(nowhere, url))).exit_code == 75
    with pytest.raises(UsageError):
        list(roles.roles(case(nowhere, "file:///etc/passwd")))


def test_a_role_of_another_version_is_named(nowhere: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'streamgr_build_info{role="trainer",version="0.0.9"} 1.0'
    monkeypatch.setattr(roles, "_get", lambda url: (200, said))
    assert "runs 0.0.9" in only("warn", roles.roles(case(nowhere, "http://x:1"))).what


def test_the_way_from_an_older_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(steps("0.1.0")) > len(steps(STEPS[-1][0])) > 3
    assert main(["doctor", "--upgrade-from", "0.1.0"]) == 0
    assert capsys.readouterr().out.startswith(" 1. ")
    assert main(["doctor", "--upgrade-from", "99.0"]) == 2
    assert main(["doctor", "--upgrade-from", "new"]) == 2
    assert "is newer than this version" in capsys.readouterr().err
