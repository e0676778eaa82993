"""Brokers for the tests, and a topic prefix of each test's own.

`kafka`   a real Kafka, one a session: `KAFKA_BOOTSTRAP`, else `KAFKA_HOME` (started here), else a container, else skip
`broker`  the same test on a real Kafka and on the mock cluster: for what both must do
`prefix`  a topic prefix nobody else uses, so that tests share one broker
"""

import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamgr.config import Kafka
from streamgr.kafka.client import Admin
from streamgr.kafka.embedded import EmbeddedBroker

IMAGE = "apache/kafka:4.1.1"


@pytest.fixture(scope="session")
def _real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker | str]:
    """A real broker, or why there is none."""
    if bootstrap := os.environ.get("KAFKA_BOOTSTRAP"):
        yield EmbeddedBroker(bootstrap, "kafka", "the broker of KAFKA_BOOTSTRAP", lambda: None)
    elif os.environ.get("KAFKA_HOME") and shutil.which("java"):
        with EmbeddedBroker.start(tmp_path_factory.mktemp("kafka")) as broker:
            yield broker
    elif _docker_runs():
        yield from _container()
    else:
        yield "no real Kafka: set KAFKA_BOOTSTRAP, or KAFKA_HOME with java on the PATH, or run Docker"


@pytest.fixture(scope="session")
def _mock() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker.start_mock() as broker:
        yield broker


@pytest.fixture
def kafka(_real: EmbeddedBroker | str) -> str:
    """The bootstrap address of a real Kafka."""
    if isinstance(_real, str):
        pytest.skip(_real)
    return _real.bootstrap


@pytest.fixture
def kafka_home() -> Path:
    """A Kafka distribution, for tests that start (and stop) a broker of their own."""
    home = os.environ.get("KAFKA_HOME")
    if not home or not shutil.which("java"):
        pytest.skip("needs KAFKA_HOME and java on the PATH")
    return Path(home)


@pytest.fixture(params=["kafka", "mock"])
def broker(request: pytest.FixtureRequest) -> EmbeddedBroker:
    """A broker of each kind."""
    if request.param == "mock":
        mock: EmbeddedBroker = request.getfixturevalue("_mock")
        return mock
    real: EmbeddedBroker | str = request.getfixturevalue("_real")
    if isinstance(real, str):
        pytest.skip(real)
    return real


@pytest.fixture
def prefix() -> str:
    """A topic prefix of this test alone."""
    return f"t{uuid.uuid4().hex[:10]}"


@pytest.fixture
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


def _container() -> Iterator[EmbeddedBroker]:
    """The official image; any one setting drops its packaged ones, so all are given."""
    from testcontainers.core.container import DockerContainer

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # what Kafka advertises must be what the host publishes
    container = DockerContainer(IMAGE).with_bind_ports(port, port)
    for name, value in {
        "NODE_ID": "1",
        "PROCESS_ROLES": "broker,controller",
        "CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "CONTROLLER_QUORUM_VOTERS": "1@localhost:29093",
        "LISTENERS": f"PLAINTEXT://:{port},CONTROLLER://:29093",
        "ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
        "LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "AUTO_CREATE_TOPICS_ENABLE": "false",
    }.items():
        container.with_env(f"KAFKA_{name}", value)
    with container:
        Admin(Kafka(bootstrap=f"127.0.0.1:{port}")).metadata(90)
        yield EmbeddedBroker(f"127.0.0.1:{port}", "kafka", "a Kafka container", lambda: None)


def _docker_runs() -> bool:
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False
