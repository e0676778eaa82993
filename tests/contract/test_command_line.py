"""The command line: exit codes, settings, `produce`, `weights`, and roles that leave when told to."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from streamgr.config import Kafka
from streamgr.kafka.client import Admin
from streamgr.kafka.embedded import EmbeddedBroker
from tests.contract.conftest import Fresh
from tests.system import PARTITIONS, Json, System, free_port, wait_for

T = 1_700_000_000_000
SETTINGS = {
    "sequence__attribution_window_seconds": 2.0,
    "sequence__lateness_seconds": 0.5,
    "trainer__publish_seconds": 0.5,
}
COMMANDS = [
    "demo", "sequencer", "trainer", "scorer", "topics check", "topics apply", "produce", "sequences show",
    "sequences export", "examples list", "weights list", "weights show", "weights verify", "evaluate", "health",
    "config show", "config check",
]  # fmt: skip


def streamgr(*argv: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STREAMGR_")}
    return subprocess.run(
        [sys.executable, "-m", "streamgr", *argv],
        env={**clean, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module")
def system(fresh: Fresh) -> System:
    return fresh(**SETTINGS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = streamgr(*command.split(), "--help")
    assert done.returncode == 0
    assert "example: streamgr " + command.split(maxsplit=1)[0] in done.stdout
    assert "--config" in done.stdout


@pytest.mark.parametrize("argv", [(), ("nothing",), ("produce",), ("sequencer", "--nothing"), ("topics", "delete")])
def test_a_wrong_use_is_2(argv: tuple[str, ...]) -> None:
    done = streamgr(*argv)
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.parametrize("command", ["config show", "config check", "topics check", "sequencer", "trainer", "scorer"])
def test_an_unknown_key_is_78_and_named(command: str) -> None:
    done = streamgr(*command.split(), STREAMGR_TRAINER__BATCH_TOKEN="1")
    assert done.returncode == 78
    assert "trainer" in done.stderr.lower()
    assert "batch_token" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_settings_file_that_is_wrong_is_78(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    for text, named in (
        ("[nothing]\nx = 1\n", "nothing"),
        ("[scorer]\nprt = 1\n", "prt"),
        ("[scorer]\nport = 'x'\n", "scorer.port"),
        ("[sequence]\nattribution_window_seconds = -1\n", "attribution_window_seconds"),
        ("[scorer\n", "my.toml"),
    ):
        file.write_text(text)
        done = streamgr("config", "check", "--config", str(file))
        assert done.returncode == 78, text
        assert named in done.stderr
    assert streamgr("config", "check", "--config", str(tmp_path / "none.toml")).returncode == 78


def test_a_file_yields_to_a_variable_and_that_to_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[scorer]\nport = 1111\n[trainer]\npublish_seconds = 7\n")
    argv = ["config", "show", "--config", str(file)]

    def line(name: str, *more: str, **variables: str) -> str:
        done = streamgr(*argv, *more, **variables)
        assert done.returncode == 0
        return next(v for v in done.stdout.splitlines() if v.startswith(name))

    assert "1111" in line("scorer.port")
    assert "my.toml" in line("scorer.port")
    assert "2222" in line("scorer.port", STREAMGR_SCORER__PORT="2222")
    assert "STREAMGR_SCORER__PORT" in line("scorer.port", STREAMGR_SCORER__PORT="2222")
    assert "3333" in line("scorer.port", "--set", "scorer.port=3333", STREAMGR_SCORER__PORT="2222")
    assert "default" in line("scorer.host")


def test_the_defaults_that_tests_rely_on() -> None:
    shown = dict(line.split("  #")[0].split(" = ") for line in streamgr("config", "show").stdout.splitlines())
    for name, value in {
        "sequence.attribution_window_seconds": 600,
        "sequence.lateness_seconds": 60,
        "sequence.commit_interval_seconds": 0.2,
        "sequence.max_future_seconds": 60,
        "sequence.actions": ["click", "like"],
        "trainer.publish_seconds": 2,
        "scorer.port": 8080,
        "telemetry.port": 9464,
    }.items():
        assert json.loads(shown[name]) == value


def test_secrets_are_masked(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        '[kafka]\nsasl_password = "hunter2"\n[kafka.librdkafka]\n"ssl.key.password" = "hunter2"\n'
        '"sasl.username" = "me"\n"ssl.key.pem" = "hunter2"\n"sasl.oauthbearer.client.secret" = "hunter2"\n'
        '"ssl.keystore.password" = "hunter2"\n"sasl.oauthbearer.config" = "principal=me secret=hunter2"\n'
    )
    done = streamgr("config", "show", "--config", str(file))
    assert done.returncode == 0
    assert "sasl_password" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    done = streamgr("config", "show", STREAMGR_KAFKA__SASL_PASSWORD="hunter2")
    assert done.returncode == 0
    assert "hunter2" not in done.stdout + done.stderr


def test_a_broker_that_is_not_there_is_69(tmp_path: Path) -> None:
    """In every one-shot command, and not after minutes."""
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps({"type": "click", "user_id": 1, "item_id": 2, "event_time": T}) + "\n")
    nowhere = {
        "STREAMGR_KAFKA__BOOTSTRAP": f"127.0.0.1:{free_port()}",
        "STREAMGR_STATE__DIRECTORY": str(tmp_path / "state"),
    }
    commands = [
        "topics check", "examples list", f"produce {file}", "sequencer --until-end", "trainer --until-end",
    ]  # fmt: skip
    codes: dict[str, tuple[int, str]] = {}

    def run(command: str) -> None:
        done = streamgr(*command.split(), STREAMGR_TELEMETRY__PORT="0", **nowhere)
        codes[command] = done.returncode, done.stdout + done.stderr  # roles tell their log on stdout

    threads = [threading.Thread(target=run, args=(c,)) for c in commands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {c: codes.get(c, (None,))[0] for c in commands} == dict.fromkeys(commands, 69)
    assert all(nowhere["STREAMGR_KAFKA__BOOTSTRAP"] in text and "Traceback" not in text for _, text in codes.values())


@pytest.mark.parametrize("role", ["sequencer", "scorer"])
def test_told_to_leave_while_the_broker_is_away_a_role_leaves_with_0(tmp_path: Path, role: str) -> None:
    system = System(f"127.0.0.1:{free_port()}", "t", tmp_path)
    with system:
        child = system.start(role)
        wait_for("its first words", lambda: "kafka_error" in system.logs() or "broker is away" in system.logs(), 20)
        child.send_signal(signal.SIGTERM)
        assert child.wait(15) == 0, system.logs()


def test_a_state_directory_that_cannot_be_written_is_73(system: System, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    system.run("sequencer", "--until-end", "--set", f"state.directory={tmp_path / 'file' / 'state'}", code=73)


def test_topics_check_tells_what_is_missing(system: System) -> None:
    system.run("topics", "check")
    system.run("topics", "apply")  # again: nothing to do
    system.run("topics", "check", "--set", f"kafka.topic_prefix={system.prefix}none", code=78)


ROWS: list[Json] = [
    {"type": "impression", "user_id": "ann", "item_id": 7, "event_time": T, "request_id": "r"},
    {"type": "click", "user_id": "ann", "item_id": 7, "event_time": "2023-11-14T22:13:21Z", "request_id": "r"},
    {"type": "like", "user_id": 42, "item_id": "x", "event_time": T + 1500, "event_id": "mine"},
]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "csv.gz"])
def test_produce_publishes_a_file_and_closes_its_labels(fresh: Fresh, tmp_path: Path, form: str) -> None:
    columns = ["type", "user_id", "item_id", "event_time", "request_id", "event_id"]
    if form.startswith("csv"):
        lines = [",".join(columns), *(",".join(str(row.get(c, "")) for c in columns) for row in ROWS)]
    else:
        lines = [json.dumps(row) for row in ROWS]
    data = "".join(line + "\n" for line in lines).encode()
    file = tmp_path / f"day.{form}"
    file.write_bytes(gzip.compress(data) if form.endswith(".gz") else data)
    system = fresh(**SETTINGS)
    system.run("produce", str(file), "--close")
    system.run("produce", str(file), "--close")  # the same rows have the same ids: nothing changes
    system.run("sequencer", "--until-end")
    assert system.read("dead-letters") == []
    ann, number = sorted(system.exported(), key=lambda s: s["user_id"], reverse=True)
    assert [(e["type"], e["item_id"], e["event_time"]) for e in ann["events"]] == [
        ("impression", "7", T),
        ("click", "7", T + 1000),
    ]
    first, second = (e["event_id"] for e in ann["events"])
    assert first.rsplit("-", 1)[0] == second.rsplit("-", 1)[0]
    assert "day" in first
    assert int(second.rsplit("-", 1)[1]) == int(first.rsplit("-", 1)[1]) + 1
    assert (number["user_id"], number["events"][0]["event_id"]) == ("42", "mine")
    labels = {t["event_id"]: t["labels"] for e in system.examples() for t in e["targets"]}
    assert labels == {first: ["click"], "mine": ["like"]}
    beats = [m for m in system.read("events") if m.key() is None]
    assert {m.partition() for m in beats} == set(range(PARTITIONS))
    assert all(set(json.loads(m.value())) == {"type", "event_time"} for m in beats)


def test_produce_refuses_a_bad_file_with_65_and_says_where(system: System, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n{\n")
    done = subprocess.run(
        [sys.executable, "-m", "streamgr", "produce", str(file)],
        env=system._environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 65
    assert "bad.jsonl" in done.stderr
    assert "2" in done.stderr.replace(str(tmp_path), "")
    assert "Traceback" not in done.stderr
    system.run("produce", str(tmp_path / "none.jsonl"), code=2)


def test_a_store_in_use_is_75_and_roles_leave_with_0(fresh: Fresh, tmp_path: Path) -> None:
    """Also what they show on their telemetry port, and what weights then lie there."""
    ports = {role: free_port() for role in ("sequencer", "trainer", "scorer")}
    system = fresh(**SETTINGS)
    file = tmp_path / "day.jsonl"
    users = [{**row, "user_id": f"u{n}", "event_id": f"e{n}-{row['type']}"} for n in range(20) for row in ROWS]
    file.write_text("".join(json.dumps(row) + "\n" for row in users))
    system.run("produce", str(file), "--close")
    roles = {role: system.start(role, "--set", f"telemetry.port={port}") for role, port in ports.items()}

    def get(role: str, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{ports[role]}{path}", timeout=5) as answer:
                return str(answer.read(), "utf-8")
        except OSError:
            return ""

    for role in roles:
        wait_for(f"{role} to be ready", partial(get, role, "/readyz"), 30)
        assert get(role, "/livez")
        system.run("health", "--set", f"telemetry.port={ports[role]}")
    wait_for("the learned weights", lambda: "streamgr_label_to_serving_seconds_count 40.0" in get("scorer", "/metrics"))
    for role, names in {
        "sequencer": [
            "event_to_sequence_seconds_bucket", "event_age_at_append_seconds_bucket", "watermark_timestamp_seconds",
            "consumer_lag_records", "events_total",
        ],
        "trainer": [
            "label_to_gradient_seconds_bucket", "impression_to_label_seconds_bucket", "consumer_lag_records",
                "model_horizon_timestamp_seconds",
            "watermark_timestamp_seconds", "prequential_normalized_entropy", "table_used_slots",
            "weights_published_total",
        ],
        "scorer": ["event_to_serving_seconds_bucket", "label_to_serving_seconds_bucket", "weights_version"],
    }.items():  # fmt: skip
        text = get(role, "/metrics")
        for name in [*names, "build_info", "ready", "log_lines_total"]:
            assert f"\nstreamgr_{name}" in text, (role, name)
    system.run("sequencer", "--until-end", code=75)
    for child in roles.values():
        child.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert {role: child.wait(15) for role, child in roles.items()} == dict.fromkeys(roles, 0), system.logs()
    assert time.monotonic() - started < 10
    system.run("health", "--set", f"telemetry.port={ports['scorer']}", code=1)
    versions = [json.loads(line) for line in system.run("weights", "list").splitlines()]
    assert versions[-1]["targets_learned"] == 40
    for version in versions:
        assert {"version", "parent", "kind", "horizon_ms", "bytes", "digest", "quality"} <= set(version)
    newest = versions[-1]["version"]
    assert json.loads(system.run("weights", "show", str(newest)))["version"] == newest
    system.run("weights", "verify", str(newest))
    system.run("weights", "verify", "999", code=65)


def test_produce_sets_no_timestamp(tmp_path: Path) -> None:
    """The embedded broker keeps what it is given: the producer's own clock, and not the event's time."""
    file = tmp_path / "day.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    with EmbeddedBroker.start_mock() as broker:
        Admin(Kafka(bootstrap=broker.bootstrap)).client.list_topics("streamgr.events", 10)  # asked for, it is there
        done = streamgr("produce", str(file), STREAMGR_KAFKA__BOOTSTRAP=broker.bootstrap)
        assert done.returncode == 0, done.stderr
        consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "x", "auto.offset.reset": "earliest"})
        consumer.assign([TopicPartition("streamgr.events", p, 0) for p in range(4)])
        message = wait_for("the record", lambda: consumer.poll(0.5))
        consumer.close()
    assert message.timestamp()[1] > T + 10_000_000
