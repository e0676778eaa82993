"""The decoder: every rule of the contract, and the fast path against the rule book."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamgr import events
from streamgr.decoder import Decoder, parse_time
from streamgr.events import BadRecord, Erasure, Event, Heartbeat, Record, Records
from tests.streams import columns

NOW = 1_700_000_000_000
DECODER = Decoder(["click", "like"], max_future_ms=60_000, closing_ms=661_000)
GOOD: dict[str, Any] = {"type": "click", "event_id": "e1", "user_id": "u1", "item_id": "i1", "event_time": NOW}


def record(value: Any, key: bytes | None = b"u1") -> Record:
    """`value`: bytes as they are, anything else as JSON."""
    raw = value if isinstance(value, bytes | None) else json.dumps(value).encode()
    return Record("t", 0, 7, key, raw, NOW)


def records(value: Any, key: bytes | None = b"u1") -> Records:
    """A batch of that one record."""
    return columns([record(value, key)])


def outcome(value: Any, key: bytes | None = b"u1") -> Event | Heartbeat | Erasure | BadRecord:
    (result,) = DECODER.decode(records(value, key))
    assert result == DECODER.explain(record(value, key))
    return result


def reason(value: Any, key: bytes | None = b"u1") -> str:
    result = outcome(value, key)
    return result.reason if isinstance(result, BadRecord) else "good"


def test_a_full_event_is_read_as_it_stands() -> None:
    full = GOOD | {"request_id": 5, "surface": "home", "position": 3, "features": {"country": "de", "age": 30}}
    assert outcome(full | {"unknown": [1, {}]}) == Event(
        3 - 1, "u1", "i1", "e1", NOW, "5", "home", 3, {"country": "de", "age": 30}
    )
    assert outcome(GOOD | {"type": "like"}).kind == events.FIRST_ACTION + 1  # type: ignore[union-attr]
    assert outcome(GOOD | {"type": "impression"}).kind == events.IMPRESSION  # type: ignore[union-attr]


def test_integer_ids_are_their_decimal_text() -> None:
    low, high = -(2**63), 2**63 - 1
    result = outcome(GOOD | {"user_id": low, "item_id": high}, str(low).encode())
    assert isinstance(result, Event)
    assert (result.user, result.item) == (str(low), str(high))


def test_null_is_absent() -> None:
    nulls = {"request_id": None, "surface": None, "position": None, "features": None, "unknown": None}
    assert outcome(GOOD | nulls) == outcome(GOOD)
    assert outcome(GOOD | {"features": {"a": None}}) == outcome(GOOD | {"features": {}}) == outcome(GOOD)
    assert reason(GOOD | {"item_id": None}) == "missing_field"


def test_a_profile_has_no_item() -> None:
    profile = {k: v for k, v in GOOD.items() if k != "item_id"} | {"type": "profile"}
    assert outcome(profile | {"item_id": "x"}) == outcome(profile | {"item_id": []}) == outcome(profile)
    assert outcome(profile).item == ""  # type: ignore[union-attr]


def test_heartbeats_need_a_null_key_and_only_a_time() -> None:
    beat = {"type": "heartbeat", "event_time": NOW}
    assert outcome(beat, None) == Heartbeat(NOW)
    assert outcome(beat | {"user_id": [], "event_id": 3, "item_id": None}, None) == Heartbeat(NOW)
    assert reason(beat) == "key_mismatch"
    assert reason({"type": "heartbeat"}, None) == "missing_field"


def test_a_heartbeat_may_be_ahead_by_what_closes_the_newest_event_allowed() -> None:
    assert outcome({"type": "heartbeat", "event_time": NOW + 721_000}, None) == Heartbeat(NOW + 721_000)
    assert reason({"type": "heartbeat", "event_time": NOW + 721_001}, None) == "future_time"
    (strict,) = Decoder(["click"], 60_000).decode(records({"type": "heartbeat", "event_time": NOW + 60_001}, None))
    assert isinstance(strict, BadRecord)


def test_a_null_value_under_a_key_erases() -> None:
    assert outcome(None, "ü".encode()) == Erasure("ü")
    assert reason(None, None) == "null_key"
    for key in (b"", b"\xff", b"x" * 257):
        assert reason(None, key) == "key_mismatch"


BAD: list[tuple[str, Any, bytes | None]] = [
    ("too_large", b" " * (events.MAX_VALUE_BYTES + 1), b"u1"),
    ("too_large", b"{" + b" " * events.MAX_VALUE_BYTES, None),
    ("invalid_json", b"", b"u1"),
    ("invalid_json", b"{", b"u1"),
    ("invalid_json", b"[1,", b"u1"),
    ("invalid_json", b"{} x", b"u1"),
    ("invalid_json", b"\xef\xbb\xbf{}", b"u1"),
    ("invalid_json", b'{"x": NaN}', b"u1"),
    ("invalid_json", b'{"x": "\xff"}', b"u1"),
    ("invalid_json", b'{"type": "\xc0\x80"}', b"u1"),
    ("invalid_json", b'{"type":"click","event_id":"\\ud800 and some more text"}', b"u1"),
    ("invalid_json", b'{"x":' + b"[" * 200 + b"]" * 200 + b"}", b"u1"),
    ("invalid_json", b"[" * 500_000, b"u1"),
    ("not_an_object", b"[1]", b"u1"),
    ("not_an_object", b"null", b"u1"),
    ("not_an_object", b'"x"', None),
    ("missing_field", {}, b"u1"),
    ("missing_field", {"type": None}, b"u1"),
    *[("missing_field", {k: v for k, v in GOOD.items() if k != name}, b"u1") for name in GOOD],
    *[("wrong_type", GOOD | {name: True}, b"u1") for name in GOOD],
    *[("wrong_type", GOOD | {name: []}, b"u1") for name in GOOD],
    ("wrong_type", GOOD | {"event_id": 5}, b"u1"),
    ("wrong_type", GOOD | {"item_id": 5.0}, b"u1"),
    ("wrong_type", GOOD | {"event_time": float(NOW)}, b"u1"),
    ("wrong_type", GOOD | {"position": "1"}, b"u1"),
    ("wrong_type", GOOD | {"position": False}, b"u1"),
    ("wrong_type", GOOD | {"surface": 1}, b"u1"),
    ("wrong_type", GOOD | {"features": []}, b"u1"),
    ("wrong_type", GOOD | {"features": {"a": 1.5}}, b"u1"),
    ("wrong_type", GOOD | {"features": {"a": True}}, b"u1"),
    ("wrong_type", GOOD | {"features": {"a": {}}}, b"u1"),
    ("wrong_type", b'{"type":"click","event_id":"e","user_id":1e999}', b"u1"),
    ("out_of_range", GOOD | {"event_id": ""}, b"u1"),
    ("out_of_range", GOOD | {"event_id": "x" * 129}, b"u1"),
    ("out_of_range", GOOD | {"user_id": ""}, b""),
    ("out_of_range", GOOD | {"user_id": "😀" * 257}, ("😀" * 257).encode()),
    ("out_of_range", GOOD | {"item_id": 2**63}, b"u1"),
    ("out_of_range", GOOD | {"item_id": -(2**63) - 1}, b"u1"),
    ("out_of_range", b'{"type":"click","event_id":"e","user_id":' + b"9" * 5000 + b"}", b"u1"),
    ("out_of_range", GOOD | {"request_id": ""}, b"u1"),
    ("out_of_range", GOOD | {"surface": "x" * 129}, b"u1"),
    ("out_of_range", GOOD | {"position": 2**63}, b"u1"),
    ("out_of_range", GOOD | {"features": {str(i): i for i in range(33)}}, b"u1"),
    ("out_of_range", GOOD | {"features": {"x" * 129: 1}}, b"u1"),
    ("out_of_range", GOOD | {"features": {"a": 2**64}}, b"u1"),
    ("unknown_type", GOOD | {"type": "purchase"}, b"u1"),
    ("unknown_type", GOOD | {"type": "Click"}, None),
    ("out_of_range", GOOD | {"event_time": -1}, b"u1"),
    ("out_of_range", GOOD | {"event_time": 2**63}, b"u1"),
    ("out_of_range", GOOD | {"event_time": "1969-12-31T23:59:59.999Z"}, b"u1"),
    ("bad_time", GOOD | {"event_time": "yesterday"}, b"u1"),
    ("bad_time", GOOD | {"event_time": "2023-11-14T22:13:20"}, b"u1"),
    ("bad_time", GOOD | {"event_time": "2023-02-30T00:00:00Z"}, b"u1"),
    ("future_time", GOOD | {"event_time": NOW + 60_001}, b"u1"),
    ("future_time", GOOD | {"event_time": "9999-12-31T23:59:59Z"}, b"u1"),
    ("null_key", GOOD, None),
    ("key_mismatch", GOOD, b"u2"),
    ("key_mismatch", GOOD, b"u1\xff"),
    ("key_mismatch", GOOD, b""),
    ("key_mismatch", GOOD | {"user_id": 7}, b"07"),
]


@pytest.mark.parametrize(("wanted", "value", "key"), BAD, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)])
def test_a_bad_record_names_its_rule(wanted: str, value: Any, key: bytes | None) -> None:
    result = outcome(value, key)
    assert isinstance(result, BadRecord)
    assert (result.reason, bool(result.detail)) == (wanted, True)
    assert len(result.detail) < 300


def test_the_limits_themselves_are_good() -> None:
    user = "😀" * 256
    biggest = GOOD | {
        "user_id": user, "event_id": "x" * 128, "event_time": NOW + 60_000, "surface": "x" * 128,
        "position": -(2**63), "features": {str(i).rjust(128): "y" * 128 for i in range(32)} | {"absent": None},
    }  # fmt: skip
    assert isinstance(outcome(biggest, user.encode()), Event)
    value = json.dumps(GOOD).encode()
    assert isinstance(outcome(value + b" " * (events.MAX_VALUE_BYTES - len(value))), Event)


def test_nesting_is_judged_alone_and_brackets_in_strings_do_not_count() -> None:
    assert reason(GOOD | {"x": '["{\\' * 500}) == "good"
    deep: Any = 1
    for _ in range(99):
        deep = [deep]
    assert reason(GOOD | {"x": deep}) == "good"
    assert reason(GOOD | {"x": [deep]}) == "invalid_json"


def test_the_last_of_a_repeated_key_counts() -> None:
    text = json.dumps(GOOD)[:-1]
    assert reason((text + ', "item_id": "z"}').encode()) == "good"
    assert reason((text + ', "item_id": null}').encode()) == "missing_field"
    assert reason(('{"item_id": [], ' + text[1:] + "}").encode()) == "good"


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2023-11-14T22:13:20Z", NOW),
        ("2023-11-14t22:13:20.1239z", NOW + 123),
        ("2023-11-14 23:13:20.5+01:00", NOW + 500),
        ("2023-11-14T16:43:20-05:30", NOW),
        ("2016-12-31T23:59:60Z", 1_483_228_800_000),
        ("1970-01-01T00:30:00+01:00", -1_800_000),
        ("1969-12-31T23:59:59.999Z", -1),
        ("1969-12-31T23:30:00-01:00", 1_800_000),
        ("0001-01-01T00:00:00+23:59", -62_135_683_140_000),
        ("0000-01-01T00:00:00Z", -62_167_219_200_000),
        ("2023-11-14T22:13:20+01", None),
        ("2023-11-14T22:13:20+0100", None),
        ("2023-11-14T24:00:00Z", None),
        ("2023-11-14T22:13:20.Z", None),
        ("2023-11-14T22:13Z", None),
        ("2023-11-14T22:13:20Z\n", None),
        ("٢٠٢٣-11-14T22:13:20Z", None),
        ("1700000000000", None),
    ],
)
def test_times_as_text(text: str, time: int | None) -> None:
    assert parse_time(text) == time


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5), st.sampled_from(["u1", "e1", "click", "heartbeat"]),
    st.sampled_from(["x" * 128, "x" * 129, "é" * 256, "é" * 257]),
    st.sampled_from([NOW, NOW + 60_001, "2023-11-14T22:13:20Z", "2023-11-14T22:13:20"]),
)  # fmt: skip
VALUES = st.one_of(SCALARS, st.dictionaries(st.text(max_size=3), SCALARS, max_size=3), st.lists(SCALARS, max_size=2))
FIELDS = [*GOOD, "request_id", "surface", "position", "features", "other"]
OBJECTS = st.builds(lambda base, extra: base | extra, st.sampled_from([{}, GOOD]), st.dictionaries(
    st.sampled_from(FIELDS), VALUES, max_size=3))  # fmt: skip
KEYS = st.one_of(st.none(), st.just(b"u1"), st.binary(max_size=4))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(OBJECTS, KEYS), max_size=5))
def test_the_fast_path_equals_the_rule_book(rows: list[tuple[Any, bytes | None]]) -> None:
    records = [record(value, key) for value, key in rows]
    decoded = DECODER.decode(columns(records))
    assert decoded == [DECODER.explain(r) for r in records]
    assert len(decoded) == len(records)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.none()), KEYS, st.integers(0, 150), st.integers(0, 255))
@example(b'{"a":"\\udc00\\ud800 and more"}', b"u1", 0, 0)
def test_no_bytes_make_it_raise(noise: bytes | None, key: bytes | None, at: int, byte: int) -> None:
    good = bytearray(json.dumps(GOOD | {"features": {"a": "ü", "b": -0}, "position": 1}, ensure_ascii=False).encode())
    good[at % len(good)] = byte
    for value in (noise, bytes(good), bytes(good) + (noise or b""), (noise or b"") + bytes(good)):
        result = outcome(value, key)
        assert isinstance(result, Event | Heartbeat | Erasure | BadRecord)
