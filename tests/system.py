"""The system as an operator runs it: roles as real processes, driven by the command line and Kafka alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from streamgr.kafka.embedded import DIE_WITH_PARENT

Json = dict[str, Any]
PARTITIONS = 4


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The condition's first true value; fails naming what did not come."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < end:
        if value := condition():
            return value
        pause.wait(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class System:
    """One installation under its own topic prefix and state directory."""

    def __init__(self, bootstrap: str, prefix: str, directory: Path, **keys: Any) -> None:
        self.bootstrap, self.prefix, self.directory = bootstrap, prefix, directory
        self.state = directory / "state"
        self.scorer_port = free_port()
        self._children: list[subprocess.Popen[bytes]] = []
        settings = {
            "kafka__bootstrap": bootstrap,
            "kafka__topic_prefix": prefix,
            "state__directory": str(self.state),
            "telemetry__port": 0,
            "telemetry__log_format": "text",
            "scorer__port": self.scorer_port,
            "model__dim": 16,
            "table__slots": 4096,
            "trainer__threads": 1,
            **keys,
        }
        variables = {f"STREAMGR_{k.upper()}": v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
        self._environment = {**os.environ, **variables}

    def run(self, *argv: str, code: int = 0, timeout: float = 120.0) -> str:
        """A one-shot command to its end; its stdout."""
        done = subprocess.run(
            [sys.executable, "-m", "streamgr", *argv],
            check=False,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == code, f"{argv}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def start(self, *argv: str) -> "subprocess.Popen[bytes]":
        """A role in the background; its log lies in the directory."""
        log = (self.directory / f"{argv[0]}-{len(self._children)}.log").open("wb")
        role = [sys.executable, "-m", "streamgr", *argv]
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *role],  # even a killed test run's
            env=self._environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.close()
        self._children.append(child)
        return child

    def logs(self) -> str:
        return "\n".join(f"== {f.name}\n{f.read_text()[-3000:]}" for f in sorted(self.directory.glob("*.log")))

    def close(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()

    def __enter__(self) -> "System":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- Kafka, without our own client ---

    def publish(self, rows: list[tuple[bytes | None, bytes | None, int | None]]) -> None:
        """(key, value, partition or None for the key's own)."""
        publish(self.bootstrap, f"{self.prefix}.events", rows)

    def read(self, topic: str) -> list[Any]:
        """Every record of a topic, as confluent_kafka messages, partition by partition in order."""
        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": "test", "enable.auto.commit": False})
        name = f"{self.prefix}.{topic}"
        try:
            partitions = list(consumer.list_topics(name, 10).topics[name].partitions)
            ends = {p: consumer.get_watermark_offsets(TopicPartition(name, p), 10)[1] for p in partitions}
            consumer.assign([TopicPartition(name, p, 0) for p in partitions])
            records: list[Any] = []
            at = dict.fromkeys(partitions, 0)
            while any(at[p] < ends[p] for p in partitions):
                for message in consumer.consume(1000, 1.0):
                    assert message.error() is None, message.error()
                    records.append(message)
                    at[message.partition()] = message.offset() + 1
            return sorted(records, key=lambda m: (m.partition(), m.offset()))
        finally:
            consumer.close()

    def count(self, topic: str) -> int:
        """How many records a topic has had."""
        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": "test"})
        name = f"{self.prefix}.{topic}"
        try:
            partitions = consumer.list_topics(name, 10).topics[name].partitions
            return sum(_end(consumer, TopicPartition(name, p)) for p in partitions)
        finally:
            consumer.close()

    # --- what an operator sees ---

    def exported(self) -> list[Json]:
        return [json.loads(line) for line in self.run("sequences", "export").split("\n") if line]

    def examples(self) -> Iterator[Json]:
        for line in self.run("examples", "list").split("\n"):  # a text may hold other line separators, unescaped
            if line:
                yield json.loads(line)

    def post(self, path: str, body: Json) -> tuple[int, Json]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.scorer_port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return self._answer(request)

    def get(self, path: str) -> tuple[int, Json]:
        return self._answer(urllib.request.Request(f"http://127.0.0.1:{self.scorer_port}{path}"))

    def _answer(self, request: urllib.request.Request) -> tuple[int, Json]:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"{}")
        except OSError:
            return 0, {}


def publish(bootstrap: str, topic: str, rows: list[tuple[bytes | None, bytes | None, int | None]]) -> None:
    """(key, value, partition or None for the key's own), all of them acknowledged."""
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "message.max.bytes": 2 << 20})
    for key, value, partition in rows:
        where = {} if partition is None else {"partition": partition}
        while True:
            try:
                producer.produce(topic, value, key, **where)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(30) == 0


def kill(child: "subprocess.Popen[bytes]") -> None:
    """SIGKILL, and gone."""
    assert child.poll() is None, "it had already left"
    child.send_signal(signal.SIGKILL)
    child.wait()


def _end(consumer: Consumer, partition: TopicPartition, seconds: float = 10.0) -> int:
    """Where a partition ends; of a topic just made, the leader may not know yet that it is."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return int(consumer.get_watermark_offsets(partition, 10)[1])
        except KafkaException as error:
            if error.args[0].code() != KafkaError.NOT_LEADER_FOR_PARTITION or time.monotonic() > deadline:
                raise
            time.sleep(0.2)
