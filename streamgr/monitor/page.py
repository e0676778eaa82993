"""The live page: one HTML file with its style and script inside, and the snapshot it draws.

    GET /            the page; asks nobody but this server for anything (Content-Security-Policy says so)
    GET /api/state   the snapshot as JSON
    GET /api/live    the same as server-sent events, one a second; where they do not get through, the page polls
    GET /livez       whether snapshots are still made

Read-only and without users' ids; it listens on loopback unless `monitor.host` says otherwise. A thread makes one
snapshot a second for everybody; watchers are bounded, and one too many is sent to polling.
"""

import base64
import json
import threading
from collections.abc import Callable
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import msgspec

from streamgr.clock import Clock
from streamgr.errors import ConfigError
from streamgr.telemetry import gauge

WATCHERS = gauge("monitor_watchers", "Pages that are fed live.")
MAX_WATCHERS = 32
SNAPSHOT_SECONDS = 1.0
STALL_SECONDS = 10.0
SOCKET_SECONDS = 20.0  # a reader that takes nothing for so long is let go


class Page:
    """The server and the thread that feeds it; `port` is the one listened on."""

    def __init__(self, host: str, port: int, clock: Clock, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Raises `ConfigError` where the address is taken. `snapshot` is called once a second, from one thread."""
        self._clock, self._snapshot = clock, snapshot
        self._news = threading.Condition()
        self._content, self._number, self._made = b"{}", 0, clock.monotonic()
        self._closing = threading.Event()
        self._watchers = 0
        self.failure: Exception | None = None  # of making a snapshot
        self._html, self._policy = assemble()
        try:
            self._server = _Server((host, port), self._handler())
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror or error}",
                where="monitor.port",
                remedy="choose a free port (STREAMGR_MONITOR__PORT), 0 for any",
            ) from None
        self.port = int(self._server.server_address[1])

    def start(self) -> None:
        self._make()
        for name, run in (("page", self._server.serve_forever), ("snapshots", self._feed)):
            threading.Thread(target=run, name=name, daemon=True).start()

    def close(self) -> None:
        """Tell the watchers, and stop listening."""
        self._closing.set()
        with self._news:
            self._news.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def _feed(self) -> None:
        try:
            while not self._closing.wait(SNAPSHOT_SECONDS):
                self._make()
        except Exception as error:
            self.failure = error

    def _make(self) -> None:
        content = msgspec.json.encode(self._snapshot())
        with self._news:
            self._content, self._number, self._made = content, self._number + 1, self._clock.monotonic()
            self._news.notify_all()

    def _next(self, after: int) -> tuple[int, bytes] | None:
        """The first snapshot after a number; None when the server closes."""
        with self._news:
            self._news.wait_for(lambda: self._number > after or self._closing.is_set(), STALL_SECONDS)
            return None if self._closing.is_set() else (self._number, self._content)

    def _enter(self) -> bool:
        with self._news:
            if self._watchers >= MAX_WATCHERS:
                return False
            self._watchers += 1
            WATCHERS.set(self._watchers)
            return True

    def _leave(self) -> None:
        with self._news:
            self._watchers -= 1
            WATCHERS.set(self._watchers)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        page = self

        class Handler(BaseHTTPRequestHandler):
            timeout = SOCKET_SECONDS
            server_version, sys_version = "streamgr", ""

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/":
                    self._answer(200, "text/html; charset=utf-8", page._html)
                elif path == "/api/state":
                    self._answer(200, "application/json", page._content)
                elif path == "/api/live":
                    self._live()
                elif path == "/livez":
                    stalled = page._clock.monotonic() - page._made
                    body = json.dumps({"live": stalled < STALL_SECONDS, "stalled_seconds": round(stalled, 1)}).encode()
                    self._answer(200 if stalled < STALL_SECONDS else 503, "application/json", body)
                else:
                    self._answer(404, "text/plain; charset=utf-8", b"/ /api/state /api/live /livez\n")

            def _live(self) -> None:
                if not page._enter():
                    self._answer(503, "text/plain; charset=utf-8", b"too many watchers: poll /api/state\n")
                    return
                try:
                    self._head(200, "text/event-stream")
                    self.end_headers()
                    after = 0
                    while (found := page._next(after)) is not None:
                        after, content = found
                        self.wfile.write(b"data: " + content + b"\n\n")
                        self.wfile.flush()
                except OSError:  # the watcher has gone
                    pass
                finally:
                    page._leave()
                    self.close_connection = True

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self._head(status, kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _head(self, status: int, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Cache-Control", "no-store")
                self.send_header("Content-Security-Policy", page._policy)
                self.send_header("X-Content-Type-Options", "nosniff")
                self.send_header("Referrer-Policy", "no-referrer")

            def log_message(self, format: str, *args: object) -> None:
                """Readers are not news."""

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that hung up is not news either."""


def assemble() -> tuple[bytes, str]:
    """The page as one file, and the policy that lets it use nothing but itself and this server."""
    parts = files("streamgr.monitor").joinpath("page")
    style, script, html = (parts.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html"))
    html = html.replace("/*style*/", style).replace("/*script*/", script)

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode() + "'"

    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src {digest(style)}; script-src {digest(script)}"
    )
    return html.encode(), policy
