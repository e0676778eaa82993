"""What the benchmarks share: a broker of their own, published traffic, processes with their CPU time, a report."""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import confluent_kafka
from confluent_kafka import Producer

from streamgr.config import Kafka
from streamgr.events import heartbeat
from streamgr.kafka import topics
from streamgr.kafka.embedded import EmbeddedBroker
from tests.bench.traffic import Traffic

Json = dict[str, Any]
PARTITIONS = 4
REPORTS = Path("reports")


@contextmanager
def broker() -> Iterator[tuple[str, Path]]:
    """(bootstrap address, a directory for state), both gone afterwards. Needs KAFKA_HOME, or KAFKA_BOOTSTRAP."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        if address := os.environ.get("KAFKA_BOOTSTRAP"):
            yield address, Path(name)
            return
        if not os.environ.get("KAFKA_HOME"):
            sys.exit("a benchmark of the mock broker would say nothing: set KAFKA_HOME (or KAFKA_BOOTSTRAP)")
        with EmbeddedBroker.start(Path(name) / "kafka") as embedded:
            yield embedded.bootstrap, Path(name)


def publish(bootstrap: str, prefix: str, traffic: Traffic, *, close: bool = True) -> float:
    """Create the topics and publish the traffic, with heartbeats that close every label; the mean bytes of a value."""
    topics.ensure(Kafka(bootstrap=bootstrap, topic_prefix=prefix))
    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "partitioner": "murmur2_random",
            "linger.ms": 20,
            "compression.type": "lz4",
            "enable.idempotence": True,
            "queue.buffering.max.messages": 200_000,
        }
    )
    topic, size = f"{prefix}.events", 0
    for key, value in traffic:
        size += len(value)
        while True:
            try:
                producer.produce(topic, value, key)
                break
            except BufferError:
                producer.poll(0.05)
        producer.poll(0)
    if close:
        for partition in range(PARTITIONS):
            producer.produce(topic, heartbeat(traffic.end_ms + 661_000), partition=partition)
    producer.flush()
    return size / traffic.events


@dataclass(frozen=True, slots=True)
class Run:
    """A process that has ended: wall and CPU seconds (its own and its threads'), peak memory, its log lines."""

    wall: float
    cpu: float
    peak_bytes: int
    log: list[Json]

    def between(self, first: str, last: str) -> float:
        """Seconds from one event of its log to another."""
        at = {line["event"]: line["ts"] for line in self.log}
        return float(at[last] - at[first]) / 1000


def run(*argv: str, environ: dict[str, str]) -> Run:
    """Run `python -m ARGV` to its end and account for it; fails aloud."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", *argv], env={**os.environ, **environ}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert child.stderr is not None
    peak, ended = [0], threading.Event()
    watch = threading.Thread(target=_watch_memory, args=(child.pid, peak, ended))
    watch.start()
    told = child.stderr.read().decode()
    ended.set()
    watch.join()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(argv)} exited {child.returncode}:\n{told[-3000:]}")
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak[0], lines)


def _watch_memory(pid: int, peak: list[int], ended: threading.Event) -> None:
    """The process's own high-water mark: getrusage's also counts what this process had when it forked."""
    while not ended.wait(0.1):
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            peak[0] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def settings(bootstrap: str, prefix: str, state: Path, **keys: object) -> dict[str, str]:
    """Variables for a role; keys as section__key."""
    given = {"kafka__bootstrap": bootstrap, "kafka__topic_prefix": prefix, "state__directory": str(state), **keys}
    values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in {"telemetry__port": 0, **given}.items()}
    return {f"STREAMGR_{key.upper()}": value for key, value in values.items()}


def disk_bytes(directory: Path) -> int:
    """What the files below a directory take."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def machine() -> Json:
    """Where the figures come from."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "confluent_kafka": confluent_kafka.version(),
        "rocksdict": version("rocksdict"),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def report(name: str, what: Json) -> None:
    """Print the figures as one JSON object and keep them in reports/."""
    REPORTS.mkdir(exist_ok=True)
    text = json.dumps(what, indent=1)
    (REPORTS / f"{name}.json").write_text(text + "\n")
    print(text)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "?")
