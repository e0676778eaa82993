"""What a connection may cost: uvicorn's protocol, with bounds on how many there are and how long each may take.

uvicorn waits for a request's head without end, and its own `limit_concurrency` refuses everybody while idle connections
fill it: a few hundred clients that send a byte a minute would shut a scorer. Here a head must come, an exchange must
end, and where there are too many connections it is the newest that is told to come back.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from streamgr.telemetry import counter

HEAD_SECONDS = 10.0  # from the connection, or the last answer on it, to the end of a request's head
EXCHANGE_SECONDS = 60.0  # from there to the end of the answer, however slowly it is read
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b'Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{"error":"overload"}'
)

ENDED = counter("http_connections_ended", "Connections that the scorer ended itself, by why.", ("reason",))
for _reason in ("full", "slow_head", "slow_exchange"):
    ENDED.labels(_reason)  # 0 is a value too


class Connection(H11Protocol):
    """One client. `limit_concurrency` of uvicorn's settings is how many connections there may be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._most is not None and len(self.connections) > self._most:
            ENDED.labels("full").inc()
            transport.write(FULL)
            transport.close()
        else:
            self._within(HEAD_SECONDS, "slow_head")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._within(EXCHANGE_SECONDS, "slow_exchange")

    def on_response_complete(self) -> None:
        self._within(HEAD_SECONDS, "slow_head")
        super().on_response_complete()

    def _within(self, seconds: float, reason: str) -> None:
        """The next thing must have happened by then."""
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._too_slow, reason)

    def _too_slow(self, reason: str) -> None:
        if not self.transport.is_closing():
            ENDED.labels(reason).inc()
        self.transport.abort()
