"""Against a broker that wants TLS, a name and a password: what the README says works, and what is refused says so.

Each role runs under a principal of its own that may do what SECURITY.md's table gives it, and nothing else.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamgr.config import Kafka
from streamgr.errors import ConfigError
from streamgr.kafka.security import security
from tests.kafka.secured import Secured
from tests.ops.certificates import Authority
from tests.system import System, wait_for

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "streamgr"
ROW = re.compile(r"\| (\w+) \| (topic|group|cluster)(?: `([^`]+)`)? \| ([\w, ]+) \|")
KIND = {"topic": "TOPIC", "group": "GROUP", "cluster": "BROKER"}
PASSWORDS = {name: f"the {name}'s own" for name in ("producer", "sequencer", "trainer", "scorer", "operator", "nobody")}
QUICKLY = 30.0  # seconds, on a busy machine; what is waited for longer than two is an absent broker, and that is 69


def granted() -> list[tuple[str, str, str, list[str]]]:
    """(principal, kind, name, operations) as SECURITY.md has them."""
    rows = ROW.findall((ROOT / "SECURITY.md").read_text())
    assert len(rows) > 15
    return [
        (
            who,
            KIND[kind],
            name or "kafka-cluster",
            [re.sub(r"(?<!^)(?=[A-Z])", "_", o).upper() for o in what.split(", ")],
        )
        for who, kind, name, what in rows
    ]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    import os
    import shutil

    home = os.environ.get("KAFKA_HOME")
    if not home or not shutil.which("java"):
        pytest.skip("needs KAFKA_HOME and java on the PATH")
    broker = Secured(Path(home), tmp_path_factory.mktemp("secured"))
    for name, password in PASSWORDS.items():
        broker.add_user(name, password)
    for who, kind, name, operations in granted():
        broker.allow(who, kind, name, *operations)
    yield broker
    broker.close()


def librdkafka(broker: Secured, user: str, **changed: str) -> dict[str, str]:
    return {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": user,
        "ssl.ca.location": str(broker.ca),
        **changed,
    }


def system(broker: Secured, directory: Path, user: str, password: str = "", **changed: str) -> System:
    """An installation that comes in as this user, its password in a file."""
    (directory / user).mkdir(exist_ok=True)
    secret = directory / user / "password"
    secret.write_text((password or PASSWORDS[user]) + "\n")
    passed = librdkafka(broker, user, **changed)
    inline = "{" + ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in passed.items()) + "}"
    return System(
        broker.bootstrap, PREFIX, directory / user, kafka__librdkafka=inline, kafka__sasl_password_file=str(secret),
        sequence__attribution_window_seconds=2.0, sequence__lateness_seconds=0.5, scorer__score_sample=1.0,
    )  # fmt: skip


def refused(user: System, *argv: str) -> tuple[int, str, float]:
    """(exit code, what it said, seconds)."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "streamgr", *argv],
        env=user._environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def test_each_role_does_its_work_with_its_own_rights(secured: Secured, tmp_path: Path) -> None:
    operator = system(secured, tmp_path, "operator")
    operator.run("topics", "apply")
    assert "fail" not in operator.run("topics", "check")

    log = tmp_path / "log.jsonl"
    rows = [
        {"type": kind, "user_id": f"u{n}", "item_id": f"i{n % 3}", "event_time": 1_700_000_000_000 + 1000 * n}
        for n in range(30) for kind in ("impression", "click")
    ]  # fmt: skip
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"type": "nonsense"}\n')
    system(secured, tmp_path, "producer").run("produce", str(log), "--close", "--skip-bad-rows")
    sequencer = system(secured, tmp_path, "sequencer")
    sequencer.run("sequencer", "--until-end")
    assert len(sequencer.exported()) == 30
    trainer = system(secured, tmp_path, "trainer")
    trainer.run("trainer", "--until-end")
    versions = [json.loads(line) for line in operator.run("weights", "list").splitlines()]
    assert versions[-1]["targets_learned"] == 30
    operator.run("weights", "verify", str(versions[-1]["version"]))
    operator.run("weights", "pin", str(versions[-1]["version"]))
    operator.run("weights", "pin", "--remove")
    operator.run("state", "erase", "u0")

    with system(secured, tmp_path, "scorer") as scorer, system(secured, tmp_path, "sequencer") as group:
        scorer.start("scorer")
        wait_for("a ready scorer", lambda: scorer.get("/readyz")[0] == 200, 40)
        assert scorer.post("/v1/rank", {"user_id": "u1", "candidates": ["i1", "i2"]})[1]["sequence_length"] == 2
        group.start("sequencer")  # this time as a member of its group
        wait_for("its partitions", lambda: "partitions_assigned" in group.logs(), 40)
        assert "kafka_error" not in group.logs() + scorer.logs()
    told = operator.run("doctor")  # ends with 0
    assert "SASL_SSL SCRAM-SHA-512" in told and "could not be read" not in told
    assert not [line for line in told.splitlines() if line.startswith("fail")]


@pytest.mark.parametrize(
    ("user", "argv"),
    [
        ("producer", ["weights", "list"]),
        ("sequencer", ["trainer", "--until-end"]),
        ("scorer", ["state", "erase", "u1"]),
        ("trainer", ["sequencer", "--until-end"]),
        ("nobody", ["topics", "check"]),
    ],
    ids=str,
)
def test_what_a_principal_may_not_do_is_denied_and_named(
    secured: Secured, tmp_path: Path, user: str, argv: list[str]
) -> None:
    system(secured, tmp_path, "operator").run("topics", "apply")
    code, said, seconds = refused(system(secured, tmp_path, user), *argv)
    assert code == 78, said
    assert re.search(r"remedy: (grant this principal|streamgr topics apply)", said) or "missing" in said
    assert seconds < 40


COMMANDS = (["topics", "check"], ["produce", "LOG"], ["sequencer", "--until-end"], ["examples", "list"],
            ["weights", "list"], ["state", "erase", "u"])  # fmt: skip


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: argv[0])
def test_a_wrong_password_is_named_at_once(secured: Secured, tmp_path: Path, argv: list[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"type":"click","user_id":"u","item_id":"i","event_time":1700000000000}\n')
    wrong = system(secured, tmp_path, "operator", password="open sesame")
    code, said, seconds = refused(wrong, *(str(log) if word == "LOG" else word for word in argv))
    assert (code, seconds < QUICKLY) == (78, True), (seconds, said)
    assert "Authentication failed" in said and "remedy: check sasl.mechanism, sasl.username and kafka.sasl_pass" in said
    assert "open sesame" not in said


def test_an_untrusted_certificate_is_named_at_once(secured: Secured, tmp_path: Path) -> None:
    other = Authority.made(tmp_path, "other")
    code, said, seconds = refused(
        system(secured, tmp_path, "operator", **{"ssl.ca.location": str(other.ca)}), "topics", "check"
    )
    assert (code, seconds < QUICKLY) == (78, True), (seconds, said)
    assert "certificate verify failed" in said and "remedy: check ssl.ca.location" in said


def test_a_role_that_is_not_let_in_waits_says_so_and_leaves_when_told(secured: Secured, tmp_path: Path) -> None:
    with system(secured, tmp_path, "sequencer", password="not yet") as early:
        role = early.start("sequencer")
        wait_for("its words", lambda: "Authentication failed" in early.logs(), 20)
        assert role.poll() is None
        secured.add_user("sequencer", "not yet")
        try:
            wait_for("it to be let in", lambda: "partitions_assigned" in early.logs(), 60)
        finally:
            secured.add_user("sequencer", PASSWORDS["sequencer"])
        role.terminate()
        assert role.wait(30) == 0


def test_a_client_of_another_make_is_given_the_same(secured: Secured) -> None:
    aiokafka = pytest.importorskip("aiokafka.client")
    settings = Kafka(
        bootstrap=secured.bootstrap,
        librdkafka=dict(librdkafka(secured, "operator")),
        sasl_password=PASSWORDS["operator"],
    )
    found = security(settings)

    async def connected(**changed: Any) -> int:
        client = aiokafka.AIOKafkaClient(
            **{
                "bootstrap_servers": secured.bootstrap,
                "security_protocol": found.protocol,
                "sasl_mechanism": found.mechanism,
                "sasl_plain_username": found.username,
                "sasl_plain_password": found.password,
                "ssl_context": found.ssl_context(),
                **changed,
            }
        )
        try:
            await client.bootstrap()
            return len(client.cluster.brokers())
        finally:
            await client.close()

    assert asyncio.run(connected()) == 1


def test_what_the_settings_mean() -> None:
    plain = security(Kafka())
    assert (plain.protocol, plain.mechanism, plain.encrypted, plain.ssl_context()) == ("PLAINTEXT", "", False, None)
    loose = security(
        Kafka(
            librdkafka={"security.protocol": "ssl", "enable.ssl.certificate.verification": False, "sasl.username": "x"}
        )
    )
    assert (loose.protocol, loose.verifies, loose.mechanism) == ("SSL", False, "")
    context = loose.ssl_context()
    assert context is not None and not context.check_hostname
    with pytest.raises(ConfigError, match=r"nowhere\.pem cannot be used"):
        security(Kafka(librdkafka={"security.protocol": "SSL", "ssl.ca.location": "nowhere.pem"})).ssl_context()
