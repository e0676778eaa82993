"""An independent judge of raw records, written from the contract with the standard library alone.

`judge` names the first broken rule, in the order in which this file reads: the record's size, its text, its fields one
after the other, its key. Within a field: is it there, is it of the right type, is it in range. The corners:

- What JSON is, is the grammar's matter: 1e999 and a thousand digits are numbers, ignored in unknown fields. In known
  ones a float (any literal with a point or an exponent) is of the wrong type, an integer beyond 64 bits out of range.
- A lone surrogate escape is within JSON's grammar but no text, and readers differ in what they make of it (RFC 8259,
  8.2): wherever it stands, also where nobody reads, the value is not JSON.
- -0 is the integer 0. The year 0000 exists (RFC 3339) and lies before 1970: out of range. A second 60 is the next
  minute's first.
- Members of `features` are judged as they stand, each for its type before its lengths; after all of them their number.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

Json = dict[str, Any]

REASONS = (
    "invalid_json", "not_an_object", "missing_field", "wrong_type", "out_of_range", "unknown_type", "bad_time",
    "future_time", "key_mismatch", "null_key", "too_large",
)  # fmt: skip
MAX_BYTES = 1 << 20
MAX_DEPTH = 100
RFC_3339 = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9]|60)(?:\.([0-9]+))?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))"
)
SURROGATE = re.compile("[\ud800-\udfff]")
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')


class Bad(Exception):
    """A broken rule; its reason is the only argument."""


class Members(dict[str, Any]):
    """A JSON object: the last of each name counts, and all that stood there in `pairs`."""

    def __init__(self, pairs: Iterable[tuple[str, Any]]) -> None:
        self.pairs = list(pairs)
        super().__init__(self.pairs)


def judge(
    key: bytes | None,
    value: bytes | None,
    append_ms: int,
    *,
    actions: Sequence[str],
    max_future_ms: int,
    closing_ms: int,
) -> str | Json:
    """The reason why a record is bad, or the good event as `Oracle.feed` takes it."""
    try:
        if value is None:
            return {"erase": _erased(key)}
        if len(value) > MAX_BYTES:
            raise Bad("too_large")
        fields = _object(value)
        kind = _required(fields, "type")
        if not isinstance(kind, str):
            raise Bad("wrong_type")
        if kind == "heartbeat":
            event = {"type": kind, "event_time": _time(fields, append_ms + max_future_ms + closing_ms)}
            if key is not None:
                raise Bad("key_mismatch")
            return event
        if kind not in ("impression", "profile", *actions):
            raise Bad("unknown_type")
        event = {"type": kind, "event_id": _text(_required(fields, "event_id"), 1, 128)}
        event["user_id"] = user = _id(_required(fields, "user_id"))
        if kind != "profile":
            event["item_id"] = _id(_required(fields, "item_id"))
        event["event_time"] = _time(fields, append_ms + max_future_ms)
        if (request := _optional(fields, "request_id")) is not None:
            event["request_id"] = _id(request)
        if (surface := _optional(fields, "surface")) is not None:
            event["surface"] = _text(surface, 0, 128)
        if (position := _optional(fields, "position")) is not None:
            event["position"] = _int64(position)
        if (features := _optional(fields, "features")) is not None:
            event["features"] = _features(features)
        if key is None:
            raise Bad("null_key")
        if key != user.encode():
            raise Bad("key_mismatch")
        return event
    except Bad as bad:
        return str(bad)


def _erased(key: bytes | None) -> str:
    if key is None:
        raise Bad("null_key")
    try:
        user = key.decode()
    except UnicodeDecodeError:
        raise Bad("key_mismatch") from None
    if not 1 <= len(user) <= 256:
        raise Bad("key_mismatch")
    return user


def _object(value: bytes) -> Members:
    try:
        text = value.decode()
        parsed = json.loads(text, object_pairs_hook=Members, parse_int=_integer, parse_constant=_no_json)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested some thousand deep
        raise Bad("invalid_json") from None
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise Bad("invalid_json")
    if _lone_surrogate(parsed):
        raise Bad("invalid_json")
    if not isinstance(parsed, Members):
        raise Bad("not_an_object")
    return parsed


def _integer(digits: str) -> int:
    """Python refuses to read very long integers; 21 characters suffice to see that one is beyond 64 bits."""
    return int(digits[:21])


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _optional(fields: Members, name: str) -> Any:
    """A known field's value; None where it is null or absent."""
    return fields.get(name)


def _required(fields: Members, name: str) -> Any:
    value = _optional(fields, name)
    if value is None:
        raise Bad("missing_field")
    return value


def _lone_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return SURROGATE.search(value) is not None
    if isinstance(value, Members):
        return any(_lone_surrogate(name) or _lone_surrogate(member) for name, member in value.pairs)
    return isinstance(value, list) and any(map(_lone_surrogate, value))


def _text(value: Any, shortest: int, longest: int) -> str:
    if not isinstance(value, str):
        raise Bad("wrong_type")
    if not shortest <= len(value) <= longest:
        raise Bad("out_of_range")
    return value


def _int64(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Bad("wrong_type")
    if not -(1 << 63) <= value < 1 << 63:
        raise Bad("out_of_range")
    return value


def _id(value: Any) -> str:
    return _text(value, 1, 256) if isinstance(value, str) else str(_int64(value))


def _time(fields: Members, latest: int) -> int:
    value = _required(fields, "event_time")
    at = _rfc_3339(value) if isinstance(value, str) else _int64(value)
    if at < 0:
        raise Bad("out_of_range")
    if at > latest:
        raise Bad("future_time")
    return at


def _rfc_3339(text: str) -> int:
    parts = RFC_3339.fullmatch(text)
    if parts is None:
        raise Bad("bad_time")
    year, month, day, hour, minute, second, fraction, sign, *offset = parts.groups(default="0")
    cycles = int(year) == 0  # datetime knows no year 0; the calendar repeats itself every 400 years
    try:
        days = date(400 if cycles else int(year), int(month), int(day)).toordinal() - date(1970, 1, 1).toordinal()
    except ValueError:
        raise Bad("bad_time") from None
    east = (-1 if sign == "-" else 1) * (int(offset[0]) * 60 + int(offset[1]))
    minutes = ((days - 146_097 * cycles) * 24 + int(hour)) * 60 + int(minute) - east
    return (minutes * 60 + int(second)) * 1000 + int(f"{fraction:0<3.3}")


def _features(value: Any) -> Json:
    if not isinstance(value, Members):
        raise Bad("wrong_type")
    features = {name: member for name, member in value.items() if member is not None}
    for name, member in features.items():
        if isinstance(member, str):
            _text(member, 0, 128)
        else:
            _int64(member)
        _text(name, 0, 128)
    if len(features) > 32:
        raise Bad("out_of_range")
    return features
