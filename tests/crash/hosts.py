"""A storm's cast: a broker that can be killed and goes on with its directory, hosts with a disk each, and workers.

`SETTINGS` is what the workers run under: windows of seconds, and limits so small that everything happens often.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgr.errors import BrokerUnreachable
from streamgr.kafka.embedded import EmbeddedBroker
from tests.system import System

STARTS = 3  # how often a broker is started before that is an error: meanwhile somebody may hold its port
# From its second start on: how long the controller takes a killed broker for living, and does not let its heir in.
LEASE = "broker.session.timeout.ms=2000\nbroker.heartbeat.interval.ms=500\n"
COMMAND_SECONDS = 300.0
DRAIN_SECONDS = 10.0
ACTIONS = ("click", "like")
WINDOW_MS, LATENESS_MS, STEP_MS = 2_000, 1_000, 200
CLOSING_MS = WINDOW_MS + LATENESS_MS + STEP_MS
MAX_FUTURE_MS = 60_000
SETTINGS = {
    "sequence__attribution_window_seconds": WINDOW_MS / 1000,
    "sequence__lateness_seconds": LATENESS_MS / 1000,
    "sequence__close_step_seconds": STEP_MS / 1000,
    "sequence__max_future_seconds": MAX_FUTURE_MS / 1000,
    "sequence__commit_interval_seconds": 0.1,
    "sequence__drain_seconds": DRAIN_SECONDS,
    "sequence__history_length": 32,
    "sequence__cached_events": 2_000,  # tails are read back from the store
    "state__sync_seconds": 0.3,
    "state__snapshot_seconds": 1.5,
    "state__write_buffer_bytes": 1 << 20,
    "state__cache_bytes": 8 << 20,
}


class Broker:
    """A real Kafka of our own. Starts in the main thread, as it dies with the thread that started it."""

    def __init__(self, directory: Path, home: Path) -> None:
        self._directory, self._home = directory, home
        self._embedded = EmbeddedBroker.start_kafka(directory, home)
        self.bootstrap = self._embedded.bootstrap
        with (directory / "server.properties").open("a") as properties:
            properties.write(LEASE)

    def kill(self) -> None:
        """SIGKILL, and gone."""
        os.killpg(self._process_group(), signal.SIGKILL)
        self._embedded.close()

    def restart(self) -> None:
        """On the same directory, at the same ports."""
        for attempt in range(STARTS):
            try:
                self._embedded = EmbeddedBroker.start_kafka(self._directory, self._home)
                return
            except BrokerUnreachable:
                if attempt + 1 == STARTS:
                    raise

    def close(self) -> None:
        self._embedded.close()

    def __enter__(self) -> "Broker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _process_group(self) -> int:
        """It leads its own, is a child of ours, and names its settings."""
        mine, settings = str(os.getpid()), str(self._directory / "server.properties").encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == mine and settings in (process / "cmdline").read_bytes():
                    return int(process.name)
            except OSError:  # it has just left
                continue
        raise AssertionError("the broker is not running")


class Host(System):
    """One host: a disk of its own, under a state directory. Everything that runs on it dies with this process."""

    module = "tests.crash.worker"

    def __init__(self, bootstrap: str, prefix: str, directory: Path, worker: Sequence[str] = (), **keys: Any) -> None:
        """worker: options of the module for all that runs here."""
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(bootstrap, prefix, directory, telemetry__log_format="json", **keys)
        self._command = [sys.executable, "-m", self.module, "--parent", str(os.getpid()), *worker]

    def launch(self, log: Path, *options: str, role: Sequence[str] = ("sequencer",)) -> "subprocess.Popen[bytes]":
        """A role in the background. From the main thread only: it dies with the thread that started it."""
        command = [*self._command, *options, *role]
        with log.open("wb") as out:
            child = subprocess.Popen(command, env=self._environment, stdout=out, stderr=subprocess.STDOUT)
        self._children.append(child)
        return child

    def command(self, *argv: str) -> tuple[str, str]:
        """A one-shot command to its end, which must be good: its stdout and stderr."""
        done = subprocess.run(
            [*self._command, *argv],
            check=False,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        told = f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, f"{' '.join(argv)} in {self.directory}: exit {done.returncode}\n{told}"
        return done.stdout, done.stderr

    def close(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()  # a stopped one, too
            child.wait()

    def wipe(self) -> None:
        """The disk is lost."""
        shutil.rmtree(self.state, ignore_errors=True)


def opened_from(line: dict[str, Any]) -> dict[int, str]:
    """The partitions whose opening a log line tells of, and what each was opened from."""
    if line["event"] == "partition_opened":
        return {line["partition"]: line["opened_from"]}
    return {int(p): source for p, source in line.get("opened_from", {}).items()}


@dataclass
class Worker:
    """One worker through all its lives. Times are monotonic seconds."""

    name: str
    host: Host
    lives: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    point: str = ""  # where this life is to end by itself
    began: float = 0.0
    killed: bool = False
    told: float | None = None  # when it was told to leave
    due: float = 0.0  # when its next life begins

    @property
    def log(self) -> Path:
        return self.host.directory / f"{self.name}-{self.lives:03}.log"

    @property
    def grave(self) -> Path:
        """The file in which it leaves the name of the point that it died at."""
        return self.log.with_suffix(".point")

    def start(self, *options: str, point: str = "", passages: int = 1) -> None:
        self.lives += 1
        self.point, self.began, self.killed, self.told = point, time.monotonic(), False, None
        wish = ("--die-at", f"{point}:{passages}", "--told", str(self.grave)) if point else ()
        self.process = self.host.launch(self.log, *options, *wish)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def listens(self) -> bool:
        """Whether a SIGTERM would reach its handler."""
        return self.alive and self.told is None and any(line["event"] == "starting" for line in self.lines())

    @property
    def opened(self) -> set[int]:
        """The partitions that it has said it opened and not that it closed."""
        found = set[int]()
        for line in self.lines():
            found |= set(opened_from(line))
            found -= set(line["removed"] if line["event"] == "partitions_closed" else ())
        return found

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged in this life."""
        if not self.log.exists():
            return []
        return [json.loads(t) for t in self.log.read_text().splitlines() if t.startswith("{") and t.endswith("}")]

    def last_words(self) -> str:
        return self.log.read_text()[-2_000:] if self.log.exists() else ""


def tell(result: dict[str, Any], directory: Path, *, keep: bool) -> int:
    """Print a verdict; the exit status, 0 if all was exact. What was not exact stays, as does what is to be kept."""
    print(json.dumps(result), flush=True)
    if not result["exact"]:
        print(f"everything is still in {directory}", file=sys.stderr)
    elif not keep:
        shutil.rmtree(directory, ignore_errors=True)
    return 0 if result["exact"] else 1
