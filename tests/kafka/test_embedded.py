"""The embedded broker: what it is, that it fails aloud, that others reach it, and that it never outlives its owner."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from streamgr.clock import SystemClock
from streamgr.config import Kafka
from streamgr.errors import BrokerUnreachable, ConfigError
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.topics import identity
from streamgr.service import Stop

OWNER = """
import sys
from pathlib import Path
from streamgr.kafka.embedded import EmbeddedBroker
with EmbeddedBroker.start(Path(sys.argv[1])) as broker:
    print(broker.bootstrap, flush=True)
    sys.stdin.read()
"""
SENDER = """
import sys
from streamgr.config import Kafka
from streamgr.kafka.producer import Producer
producer = Producer(Kafka(bootstrap=sys.argv[1]), client_id="other")
print(producer.send_confirmed("there", b"from another process", partition=1))
producer.close()
"""


def listens(bootstrap: str) -> bool:
    host, port = bootstrap.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_the_mock_says_what_it_is_and_serves_other_processes() -> None:
    with EmbeddedBroker.start(Path("unused"), {}) as mock:
        assert mock.kind == "mock"
        for limit in ("4 partitions", "no compaction", "5 MB", "KAFKA_HOME"):
            assert limit in mock.description
        sent = subprocess.run(
            [sys.executable, "-c", SENDER, mock.bootstrap], capture_output=True, text=True, timeout=60, check=False
        )
        assert (sent.stdout, sent.stderr) == ("0\n", "")
        consumer = Consumer(Kafka(bootstrap=mock.bootstrap), client_id="c")
        consumer.assign({("there", 1): 0})
        assert [r.value for r in consumer.poll(timeout=10)] == [b"from another process"]
        consumer.close()
        bootstrap = mock.bootstrap
    mock.close()
    assert not listens(bootstrap)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_real_broker_dies_with_its_owner(kafka_home: Path, tmp_path: Path, number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None and owner.stdin is not None
    bootstrap = owner.stdout.readline().strip()
    assert listens(bootstrap) and identity_of_nothing(bootstrap)
    owner.send_signal(number)
    owner.wait(10)
    owner.stdout.close()
    owner.stdin.close()
    clock = SystemClock()
    end = clock.monotonic() + 20
    while listens(bootstrap):
        assert clock.monotonic() < end, "the broker outlived its owner"
        Stop().wait(0.1)


def identity_of_nothing(bootstrap: str) -> bool:
    with pytest.raises(ConfigError, match="nothing: the topic does not exist"):
        identity(Kafka(bootstrap=bootstrap), "nothing")
    return True


def distribution(home: Path, start: str) -> Path:
    (home / "bin").mkdir(parents=True)
    for name, body in (("kafka-storage.sh", "exit 0"), ("kafka-server-start.sh", start), ("java", "exit 0")):
        script = home / "bin" / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return home


def environment(home: Path) -> dict[str, str]:
    return {"KAFKA_HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}


def test_a_broker_that_exits_shows_the_tail_of_its_log(tmp_path: Path) -> None:
    home = distribution(tmp_path / "home", "echo 'java.lang.OutOfMemoryError: no room'; exit 3")
    with pytest.raises(
        BrokerUnreachable, match=r"it exited 3\njava.lang.OutOfMemoryError: no room; remedy: .*broker.log"
    ):
        EmbeddedBroker.start(tmp_path / "data", environment(home))


def test_a_broker_that_never_gets_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgr.kafka.embedded.READY_SECONDS", 1.0)
    home = distribution(tmp_path / "home", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    with pytest.raises(BrokerUnreachable, match="not ready within 1 s"):
        EmbeddedBroker.start(tmp_path / "data", environment(home))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_kafka_home_that_cannot_be_used_is_an_error_not_a_mock(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"KAFKA_HOME=.*no bin/kafka-storage.sh"):
        EmbeddedBroker.start(tmp_path, {"KAFKA_HOME": str(tmp_path)})
    home = distribution(tmp_path / "home", "exit 0")
    (home / "bin" / "java").unlink()
    with pytest.raises(ConfigError, match="install Java 17, or unset KAFKA_HOME"):
        EmbeddedBroker.start(tmp_path, {"KAFKA_HOME": str(home), "PATH": str(home / "bin")})
