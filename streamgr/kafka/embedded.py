"""A broker for the demo and for tests: a real Kafka where one is at hand, else librdkafka's mock cluster.

The real one (`KAFKA_HOME`, Java 17) is a child process on free ports with its data in a directory of the caller's. It
leads its own process group, so a terminal's Ctrl-C does not reach it before the roles have drained, and it dies with
the thread that started it, even by SIGKILL (PR_SET_PDEATHSIG): start it from the main thread.

The mock lives inside this process and serves others over loopback as long as the object lives. The roles must be right
without trusting it: see `MOCK`.
"""

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import confluent_kafka

from streamgr.clock import Deadline, SystemClock
from streamgr.config import Kafka
from streamgr.errors import BrokerUnreachable, ConfigError
from streamgr.kafka.client import Admin
from streamgr.service import Stop

READY_SECONDS = 60.0
STOP_SECONDS = 15.0
LOG_TAIL_BYTES = 2_000

REAL = "a real Kafka from {home}, for this run only: its data go when it stops"
MOCK = (
    "librdkafka's mock broker inside this process (for a real Kafka: Java 17 and KAFKA_HOME): every topic has "
    "4 partitions, one member a group, no topic settings, no compaction, about 5 MB a partition and then the oldest "
    "records go; everything is lost when it stops"
)

# Runs in between: the kernel's promise must be made by the process that will be the broker, before it becomes it.
DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
num.partitions=4
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
"""
JVM = {
    "KAFKA_HEAP_OPTS": "-Xms128m -Xmx384m",
    "KAFKA_JVM_PERFORMANCE_OPTS": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1",  # Apache's own scripts read this one
    "KAFKA_OPTS": "-XX:TieredStopAtLevel=1",
}


class EmbeddedBroker:
    """A running broker; `close` (or leaving the context) ends it."""

    def __init__(self, bootstrap: str, kind: str, description: str, close: Callable[[], None]) -> None:
        """`kind`: "kafka" | "mock"; `description`: one sentence on what it is and what that means."""
        self.bootstrap, self.kind, self.description = bootstrap, kind, description
        self._close = close

    @classmethod
    def start(cls, directory: Path, environ: Mapping[str, str] | None = None) -> "EmbeddedBroker":
        """A real Kafka under `directory` if `KAFKA_HOME` is set, else the mock.

        Raises `ConfigError` where `KAFKA_HOME` is set and cannot be used, `BrokerUnreachable` when it does not start.
        """
        environ = os.environ if environ is None else environ
        home = environ.get("KAFKA_HOME", "")
        return cls.start_kafka(directory, Path(home), environ) if home else cls.start_mock()

    @classmethod
    def start_kafka(cls, directory: Path, home: Path, environ: Mapping[str, str] | None = None) -> "EmbeddedBroker":
        """One Kafka node from the distribution in `home`, its files in `directory`; a used one is gone on with."""
        environ = os.environ if environ is None else environ
        home = home.resolve()
        for script in ("kafka-storage.sh", "kafka-server-start.sh"):
            if not (home / "bin" / script).is_file():
                raise ConfigError(
                    f"no bin/{script} there",
                    where=f"KAFKA_HOME={home}",
                    remedy="name a Kafka 4 distribution, or unset it",
                )
        if shutil.which("java", path=environ.get("PATH")) is None:
            raise ConfigError(
                "it needs `java` on the PATH", where=f"KAFKA_HOME={home}", remedy="install Java 17, or unset KAFKA_HOME"
            )
        directory.mkdir(parents=True, exist_ok=True)
        properties, log = directory / "server.properties", directory / "broker.log"
        env = {"LOG_DIR": str(directory / "logs")} | JVM | dict(environ)
        if not properties.is_file():  # a used directory keeps its ports, so that its clients find it again
            port, controller = free_ports(2)
            properties.write_text(PROPERTIES.format(port=port, controller=controller, data=directory / "data"))
        bootstrap = properties.read_text().split("advertised.listeners=PLAINTEXT://")[1].splitlines()[0]
        _format(home, directory, env, log)
        command = [str(home / "bin" / "kafka-server-start.sh"), str(properties)]
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        broker = cls(bootstrap, "kafka", REAL.format(home=home), lambda: _end(process))
        try:
            _await(broker.bootstrap, process, log)
        except BaseException:
            broker.close()
            raise
        return broker

    @classmethod
    def start_mock(cls) -> "EmbeddedBroker":
        """librdkafka's mock cluster inside this process."""
        owner = confluent_kafka.Producer(
            {
                "bootstrap.servers": "mock",
                "test.mock.num.brokers": 1,
                "log_level": 2,
                "client.id": "mock-owner",
            }
        )
        brokers = owner.list_topics(timeout=10).brokers.values()
        bootstrap = ",".join(f"{b.host}:{b.port}" for b in brokers)
        held = [owner]  # the mock cluster lives and dies with this client
        return cls(bootstrap, "mock", MOCK, held.clear)

    def close(self) -> None:
        """End it; again is harmless."""
        self._close()

    def __enter__(self) -> "EmbeddedBroker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _format(home: Path, directory: Path, env: dict[str, str], log: Path) -> None:
    if (directory / "data" / "meta.properties").is_file():
        return
    storage, cluster = str(home / "bin" / "kafka-storage.sh"), _cluster_id()
    done = subprocess.run(
        [storage, "format", "--standalone", "-t", cluster, "-c", str(directory / "server.properties")],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=READY_SECONDS,
        check=False,
    )
    log.write_bytes(done.stdout)
    if done.returncode:
        raise _not_started(f"kafka-storage.sh format exited {done.returncode}", log)


def _await(bootstrap: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the broker listens, answers, and knows itself."""
    deadline, pause = Deadline(SystemClock(), READY_SECONDS), Stop()
    admin: Admin | None = None
    while True:
        if process.poll() is not None:
            raise _not_started(f"it exited {process.returncode}", log)
        if deadline.passed():
            raise _not_started(f"not ready within {READY_SECONDS:.0f} s", log)
        if admin is None and _listens(bootstrap):
            admin = Admin(Kafka(bootstrap=bootstrap))
        if admin is not None and admin.metadata(deadline.remaining()).brokers:
            return
        pause.wait(0.1)


def _listens(bootstrap: str) -> bool:
    host, port = bootstrap.split(":")
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, int(port))) == 0


def _not_started(what: str, log: Path) -> BrokerUnreachable:
    tail = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
    return BrokerUnreachable(f"the embedded Kafka did not start: {what}\n{tail}", remedy=f"its whole log is {log}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to its process group, SIGKILL when it does not leave in time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on at this moment, all different."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in held]
    for s in held:
        s.close()
    return ports


def _cluster_id() -> str:
    """A new random id in Kafka's form: 22 characters of base64url that do not start like an option."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return text
