"""Records to events, checked in batches (the outside contract).

A record is good or it names the rule it breaks; a bad record never stops the stream. `Decoder` reads good records
with one typed msgspec pass; whatever that refuses is read again by `Decoder.explain`, field by field, which is the
rule book: the fast path may only accept what it accepts, with the same result. `explain` names the first rule broken,
in this order: too_large · (null value: null_key, key_mismatch) · invalid_json · not_an_object · then the fields in the
order type, event_id, user_id, item_id, event_time, request_id, surface, position, features, each missing_field before
wrong_type before unknown_type, bad_time, out_of_range, future_time · and last the key: null_key, key_mismatch.
Of a key that stands twice in an object the last one counts. Half a surrogate pair, wherever it stands, is invalid_json:
what readers make of it is not to be relied on (RFC 8259, 8.2). A verdict depends on the record alone (its bytes and its
append time), never on the process that reads it, because every reader of a log must come to the same sequences.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from streamgr.events import (
    FIRST_ACTION,
    IMPRESSION,
    INT64_MAX,
    INT64_MIN,
    MAX_EVENT_ID,
    MAX_FEATURES,
    MAX_ID,
    MAX_TEXT,
    MAX_VALUE_BYTES,
    PROFILE,
    BadRecord,
    Erasure,
    Event,
    Heartbeat,
    Record,
    Records,
)

REASONS = (
    *("invalid_json", "not_an_object", "missing_field", "wrong_type", "out_of_range", "unknown_type", "bad_time"),
    *("future_time", "key_mismatch", "null_key", "too_large"),
)
MAX_NESTING = 100  # deeper JSON is refused; otherwise the reader's own stack would decide
SIMPLE_BYTES = 2 * MAX_NESTING + 50  # a shorter value cannot hold both: what an event needs, and deeper nesting

_Int64 = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]
_Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID)] | _Int64
_Text = Annotated[str, Meta(max_length=MAX_TEXT)]


class _Wire(msgspec.Struct, frozen=True, gc=False):
    """What the fast path accepts: never more than `Decoder.explain`."""

    type: str
    event_time: Annotated[int, Meta(ge=0, le=INT64_MAX)] | str
    event_id: Annotated[str, Meta(min_length=1, max_length=MAX_EVENT_ID)] | None = None
    user_id: _Id | None = None
    item_id: _Id | None = None
    request_id: _Id | None = None
    surface: _Text | None = None
    position: _Int64 | None = None
    features: Annotated[dict[_Text, _Text | _Int64], Meta(max_length=MAX_FEATURES)] | None = None


_NULL = Raw(b"null")


class _Fields(msgspec.Struct, frozen=True, gc=False):
    """The known fields as they stand in the text; null and absent are the same."""

    type: Raw = _NULL
    event_id: Raw = _NULL
    user_id: Raw = _NULL
    item_id: Raw = _NULL
    event_time: Raw = _NULL
    request_id: Raw = _NULL
    surface: Raw = _NULL
    position: Raw = _NULL
    features: Raw = _NULL


class _Broken(Exception):
    """A rule of the contract that a record breaks."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.bad = BadRecord(reason, detail)


class Decoder:
    """Records to events. `actions`: the configured kinds in order; `max_future_ms`: how far an event may be ahead of
    its record's append time. A heartbeat may be `closing_ms` farther ahead (window + lateness + step: what it takes to
    close the labels of the newest event that is allowed).
    """

    def __init__(self, actions: Sequence[str], max_future_ms: int, closing_ms: int = 0) -> None:
        self._kinds = {"profile": PROFILE, "impression": IMPRESSION}
        self._kinds |= {name: FIRST_ACTION + bit for bit, name in enumerate(actions)}
        self._max_future_ms, self._closing_ms = max_future_ms, closing_ms
        self._wire = msgspec.json.Decoder(_Wire)

    def decode(self, records: Records) -> list[Event | Heartbeat | Erasure | BadRecord]:
        """One outcome a record, in order; never raises on what a record holds."""
        fast, explain = self._fast, self.explain
        columns = zip(records.keys, records.values, records.append_ms, strict=True)
        return [fast(*row) or explain(records[i]) for i, row in enumerate(columns)]

    def _fast(self, key: bytes | None, value: bytes | None, append_ms: int) -> Event | None:
        """The event of a good record; None where the rule book has to be asked."""
        if key is None or value is None:
            return None
        if (len(value) > SIMPLE_BYTES or not value.isascii()) and _unreadable(value):
            return None
        try:
            wire = self._wire.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        kind = self._kinds.get(wire.type)
        user, item, time, event_id, request = (
            wire.user_id,
            wire.item_id,
            wire.event_time,
            wire.event_id,
            wire.request_id,
        )
        if kind is None or user is None or event_id is None or (item is None and kind != PROFILE):
            return None
        if type(user) is not str:
            user = str(user)
        moment = time if type(time) is int else parse_time(time)  # type: ignore[arg-type]
        if key != user.encode() or moment is None or not 0 <= moment <= append_ms + self._max_future_ms:
            return None
        return Event(
            kind,
            user,
            "" if kind == PROFILE else item if type(item) is str else str(item),
            event_id,
            moment,
            request if type(request) is str else "" if request is None else str(request),
            wire.surface or "",
            -1 if wire.position is None else wire.position,
            wire.features or None,
        )

    def explain(self, record: Record) -> Event | Heartbeat | Erasure | BadRecord:
        """The rule book: what a record is, or the first rule it breaks (see the module's docstring)."""
        try:
            return self._explain(record)
        except _Broken as broken:
            return broken.bad

    def _explain(self, record: Record) -> Event | Heartbeat | Erasure:
        key, value = record.key, record.value
        if value is None:
            return Erasure(_erased(key))
        fields = _parse(value)
        name = _required("type", fields.type)
        if not isinstance(name, str):
            raise _Broken("wrong_type", f"`type` must be a string, not {_json_type(name)}")
        if name == "heartbeat":
            time = self._time(fields.event_time, record.append_ms, self._max_future_ms + self._closing_ms)
            if key is not None:
                raise _Broken("key_mismatch", "a heartbeat has a null key")
            return Heartbeat(time)
        if name not in self._kinds:
            raise _Broken("unknown_type", f"`type` is {name[:80]!r}; known: {', '.join(self._kinds)}, heartbeat")
        kind = self._kinds[name]
        event_id = _required("event_id", fields.event_id)
        if not isinstance(event_id, str):
            raise _Broken("wrong_type", f"`event_id` must be a string, not {_json_type(event_id)}")
        _limit("event_id", event_id, 1, MAX_EVENT_ID)
        user = _identifier("user_id", _required("user_id", fields.user_id))
        item = "" if kind == PROFILE else _identifier("item_id", _required("item_id", fields.item_id))
        event = Event(
            kind,
            user,
            item,
            event_id,
            self._time(fields.event_time, record.append_ms, self._max_future_ms),
            "" if (request := _value(fields.request_id)) is None else _identifier("request_id", request),
            _short("surface", _value(fields.surface)),
            -1 if (position := _value(fields.position)) is None else _integer("position", position),
            _features(fields.features),
        )
        if key is None:
            raise _Broken("null_key", "the key must be the user id")
        if key != user.encode():
            raise _Broken("key_mismatch", f"the key is not the event's `user_id` {user[:80]!r}")
        return event

    def _time(self, raw: Raw, append_ms: int, max_ahead_ms: int) -> int:
        value = _required("event_time", raw)
        if isinstance(value, str):
            time = parse_time(value)
            if time is None:
                raise _Broken("bad_time", f"`event_time` {value[:40]!r} is not RFC 3339 with an offset")
        else:
            time = _integer("event_time", value, "an integer or a string")
        if time < 0:
            raise _Broken("out_of_range", "`event_time` is before 1970")
        if time > append_ms + max_ahead_ms:
            ahead = (time - append_ms) / 1000
            raise _Broken("future_time", f"`event_time` is {ahead:.3f} s ahead of its record's timestamp")
        return time


_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ]([01]\d|2[0-3]):([0-5]\d):([0-5]\d|60)(?:\.(\d+))?"
    r"(?:[Zz]|([+-])([01]\d|2[0-3]):([0-5]\d))",
    re.ASCII,
)
_EPOCH, _DAYS_IN_400_YEARS = datetime(1970, 1, 1), 146_097


def parse_time(text: str) -> int | None:
    """RFC 3339 text with an offset to ms since 1970 (negative before), fractions cut; None if it is anything else."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second, fraction, sign, off_hour, off_minute = match.groups()
    try:  # the year 0 is in RFC 3339 and not in `datetime`: count from the year 400, one cycle of the calendar later
        days = (datetime(int(year) or 400, int(month), int(day)) - _EPOCH).days
    except ValueError:  # no such day
        return None
    days -= 0 if int(year) else _DAYS_IN_400_YEARS
    minutes = days * 1440 + int(hour) * 60 + int(minute)
    if sign:
        offset = int(off_hour) * 60 + int(off_minute)
        minutes -= offset if sign == "+" else -offset
    return (minutes * 60 + int(second)) * 1000 + int((fraction or "0")[:3].ljust(3, "0"))


def _unreadable(value: bytes) -> bool:
    """What no reader may look into: too large, too deep, or not UTF-8 (typed decoding skips over unknown fields)."""
    if len(value) > MAX_VALUE_BYTES or _too_deep(value):
        return True
    if value.isascii():
        return False
    try:
        value.decode()
    except UnicodeDecodeError:
        return True
    return False


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def _too_deep(value: bytes) -> bool:
    if value.count(b"[") + value.count(b"{") <= MAX_NESTING:
        return False
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", value)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_NESTING:
            return True
    return False


def _erased(key: bytes | None) -> str:
    if key is None:
        raise _Broken("null_key", "neither key nor value")
    try:
        user = key.decode()
    except UnicodeDecodeError:
        user = ""
    if not 1 <= len(user) <= MAX_ID:
        raise _Broken("key_mismatch", f"an erasure's key must be a user id: UTF-8, 1 to {MAX_ID} characters")
    return user


def _parse(value: bytes) -> _Fields:
    if len(value) > MAX_VALUE_BYTES:
        raise _Broken("too_large", f"{len(value)} bytes; at most {MAX_VALUE_BYTES}")
    if _unreadable(value):
        raise _Broken("invalid_json", f"not UTF-8, or nested more than {MAX_NESTING} deep")
    try:
        return msgspec.json.decode(value, type=_Fields)
    except msgspec.ValidationError:
        pass  # not an object, unless it is not JSON in the first place
    except msgspec.DecodeError as error:
        raise _Broken("invalid_json", str(error)) from None
    try:
        msgspec.json.decode(value, type=Raw)
    except msgspec.DecodeError as error:
        raise _Broken("invalid_json", str(error)) from None
    raise _Broken("not_an_object", "the value must be one JSON object")


class _Huge:
    """Stands for an integer that no machine can hold."""


def _value(raw: Raw) -> Any:
    """The value of a field; None where absent. Numbers out of all range become `_Huge` (integers) or a float."""
    try:
        return msgspec.json.decode(raw)
    except msgspec.ValidationError:
        text = bytes(raw).strip()
        if text[:1] in b"[{":
            return [] if text[:1] == b"[" else {}  # the type is all that is asked of these
        return _Huge() if text.removeprefix(b"-").isdigit() else float("inf")


def _required(name: str, raw: Raw) -> Any:
    value = _value(raw)
    if value is None:
        raise _Broken("missing_field", f"`{name}` is required")
    return value


def _identifier(name: str, value: Any) -> str:
    if isinstance(value, str):
        return _limit(name, value, 1, MAX_ID)
    return str(_integer(name, value, "a string or an integer"))


def _integer(name: str, value: Any, wanted: str = "an integer") -> int:
    if isinstance(value, _Huge) or (type(value) is int and not INT64_MIN <= value <= INT64_MAX):
        raise _Broken("out_of_range", f"`{name}` does not fit into 64 bits")
    if type(value) is not int:
        raise _Broken("wrong_type", f"`{name}` must be {wanted}, not {_json_type(value)}")
    return value


def _short(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Broken("wrong_type", f"`{name}` must be a string, not {_json_type(value)}")
    return _limit(name, value, 0, MAX_TEXT)


def _limit(name: str, text: str, least: int, most: int) -> str:
    if not least <= len(text) <= most:
        raise _Broken("out_of_range", f"`{name}` has {len(text)} characters; {least} to {most} are allowed")
    return text


def _features(raw: Raw) -> dict[str, str | int] | None:
    whole = _value(raw)
    if whole is None:
        return None
    if not isinstance(whole, dict):
        raise _Broken("wrong_type", f"`features` must be an object, not {_json_type(whole)}")
    given = msgspec.json.decode(raw, type=dict[str, Raw])
    features: dict[str, str | int] = {}
    for name, part in given.items():
        value = _value(part)
        if value is None:
            continue
        where = f"features.{name}"
        if not isinstance(value, str):
            value = _integer(where, value, "a string or an integer")
        _limit("features", name, 0, MAX_TEXT)
        features[name] = _limit(where, value, 0, MAX_TEXT) if isinstance(value, str) else value
    if len(features) > MAX_FEATURES:
        raise _Broken("out_of_range", f"`features` has {len(features)} keys; at most {MAX_FEATURES}")
    return features or None


def _json_type(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", _Huge: "an integer", float: "a number", str: "a string"}
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")
