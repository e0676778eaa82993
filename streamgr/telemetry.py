"""What a role tells its operator: JSON logs with stable event names, metrics, and the probes.

Metrics are declared in the file that moves them, through `counter`, `gauge` and `histogram`, so a name exists once.
Freshness histograms share `FRESHNESS_BUCKETS`; the service-level threshold must be a bucket's edge.
"""

import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from streamgr import __version__
from streamgr.clock import Clock
from streamgr.config import Telemetry
from streamgr.errors import ConfigError

FRESHNESS_BUCKETS = (0.25, 0.5, 1, 2, 3, 5, 8, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


def counter(name: str, help_: str, labels: tuple[str, ...] = ()) -> Counter:
    """A counter `streamgr_<name>_total`."""
    return Counter(f"streamgr_{name}", help_, labels)


def gauge(name: str, help_: str, labels: tuple[str, ...] = ()) -> Gauge:
    """A gauge `streamgr_<name>`."""
    return Gauge(f"streamgr_{name}", help_, labels)


def histogram(
    name: str, help_: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = FRESHNESS_BUCKETS
) -> Histogram:
    """A histogram `streamgr_<name>`."""
    return Histogram(f"streamgr_{name}", help_, labels, buckets=buckets)


BUILD = gauge("build_info", "Always 1; the labels tell what runs.", ("version", "role"))
LOG_LINES = counter("log_lines", "Log lines written.", ("level",))
for _level in ("info", "warning", "error"):
    LOG_LINES.labels(_level)  # 0 is a value too
READY = gauge("ready", "1 when the role does its work, 0 while it starts, restores or drains.", ("role",))
# Two that several roles move, and that a process with more than one of them may register only once.
WATERMARK = gauge(
    "watermark_timestamp_seconds", "Event time below which the log is complete, least of the partitions.", ("topic",)
)
HORIZON = gauge(
    "model_horizon_timestamp_seconds",
    "Append time of the newest source record that the weights fully reflect.",
    ("role",),
)
STATE_FREE = gauge("state_free_bytes", "What the disk under the role's state has left.")
STATE_CAPACITY = gauge("state_capacity_bytes", "What that disk holds in all; 0 where a role keeps no state.")


class Log:
    """One JSON object a line (or text at a terminal); `event` is a stable name a runbook can look for."""

    def __init__(self, role: str, settings: Telemetry, clock: Clock) -> None:
        self.role, self._clock, self._json = role, clock, settings.log_format == "json"
        self._threshold = logging.getLevelNamesMapping()[settings.log_level.upper()]
        self._lock = threading.Lock()

    def info(self, event: str, message: str = "", **facts: object) -> None:
        self._write("info", event, message, facts)

    def warning(self, event: str, message: str = "", **facts: object) -> None:
        self._write("warning", event, message, facts)

    def error(self, event: str, message: str = "", **facts: object) -> None:
        self._write("error", event, message, facts)

    def _write(self, level: str, event: str, message: str, facts: dict[str, object]) -> None:
        LOG_LINES.labels(level).inc()
        if logging.getLevelNamesMapping()[level.upper()] < self._threshold:
            return
        if self._json:
            head = {"ts": self._clock.now_ms(), "level": level, "role": self.role, "event": event, "msg": message}
            line = json.dumps(head | facts, default=str)
        else:
            tail = " ".join(f"{k}={v}" for k, v in facts.items())
            line = f"{level:7} {self.role} {event}: {message} {tail}".rstrip()
        with self._lock:
            print(line, file=sys.stderr, flush=True)


class Health:
    """The conditions of a role. Ready: it has named some, and every one holds. Live: its loop turned lately.

    A role whose loop has not begun is live, since it waits for its broker, which no restart would bring back.
    """

    STALL_SECONDS = 30.0

    def __init__(self, role: str, clock: Clock, *conditions: str) -> None:
        self._role, self._clock = role, clock
        self._conditions: dict[str, str] = dict.fromkeys(conditions, "starting")
        self._lock = threading.Lock()  # several threads of a role hold conditions, the probes' read them
        self._turned: float | None = None
        READY.labels(role).set(0)

    def turned(self) -> None:
        """The role's loop has turned once more."""
        self._turned = self._clock.monotonic()

    def hold(self, condition: str, why_not: str = "") -> None:
        """Set a condition: it holds when `why_not` is empty."""
        with self._lock:
            self._conditions[condition] = why_not
            READY.labels(self._role).set(0 if any(self._conditions.values()) else 1)

    def live(self) -> tuple[bool, dict[str, object]]:
        stalled = 0.0 if self._turned is None else self._clock.monotonic() - self._turned
        return stalled < self.STALL_SECONDS, {
            "live": stalled < self.STALL_SECONDS,
            "stalled_seconds": round(stalled, 1),
        }

    def ready(self) -> tuple[bool, dict[str, object]]:
        with self._lock:
            conditions = {k: v or "ok" for k, v in self._conditions.items()}
        if not conditions:  # a role is watched before it knows what it will wait for
            return False, {"started": "starting"}
        return all(v == "ok" for v in conditions.values()), dict(conditions)


class _Server(ThreadingHTTPServer):
    """A thread a connection, but never more than a few: who comes on top of them is not answered."""

    daemon_threads = True
    MOST = 32

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._places = threading.BoundedSemaphore(self.MOST)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that leaves in the middle is not news
            super().handle_error(request, client_address)


class Probes:
    """`/livez`, `/readyz` and `/metrics` on `telemetry.port`, from a daemon thread."""

    SECONDS = 5.0  # how long a client may take over a request

    def __init__(self, settings: Telemetry, health: Health) -> None:
        routes: dict[str, Callable[[], tuple[bool, dict[str, object]]]] = {
            "/livez": health.live,
            "/readyz": health.ready,
        }

        class Handler(BaseHTTPRequestHandler):
            timeout = self.SECONDS

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(REGISTRY))
                elif route := routes.get(self.path):
                    good, body = route()
                    self._answer(200 if good else 503, "application/json", json.dumps(body).encode())
                else:
                    self._answer(404, "text/plain", b"/livez /readyz /metrics\n")

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Probes are not news."""

        try:
            self._server = _Server((settings.host, settings.port), Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
                where="telemetry.port",
                remedy="choose a free port (STREAMGR_TELEMETRY__PORT), 0 for any",
            ) from None
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="probes", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def announce(role: str) -> None:
    """Export what runs here."""
    BUILD.labels(__version__, role).set(1)


def watch_disk(directory: Path) -> None:
    """Export how full the disk under `directory` is, asked at each scrape; the directory may still be missing."""

    def usage() -> tuple[int, int, int]:
        return shutil.disk_usage(next(path for path in (directory, *directory.absolute().parents) if path.exists()))

    STATE_FREE.set_function(lambda: usage()[2])
    STATE_CAPACITY.set_function(lambda: usage()[0])
