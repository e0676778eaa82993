"""The contract over HTTP: what is asked, refused, and answered, and nothing about how.

Everything that takes time runs in a small pool behind a bounded line; who finds the line full is told so at once
(503, `Retry-After`), which under overload is worth more than an answer nobody waits for any more. A body is read up
to its limit and no further, whatever its headers say. No failure shows its insides: the log has them.
"""

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import REGISTRY
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect

from streamgr import __version__
from streamgr.clock import Clock
from streamgr.events import MAX_ID
from streamgr.serve import docs, wire
from streamgr.serve.door import Door
from streamgr.serve.model import NoWeights
from streamgr.telemetry import DURATION_BUCKETS, Health, Log, counter, histogram

OUTCOMES = (
    *("ok", "invalid", "unauthorized", "too_large", "no_weights", "not_ready", "overload", "slow_body"),
    *("disconnected", "error"),
)
SCORES = counter("scores", "Requests to rank or retrieve, by what came of them.", ("outcome",))
for _outcome in OUTCOMES:
    SCORES.labels(_outcome)  # an alert needs the zero before the first one
DURATION = histogram(
    "score_duration_seconds", "From the request's head to its answer; answered ones only.", (), DURATION_BUCKETS
)

BODY_SECONDS = 10.0  # how long a body may take to arrive
DISCARD_BYTES = 16 << 20  # how much of a too large body is read away, so that its sender gets to see the 413
STALE_SECONDS = 60.0  # the SLI's threshold: beyond it an answer says so in a header

_Ask = TypeVar("_Ask")
_encode = msgspec.json.Encoder().encode


class NotReady(Exception):
    """The sequences are not open yet."""


class Refusal(Exception):
    """An answer that is no answer: status, outcome (the label of `scores_total`), body and headers."""

    def __init__(self, status: int, outcome: str, body: wire.Refused, retry: bool = False) -> None:
        super().__init__(outcome)
        self.status, self.outcome, self.body = status, outcome, body
        self.headers = {"Retry-After": "1"} if retry else {}

    def response(self) -> Response:
        return Response(_encode(self.body), self.status, self.headers, "application/json")


class Desk:
    """A bounded line before the pool: `threads` at work and `max_queue` waiting, no more. One event loop's."""

    def __init__(self, pool: Executor, threads: int, max_queue: int) -> None:
        self._pool, self._limit, self._inside = pool, threads + max_queue, 0

    async def run(self, work: Callable[[], _Ask]) -> _Ask:
        """Raises `Refusal` (overload) when the line is full."""
        if self._inside >= self._limit:
            raise Refusal(503, "overload", wire.Refused("overload"), retry=True)
        self._inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._inside -= 1


def create_app(
    *,
    rank: Callable[[wire.RankRequest], wire.Answer],
    retrieve: Callable[[wire.RetrieveRequest], wire.Answer],
    sequence: Callable[[str, wire.SequencePart], dict[str, Any]],
    desk: Desk,
    health: Health,
    clock: Clock,
    log: Log,
    token: str = "",
    documented: bool = True,
) -> FastAPI:
    """The application. `rank`, `retrieve` and `sequence` run in the desk's pool.

    token: what everything but the probes asks for, "" for nothing. documented: with `/docs` and `/openapi.json`.
    """
    app = FastAPI(
        title="streamgr scorer",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if documented else None,
    )
    if token:
        app.add_middleware(Door, token=token, refused=lambda: SCORES.labels("unauthorized").inc())

    async def answered(work: Callable[[], Any]) -> Any:
        """The result of `work`, run by the desk; everything that can go wrong becomes a `Refusal`."""
        try:
            return await desk.run(work)
        except NoWeights:
            raise Refusal(503, "no_weights", wire.Refused("no_weights"), retry=True) from None
        except NotReady:
            raise Refusal(503, "not_ready", wire.Refused("not_ready"), retry=True) from None
        except wire.InvalidRequest as error:
            raise _invalid(error) from None
        except Refusal:
            raise
        except Exception as error:  # the boundary: whatever it is, the caller gets no insides and the operator all
            log.error("request_failed", repr(error), stack=traceback.format_exc())
            raise Refusal(500, "error", wire.Refused("internal_error")) from error

    async def score(request: Request, decode: Callable[[bytes], _Ask], work: Callable[[_Ask], wire.Answer]) -> Response:
        started = clock.monotonic()
        try:
            ask = _decoded(decode, await _body(request))
            answer: wire.Answer = await answered(partial(work, ask))
        except Refusal as refusal:
            SCORES.labels(refusal.outcome).inc()
            return refusal.response()
        SCORES.labels("ok").inc()
        DURATION.observe(clock.monotonic() - started)
        stale = answer.model_age_seconds > STALE_SECONDS
        headers = {"X-Streamgr-Stale": f"{answer.model_age_seconds:.0f}"} if stale else None
        return Response(_encode(answer), 200, headers, "application/json")

    @app.post("/v1/rank", **_described(wire.RankRequest))
    async def rank_candidates(request: Request) -> Response:
        """Put candidates in order for a user: best first, with each task's probability."""
        return await score(request, wire.rank_request, rank)

    @app.post("/v1/retrieve", **_described(wire.RetrieveRequest))
    async def retrieve_items(request: Request) -> Response:
        """The best of all live items for a user, by similarity."""
        return await score(request, wire.retrieve_request, retrieve)

    @app.get("/v1/users/{user_id:path}/sequence")
    async def user_sequence(user_id: str, request: Request) -> Response:
        """The events of a user, in sequence order: all, or `since` and `before` a time (ms), or the `last` so many."""
        if not 1 <= len(user_id) <= MAX_ID:
            return _invalid(wire.InvalidRequest("user_id", f"1 to {MAX_ID} characters")).response()
        try:
            part = wire.sequence_part(request.query_params)
            return Response(_encode(await answered(partial(sequence, user_id, part))), media_type="application/json")
        except wire.InvalidRequest as error:
            return _invalid(error).response()
        except Refusal as refusal:
            return refusal.response()

    @app.get("/livez")
    async def livez() -> Response:
        """Whether the scorer's loops turn."""
        return _probe(*health.live())

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether it can answer; the body names every condition."""
        return _probe(*health.ready())

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    if documented:

        @app.get("/docs", include_in_schema=False)
        async def documentation() -> Response:
            return HTMLResponse(docs.page(app.openapi()))

        document = app.openapi()  # built once here, and kept by FastAPI: our structs join its components
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(wire.schemas())
        if token:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]
    return app


def _described(ask: type) -> dict[str, Any]:
    """What the OpenAPI document says of a request and its answers."""

    def refused(text: str) -> dict[str, Any]:
        return {"description": text, "content": _content("Refused")}

    return {
        "responses": {
            200: {"description": "the answer", "content": _content("Answer")},
            401: refused("no token, or the wrong one, where the scorer wants one"),
            413: refused("more than 1 MiB, or than 4,096 candidates"),
            422: refused("the field that breaks the contract"),
            503: refused("`no_weights` before the first version, `not_ready`, `overload`; with Retry-After"),
        },
        "openapi_extra": {"requestBody": {"required": True, "content": _content(ask.__name__)}},
    }


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


async def _body(request: Request) -> bytes:
    """The body, of at most `MAX_BODY_BYTES`; raises `Refusal`."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= wire.MAX_BODY_BYTES:
                    body += chunk
                elif size > DISCARD_BYTES:
                    break
    except TimeoutError:
        raise Refusal(408, "slow_body", wire.Refused("slow_body")) from None
    except ClientDisconnect:
        raise Refusal(400, "disconnected", wire.Refused("disconnected")) from None
    if size > wire.MAX_BODY_BYTES:
        raise _too_large(f"the body may have {wire.MAX_BODY_BYTES} bytes")
    return bytes(body)


def _decoded(decode: Callable[[bytes], _Ask], body: bytes) -> _Ask:
    try:
        return decode(body)
    except wire.InvalidRequest as error:
        raise _invalid(error) from None
    except wire.TooManyCandidates as error:
        raise _too_large(f"{error} candidates, at most {wire.MAX_CANDIDATES}", "candidates") from None


def _invalid(error: wire.InvalidRequest) -> Refusal:
    return Refusal(422, "invalid", wire.Refused("invalid", error.field or msgspec.UNSET, error.detail))


def _too_large(detail: str, field: str | msgspec.UnsetType = msgspec.UNSET) -> Refusal:
    return Refusal(413, "too_large", wire.Refused("too_large", field, detail))


def _probe(good: bool, body: dict[str, object]) -> Response:
    return Response(_encode(body), 200 if good else 503, media_type="application/json")
