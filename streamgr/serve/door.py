"""Who may ask: everything but the probes wants the token, where there is one.

`/livez` and `/readyz` stay open, since load balancers send no secrets; their bodies name conditions, never users. The
scorer's own `/metrics` is behind the token: this port is for applications, `telemetry.port` is the operators'.
"""

import hmac
from collections.abc import Callable
from hashlib import sha256

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from streamgr.serve import wire

OPEN = frozenset(("/livez", "/readyz"))


class Door:
    """ASGI in front of an application: 401 without `Authorization: Bearer <token>`."""

    def __init__(self, app: ASGIApp, token: str, refused: Callable[[], None]) -> None:
        self._app, self._refused = app, refused
        self._wanted = sha256(token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or self._admits(scope):
            return await self._app(scope, receive, send)
        self._refused()
        body = msgspec.json.encode(wire.Refused("unauthorized"))
        headers = {"WWW-Authenticate": 'Bearer realm="streamgr"'}
        return await Response(body, 401, headers, "application/json")(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        """In the same time for every wrong token: digests are compared, so not even its length shows."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and hmac.compare_digest(sha256(token.strip()).digest(), self._wanted)
