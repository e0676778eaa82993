"""The HTTP contract's requests and answers: one definition decodes, refuses and documents them.

msgspec reads a body straight into these structs and names the field that breaks a rule; the same structs give the
OpenAPI schemas. Unknown fields are ignored, as in events; null is absent.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from streamgr.decoder import parse_time
from streamgr.events import INT64_MAX, INT64_MIN, MAX_ID

MAX_CANDIDATES = 4_096
MAX_BODY_BYTES = 1 << 20

Id = (
    Annotated[str, Meta(min_length=1, max_length=MAX_ID, description="code points")]
    | Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX, description="taken as its decimal text")]
)
At = (
    Annotated[int, Meta(ge=0, le=INT64_MAX, description="milliseconds since 1970 UTC")]
    | Annotated[str, Meta(description="RFC 3339 with an offset")]
)


class RankRequest(Struct, frozen=True, gc=False):
    """Candidates to put in order for a user. `at` hides every event from that time on; default: now."""

    user_id: Id
    candidates: Annotated[list[Id], Meta(min_length=1, description=f"at most {MAX_CANDIDATES}; more: 413")]
    tasks: Annotated[list[str], Meta(min_length=1, description="default: every action kind")] | None = None
    k: Annotated[int, Meta(ge=1, description="answer only the best k")] | None = None
    at: At | None = None


class RetrieveRequest(Struct, frozen=True, gc=False):
    """The best live items for a user. `exclude_seen` leaves out the items of the user's latest events."""

    user_id: Id
    k: Annotated[int, Meta(ge=1, le=MAX_CANDIDATES)] | None = None
    exclude_seen: bool | None = None
    at: At | None = None


class SequencePart(Struct, frozen=True, gc=False):
    """Which part of a sequence is wanted: since <= event time < before (ms), and of that the newest `last`."""

    since: Annotated[int, Meta(ge=0)] = 0
    before: Annotated[int, Meta(ge=0)] | None = None
    last: Annotated[int, Meta(ge=0)] = 0


class Item(Struct, frozen=True, gc=False):
    """One answered item. `probabilities`: by task, ranking only."""

    item_id: str
    score: float
    probabilities: dict[str, float] | UnsetType = UNSET


class Answer(Struct, frozen=True, gc=False):
    """Best first; and how fresh and how informed the answer is."""

    items: list[Item]
    weights_version: int
    model_age_seconds: Annotated[float, Meta(description="now - horizon of the weights")]
    sequence_length: Annotated[int, Meta(description="events of the history that was used")]
    cold: Annotated[bool, Meta(description="nothing is known of the user before `at`")]


class Refused(Struct, frozen=True, gc=False):
    """Why there is no answer; 422 names the field."""

    error: str
    field: str | UnsetType = UNSET
    detail: str | UnsetType = UNSET


class InvalidRequest(ValueError):
    """A request breaks the contract: the `field` ("" for the body as a whole) and what is wrong with it."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field, self.detail = field, detail


class TooManyCandidates(ValueError):
    """More candidates than one request may carry."""


_Request = TypeVar("_Request", RankRequest, RetrieveRequest)
_rank = msgspec.json.Decoder(RankRequest)
_retrieve = msgspec.json.Decoder(RetrieveRequest)
_PATH = re.compile(r"^(?P<what>.*) - at `(?P<field>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]+)`$")


def rank_request(body: bytes) -> RankRequest:
    """Raises `InvalidRequest` or `TooManyCandidates`."""
    ask = _decode(_rank, body)
    if len(ask.candidates) > MAX_CANDIDATES:
        raise TooManyCandidates(len(ask.candidates))
    return ask


def retrieve_request(body: bytes) -> RetrieveRequest:
    """Raises `InvalidRequest`."""
    return _decode(_retrieve, body)


def sequence_part(query: Mapping[str, str]) -> SequencePart:
    """Read from a query string. Raises `InvalidRequest`."""
    try:
        return msgspec.convert(dict(query), SequencePart, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None


def at_ms(at: int | str) -> int:
    """An `at` as milliseconds since 1970 UTC, fractions cut; raises `InvalidRequest`."""
    ms = parse_time(at) if isinstance(at, str) else at
    if ms is None:
        raise InvalidRequest("at", "expected milliseconds since 1970 UTC, or RFC 3339 text with an offset")
    return ms


def schemas() -> dict[str, Any]:
    """The OpenAPI component schemas of everything above."""
    _, components = msgspec.json.schema_components(
        [RankRequest, RetrieveRequest, Answer, Refused], ref_template="#/components/schemas/{name}"
    )
    return components


def _decode(decoder: msgspec.json.Decoder[_Request], body: bytes) -> _Request:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("", f"not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("", "not valid JSON: nested too deeply") from None


def _invalid(text: str) -> InvalidRequest:
    """What msgspec says, with the field it is about."""
    if missing := _MISSING.match(text):
        return InvalidRequest(missing["field"], "is required")
    if match := _PATH.match(text):
        return InvalidRequest(match["field"].removeprefix("$").removeprefix("."), match["what"])
    return InvalidRequest("", text)
