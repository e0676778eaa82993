"""Work for the roles while the cluster is in trouble: events that keep coming, and roles that are watched.

`Feed` publishes a stream at a steady pace from a thread of its own, waiting for every broker as long as it takes
(idempotent, all replicas, no message timeout), so that what lies in the topic is the stream, whole and once, whatever
happened to the nodes. `Crew` holds the roles' processes and asks each of them twice a second whether it is live.
"""

import json
import re
import subprocess
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from streamgr.clock import Deadline, SystemClock
from tests.cluster.cluster import Cluster
from tests.e2e.test_stream import assert_equal, expected
from tests.oracle import Oracle
from tests.streams import Json, Row, events, heartbeats, row, rubbish
from tests.system import PARTITIONS, System, free_port, kill, wait_for

DELIVERED_SECONDS = 180.0
DONE_SECONDS = 180.0
START_SECONDS = 60.0
READY_SECONDS = 90.0
LEAVE_SECONDS = 30.0
STREAM_END_MS = 120_000  # past every event of `stream`
T = TypeVar("T")
Bad = dict[Row, str]  # the rubbish among the rows, and why it is rubbish
RETRIED = re.compile(r"kafka_error: .*(Connect to|imed out|brokers are down)")
CRASH = re.compile(r"stopped_by_error|Traceback|Fatal|Assertion|stopped_waiting")


def stream(seed: int, n: int, now_ms: int) -> tuple[list[Row], Bad]:
    """A disorderly stream with rubbish strewn in; heartbeats at its end close every label."""
    rows = [row(event) for event in events(seed, n, users=60)]
    bad = rubbish(now_ms)
    for place, (_, record) in enumerate(bad):
        rows.insert((place + 1) * len(rows) // (len(bad) + 1), record)
    return rows + heartbeats(STREAM_END_MS, PARTITIONS), {record: reason for reason, record in bad}


class OnCluster(System):
    """An installation on a cluster whose leaders have just moved: what is asked of it is asked again if need be."""

    def apply(self) -> None:
        """Create the topics, in more than one attempt if need be: `test_topics` sees to it that one is enough."""
        self._in_the_end(lambda: self.run("topics", "apply"), AssertionError)

    def read(self, topic: str) -> list[Any]:
        return self._in_the_end(lambda: super(OnCluster, self).read(topic))

    @staticmethod
    def _in_the_end(question: Callable[[], T], passing: type[Exception] = KafkaException) -> T:
        answers: list[T] = []

        def answered() -> bool:
            try:
                answers.append(question())
            except passing:
                return False
            return True

        wait_for("the cluster to answer", answered)
        return answers[0]


class Feed:
    """Publishes what it is given, `rate` rows a second until `finish`; use as a context."""

    def __init__(self, system: System, rate: float) -> None:
        self._topic, self._pause = f"{system.prefix}.events", 1 / rate
        self.rows: list[Row] = []
        self.confirmed = 0
        self._refused: list[KafkaError] = []
        self._hurry, self._stop = threading.Event(), threading.Event()
        self._producer = Producer(
            {
                "bootstrap.servers": system.bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                "message.timeout.ms": 0,
                "partitioner": "murmur2_random",
                "message.max.bytes": 2 << 20,
                "log_level": 0,
            }
        )
        self._thread = threading.Thread(target=self._run, name="feed")

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._hurry.set()
        self._thread.join()
        self._producer.purge()
        self._producer.flush(1)

    def publish(self, rows: list[Row]) -> None:
        """These next; returns at once."""
        self.rows += rows

    def await_part(self, part: float) -> None:
        """Until this part (0 to 1) of what was given is confirmed by the cluster."""
        what = f"{part:.0%} of the stream to be published"
        wait_for(what, lambda: self.confirmed >= part * len(self.rows), DELIVERED_SECONDS)

    def await_more(self, count: int) -> None:
        """Until so many more rows are confirmed."""
        goal = min(self.confirmed + count, len(self.rows))
        wait_for(f"{count} more rows to be published", lambda: self.confirmed >= goal, DELIVERED_SECONDS)

    def finish(self) -> None:
        """Publish the rest at once, and see all of it confirmed."""
        self._hurry.set()
        self.await_part(1)
        assert not self._refused, self._refused

    def _run(self) -> None:
        sent = 0
        while not self._stop.is_set():
            if sent == len(self.rows):
                self._producer.poll(0.05)
                continue
            key, value, partition = self.rows[sent]
            where = -1 if partition is None else partition
            try:
                self._producer.produce(self._topic, value, key, where, self._delivered)
            except BufferError:
                self._producer.poll(0.1)
                continue
            sent += 1
            self._producer.poll(0)
            self._hurry.wait(self._pause)

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self.confirmed += 1
        else:
            self._refused.append(error)


@dataclass
class Role:
    """A role's process, where it answers, and what it has answered but 200."""

    name: str
    port: int
    process: "subprocess.Popen[bytes]"
    log: str
    not_live: list[int] = field(default_factory=list)
    asked: int = 0
    watched: bool = False  # from its first answer on
    killed: bool = False


class Crew:
    """The roles of one system, watched; use as a context."""

    def __init__(self, system: System, cluster: Cluster) -> None:
        self._system, self._cluster = system, cluster
        self._group = f"{system.prefix}-sequencer"
        self.roles: list[Role] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch")

    def __enter__(self) -> "Crew":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._system.close()

    def start(self, *names: str) -> list[Role]:
        """Start these roles, each with a port of its own for its probes."""
        started = []
        for name in names:
            port = free_port()
            process = self._system.start(name, "--set", f"telemetry.port={port}")
            role = Role(name, port, process, f"{name}-{len(self.roles)}.log")
            self.roles.append(role)
            wait_for(f"{role.log} to answer", partial(self._answers, role), START_SECONDS)
            role.watched = True
            started.append(role)
        return started

    def await_ready(self) -> None:
        """Until every role is ready: a sequencer has partitions, a scorer has weights and all events."""
        waiting = [role for role in self.roles if not role.killed]

        def unready() -> list[str]:
            self.assert_alive()
            return [role.log for role in waiting if status(role, "/readyz") != 200]

        wait_for("every role to be ready", lambda: not unready(), READY_SECONDS)

    def live_through(self, seconds: float) -> None:
        """A trouble lasts; meanwhile every role lives."""
        deadline, pause = Deadline(SystemClock(), seconds), threading.Event()
        while not deadline.passed():
            self.assert_alive()
            pause.wait(0.5)

    def kill(self, role: Role) -> None:
        """SIGKILL, and gone."""
        role.killed = True
        kill(role.process)

    def await_done(self) -> None:
        """Until the group is at the end of the events, as lag tools see it."""

        def behind() -> str:
            self.assert_alive()
            return self._behind()

        try:
            wait_for("the sequencers to reach the end", lambda: behind() == "", DONE_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}; {behind()}\n{self._system.logs()}") from None

    def assert_alive(self) -> None:
        """No role left, and each was live whenever it was asked."""
        for role in self.roles:
            if not role.killed:
                assert role.process.poll() is None, f"{role.log}: exit {role.process.returncode}\n{self.said(role)}"
                assert not role.not_live, f"{role.log}: {role.not_live} of {role.asked}\n{self.said(role)}"

    def leave(self) -> None:
        """SIGTERM to all: they drain and exit 0."""
        self.assert_alive()
        self._over.set()
        self._thread.join()
        for role in self.roles:
            if not role.killed:
                role.process.terminate()
        for role in self.roles:
            if not role.killed:
                assert role.process.wait(LEAVE_SECONDS) == 0, f"{role.log}\n{self.said(role)}"

    def said(self, role: Role) -> str:
        """All it has logged."""
        return (self._system.directory / role.log).read_text()

    def assert_retried(self) -> None:
        """Some role has logged that a broker was away, and that is all it did about it."""
        assert any(RETRIED.search(self.said(role)) for role in self.roles), "nobody noticed: the test tests nothing"

    def _answers(self, role: Role) -> bool:
        self.assert_alive()
        return status(role, "/livez") == 200

    def _behind(self) -> str:
        """Where the group has not confirmed the end; empty where it has everywhere."""
        topic = f"{self._system.prefix}.events"
        positions, ends = self._cluster.committed(topic, self._group), self._cluster.ends(topic)
        return ", ".join(f"[{p}] {positions.get(p)} of {end}" for p, end in ends.items() if positions.get(p) != end)

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            for role in [r for r in self.roles if r.watched and not r.killed]:
                code = status(role, "/livez")
                role.asked += 1
                if code != 200 and not role.killed and not self._over.is_set():
                    role.not_live.append(code)


def status(role: Role, path: str) -> int:
    """What it answers; 0 where nobody does."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{role.port}{path}", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)
    except OSError:
        return 0


def assert_exact(system: System, crew: Crew, feed: Feed, bad: Bad) -> None:
    """The input is whole, what came of it is the oracle's, each once, rubbish is named, and nobody crashed."""
    published = {(m.partition(), m.offset()): m for m in system.read("events")}
    lying = Counter((m.key(), m.value()) for m in published.values())
    assert lying == Counter((key, value) for key, value, _ in feed.rows), "the input itself is not whole"
    letters = letters_of(system)
    reasons = {at: (m.key(), m.value()) for at, m in published.items() if at in letters}
    named = {reasons[at]: reason for at, reason in letters.items()}
    assert named == {(key, value): reason for (key, value, _), reason in bad.items()}
    oracles: list[Oracle] = expected(system, set(letters))
    assert sum(len(o.targets) for o in oracles) > len(feed.rows) // 4
    assert_equal(system, oracles)
    for role in crew.roles:
        assert not (found := CRASH.search(crew.said(role))), f"{role.log}: {found}\n{crew.said(role)}"


def letters_of(system: System) -> dict[tuple[int, int], str]:
    """Reason by source position; after a retry a letter may lie there again and must say the same."""
    letters: dict[tuple[int, int], str] = {}
    for letter in system.read("dead-letters"):
        headers = {key: value.decode() for key, value in letter.headers()}
        source = (int(headers["partition"]), int(headers["offset"]))
        assert letters.setdefault(source, headers["reason"]) == headers["reason"]
    return letters


def learned(system: System) -> int:
    """Targets in the newest version of the weights."""
    versions: list[Json] = [json.loads(line) for line in system.run("weights", "list").splitlines()]
    return int(max(versions, key=lambda v: v["version"])["targets_learned"]) if versions else 0
