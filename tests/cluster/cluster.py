"""Three real Kafka nodes, each broker and controller, to be killed, frozen, stopped and started again one by one.

Every node is a process of its own from `KAFKA_HOME` that dies with the thread that started it, even while frozen
(PR_SET_PDEATHSIG): start nodes from the main thread. The controllers are a static quorum (`controller.quorum.voters`),
which `kafka-storage.sh format` takes without further flags. A node that is started again has its old ports and data;
the ports lie below the ephemeral range, since a client that knocks at the closed port of a dead node out of that range
may be given the very port it knocks at, connect to itself and hold it.

What an operator would choose is as he would: three replicas of which two must confirm, and Kafka's own timeouts (a node
that is silent for 9 s is fenced). Leadership comes back to where it belongs within seconds instead of minutes, so that
each test finds it spread over the nodes.
"""

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from streamgr.kafka.embedded import DIE_WITH_PARENT, JVM
from tests.system import wait_for

NODES = (1, 2, 3)
OFFSETS_PARTITIONS = 4
ASK_SECONDS = 3.0
FORMAT_SECONDS = 60.0
UP_SECONDS = 90.0
WHOLE_SECONDS = 120.0
STOP_SECONDS = 60.0
HEAP = "-Xms64m -Xmx300m"
PROPERTIES = """\
process.roles=broker,controller
node.id={number}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
num.partitions=4
default.replication.factor=3
min.insync.replicas=2
offsets.topic.num.partitions={offsets}
offsets.topic.replication.factor=3
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
share.coordinator.state.topic.replication.factor=3
share.coordinator.state.topic.min.isr=2
group.initial.rebalance.delay.ms=0
leader.imbalance.check.interval.seconds=10
log.cleaner.dedupe.buffer.size=16777216
"""
Client = dict[str, str | int | float | bool]


class Node:
    """One broker and controller. Its files lie in `directory`; `log` holds what it said, over all its lives."""

    def __init__(self, number: int, port: int, controller: int, directory: Path) -> None:
        self.number, self.port, self.controller, self.directory = number, port, controller, directory
        self.log = directory / "node.log"
        self._properties = directory / "server.properties"
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False

    @property
    def running(self) -> bool:
        """Whether there is a process, frozen or not."""
        return self._process is not None and self._process.poll() is None

    def format(self, home: Path, cluster_id: str, voters: str) -> None:
        """Make its directory one of a new cluster."""
        self.directory.mkdir(parents=True)
        self._properties.write_text(
            PROPERTIES.format(
                number=self.number,
                voters=voters,
                offsets=OFFSETS_PARTITIONS,
                port=self.port,
                controller=self.controller,
                data=self.directory / "data",
            )
        )
        storage = [str(home / "bin" / "kafka-storage.sh"), "format", "-t", cluster_id, "-c", str(self._properties)]
        done = subprocess.run(
            storage, env=self._environment(), capture_output=True, timeout=FORMAT_SECONDS, check=False
        )
        assert done.returncode == 0, f"node {self.number}: {(done.stdout + done.stderr).decode()}"

    def start(self, home: Path) -> None:
        """Start it and do not wait: `Cluster.await_up` does."""
        assert not self.running, f"node {self.number} runs already"
        command = [str(home / "bin" / "kafka-server-start.sh"), str(self._properties)]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._frozen = False

    def kill(self) -> None:
        """SIGKILL, and gone."""
        process = self._alive()
        process.kill()
        process.wait()

    def freeze(self) -> None:
        """SIGSTOP: its connections stay open and nothing is answered."""
        self._alive().send_signal(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        self._alive().send_signal(signal.SIGCONT)
        self._frozen = False

    def stop(self) -> None:
        """SIGTERM: it hands over what it leads and leaves."""
        process = self._alive()
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"node {self.number} did not stop within {STOP_SECONDS:.0f} s\n{self.tail()}"
            ) from None

    def restore(self, home: Path) -> None:
        """Whatever was done to it: let it run."""
        if not self.running:
            self.start(home)
        elif self._frozen:
            self.thaw()

    def close(self) -> None:
        if self.running:
            self.kill()

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-3_000:].decode(errors="replace")

    def _alive(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None and self.running, f"node {self.number} does not run"
        return self._process

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **JVM, "KAFKA_HEAP_OPTS": HEAP, "LOG_DIR": str(self.directory / "logs")}


class Cluster:
    """The three nodes, and what they say of themselves. Use as a context: leaving it ends every node."""

    def __init__(self, home: Path, directory: Path) -> None:
        """A new, formatted cluster in `directory`, not yet started."""
        self._home = home
        ports = closed_ports(2 * len(NODES))
        self.nodes = {n: Node(n, ports.pop(), ports.pop(), directory / f"node-{n}") for n in NODES}
        self.bootstrap = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes.values())
        voters = ",".join(f"{n}@127.0.0.1:{node.controller}" for n, node in self.nodes.items())
        cluster_id = f"cluster-of-three-{random.randrange(100_000):05d}"  # 22 characters, as Kafka makes them
        for node in self.nodes.values():
            node.format(home, cluster_id, voters)
        # Its waits are short: a node that is frozen must not hold up the question to another.
        self._client: Client = {"bootstrap.servers": self.bootstrap, "socket.timeout.ms": 3_000, "log_level": 0}
        self.admin = AdminClient(self._client)
        self._reader = Consumer({**self._client, "group.id": "ends"})

    def __enter__(self) -> "Cluster":
        try:
            return self.restore()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        for node in self.nodes.values():
            node.close()

    # --- what is done to it ---

    def start(self, *numbers: int) -> None:
        """Start these nodes again and wait until the cluster counts them in."""
        for number in numbers:
            self.nodes[number].start(self._home)
        self.await_up(*numbers)

    def await_up(self, *numbers: int) -> None:
        """Until the metadata lists these nodes: started, registered, not fenced."""

        def listed() -> bool:
            for number in numbers:
                node = self.nodes[number]
                assert node.running, f"node {number} left by itself\n{node.tail()}"
            return set(numbers) <= self.up()

        wait_for(f"nodes {numbers} to be up", listed, UP_SECONDS)

    def await_gone(self, number: int) -> None:
        """Until the others have noticed that this node does not answer."""
        wait_for(f"node {number} to be fenced", lambda: (up := self.up()) and number not in up, UP_SECONDS)

    def restore(self) -> "Cluster":
        """Every node runs, every replica is in sync, and leadership is spread."""
        for node in self.nodes.values():
            node.restore(self._home)
        self.await_up(*self.nodes)
        wait_for("all replicas to be in sync, led by the preferred nodes", lambda: self._whole(True), WHOLE_SECONDS)
        return self

    def await_in_sync(self) -> None:
        """Until every replica of every partition is in sync."""
        wait_for("all replicas to be in sync", lambda: self._whole(False), WHOLE_SECONDS)

    def await_replicas(self, topic: str, count: int) -> None:
        """Until so many replicas of each of the topic's partitions are in sync."""

        def counted() -> bool:
            metadata = self._ask(lambda: self.admin.list_topics(topic, timeout=ASK_SECONDS))
            found = [] if metadata is None else [len(p.isrs) for p in metadata.topics[topic].partitions.values()]
            return set(found) == {count}

        wait_for(f"{count} replicas of {topic} in sync", counted)

    # --- what it says of itself ---

    def up(self) -> set[int]:
        """The nodes that the cluster takes as alive; none where nobody answers."""
        metadata = self._ask(lambda: self.admin.list_topics(timeout=ASK_SECONDS))
        return set() if metadata is None else set(metadata.brokers)

    def replicas(self, prefix: str) -> dict[str, list[set[int]]]:
        """The nodes that hold each partition of each of the prefix's topics."""
        topics = self.admin.list_topics(timeout=ASK_SECONDS).topics
        return {
            name: [set(p.replicas) for _, p in sorted(topic.partitions.items())]
            for name, topic in topics.items()
            if name.startswith(f"{prefix}.")
        }

    def leader(self, topic: str, partition: int) -> Node:
        """The node that leads a partition now."""

        def led() -> int | None:
            metadata = self._ask(lambda: self.admin.list_topics(topic, timeout=ASK_SECONDS))
            found = metadata and metadata.topics[topic].partitions.get(partition)
            return found.leader if found and found.leader in self.nodes else None

        return self.nodes[wait_for(f"a leader of {topic}[{partition}]", led)]

    def coordinator(self, group: str) -> Node:
        """The node that coordinates a group now: the leader of the group's place among the groups' offsets."""
        return self.leader("__consumer_offsets", java_hash(group) % OFFSETS_PARTITIONS)

    def committed(self, topic: str, group: str) -> dict[int, int]:
        """What the group has confirmed, by partition; empty where nobody answers."""
        numbers = self.ends(topic)
        reader = Consumer({**self._client, "group.id": group})
        try:
            found = self._ask(lambda: reader.committed([TopicPartition(topic, p) for p in numbers], ASK_SECONDS))
            return {} if found is None else {tp.partition: tp.offset for tp in found}
        finally:
            reader.close()

    def ends(self, topic: str) -> dict[int, int]:
        """The end of each partition; a partition that nobody answers for has -1.

        Not by the admin client, nor is anything of a group: librdkafka 2.16.1 aborts in `list_offsets` while leaders
        change, and goes on asking a coordinator that is dead.
        """
        metadata = self._ask(lambda: self.admin.list_topics(topic, timeout=ASK_SECONDS))
        if metadata is None or not metadata.topics[topic].partitions:
            return {-1: -1}
        return {p: self._end(topic, p) for p in metadata.topics[topic].partitions}

    def _end(self, topic: str, partition: int) -> int:
        answer = self._ask(lambda: self._reader.get_watermark_offsets(TopicPartition(topic, partition), ASK_SECONDS))
        return -1 if answer is None else int(answer[1])

    def setting(self, topic: str, name: str) -> str:
        """The value of a topic's setting."""
        resource = ConfigResource(ResourceType.TOPIC, topic)
        found = self.admin.describe_configs([resource], request_timeout=ASK_SECONDS)[resource].result()
        return str(found[name].value)

    def set(self, topic: str, name: str, value: str) -> None:
        """Change a setting of a topic and see it changed."""
        entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        self.admin.incremental_alter_configs([resource], request_timeout=ASK_SECONDS)[resource].result()
        wait_for(f"{topic} with {name}={value}", lambda: self.setting(topic, name) == value)

    def _whole(self, preferred: bool) -> bool:
        """Whether every replica of every partition is in sync (and led by its preferred node)."""
        metadata = self._ask(lambda: self.admin.list_topics(timeout=ASK_SECONDS))
        return metadata is not None and all(
            len(p.isrs) == len(p.replicas) and (p.leader == p.replicas[0] or not preferred)
            for topic in metadata.topics.values()
            for p in topic.partitions.values()
        )

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer, or None where the cluster does not give one now."""
        try:
            return question()
        except KafkaException:
            return None


def closed_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on and that no client is given for its own end."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chosen: list[int] = []
    while len(chosen) < count:
        port = random.randrange(min(15_000, ephemeral - 1_000), ephemeral)
        with socket.socket() as probe:
            if port not in chosen and probe.connect_ex(("127.0.0.1", port)) != 0:
                chosen.append(port)
    return chosen


def java_hash(text: str) -> int:
    """Java's `String.hashCode` of ASCII text without its sign: by it a group finds its place among the offsets."""
    value = 0
    for byte in text.encode("ascii"):
        value = (31 * value + byte) & 0xFFFFFFFF
    return min(value, (1 << 32) - value)
