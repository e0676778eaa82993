"""The rule book by hand: every reason, every limit from both sides, and which of two broken rules is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rulebook import REASONS, Json, judge
from tests.streams import events, rubbish

EXAMPLES = Path(__file__).parent.parent / "topics" / "examples"
ACTIONS = ["click", "like"]
NOW = 1_700_000_100_000
FUTURE, CLOSING = 60_000, 660_000
GOOD: Json = {"type": "click", "event_id": "e", "user_id": "u", "item_id": "i", "event_time": 1_700_000_000_000}
INT64 = (1 << 63) - 1
NEITHER: list[Any] = [True, 1.5, [], {}]  # neither text nor an integer
LONE = r'"\ud800"'  # a lone surrogate, escaped, as it stands in JSON


def verdict(value: bytes | None, key: bytes | None = b"u") -> str | Json:
    return judge(key, value, NOW, actions=ACTIONS, max_future_ms=FUTURE, closing_ms=CLOSING)


def of(key: bytes | None = b"u", /, **change: Any) -> str | Json:
    """The verdict on the good event with fields changed; ... takes one away."""
    return verdict(json.dumps({k: v for k, v in {**GOOD, **change}.items() if v is not ...}).encode(), key)


def raw(key: bytes | None = b"u", /, **change: str) -> str | Json:
    """The same with fields changed to pieces of JSON text, appended: the last of a name counts."""
    fields = [(k, json.dumps(v)) for k, v in GOOD.items()] + list(change.items())
    return verdict(("{" + ", ".join(f'"{k}": {text}' for k, text in fields) + "}").encode(), key)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("name", ["impression", "click", "like", "profile", "heartbeat"])
def test_examples_are_good(name: str) -> None:
    example = json.loads((EXAMPLES / f"{name}.json").read_text())
    key = None if example["key"] is None else example["key"].encode()
    event = verdict(json.dumps(example["value"]).encode(), key)
    assert isinstance(event, dict)
    assert event["type"] == name


@pytest.mark.parametrize("n", range(len(json.loads((EXAMPLES / "bad.json").read_text()))))
def test_examples_are_bad(n: int) -> None:
    example = json.loads((EXAMPLES / "bad.json").read_text())[n]
    value = example["text"] if "text" in example else json.dumps(example["value"])
    assert verdict(value.encode(), None if example["key"] is None else example["key"].encode()) == example["reason"]


def test_streams() -> None:
    for event in events(1, 500):
        assert verdict(json.dumps(event).encode(), event["user_id"].encode()) == {
            k: v for k, v in event.items() if v is not None
        }
    reasons = set()
    for reason, (key, value, _) in rubbish(NOW):
        assert verdict(value, key) == reason
        reasons.add(reason)
    assert reasons == set(REASONS)


def test_what_a_good_event_becomes() -> None:
    assert of() == GOOD
    assert of(b"7", user_id=7, item_id=-INT64 - 1, request_id=0) == {
        **GOOD, "user_id": "7", "item_id": str(-INT64 - 1), "request_id": "0",
    }  # fmt: skip
    assert of(request_id=None, surface=None, position=None, features=None, other=[1, {"a": 2}]) == GOOD
    full = {"surface": "", "position": -3, "features": {"": "", "n": 3, "gone": None}, "request_id": "r"}
    assert of(**full) == {**GOOD, **full, "features": {"": "", "n": 3}}
    assert raw(type='"impression"') == {**GOOD, "type": "impression"}
    assert of(type="profile", item_id=...) == {k: v for k, v in GOOD.items() if k != "item_id"} | {"type": "profile"}
    assert of("ä".encode(), user_id="ä") == {**GOOD, "user_id": "ä"}
    assert raw("💡".encode(), user_id=r'"\ud83d\udca1"') == {**GOOD, "user_id": "💡"}
    assert raw(b"0", user_id="-0") == {**GOOD, "user_id": "0"}
    assert verdict(b" \r\n\t" + json.dumps(GOOD).encode() + b"\n") == GOOD
    assert raw(**{r"\u0074ype": '"like"'}) == {**GOOD, "type": "like"}


def test_erasures() -> None:
    assert verdict(None, b"u") == {"erase": "u"}
    assert verdict(None, ("💡" * 256).encode()) == {"erase": "💡" * 256}
    assert verdict(None, None) == "null_key"
    for key in (b"", b"x" * 257, b"\xff", b"\xed\xa0\x80"):
        assert verdict(None, key) == "key_mismatch"


def test_size_is_looked_at_first() -> None:
    text = json.dumps(GOOD).encode()
    assert verdict(text + b" " * ((1 << 20) - len(text))) == GOOD
    assert verdict(text + b" " * ((1 << 20) - len(text) + 1)) == "too_large"
    assert verdict(b"x" * ((1 << 20) + 1), None) == "too_large"


NO_JSON = [
    "", " ", "{", "[1,]", '{"a": 1,}', "{'a': 1}", "nul", "True", "01", "+1", ".5", "1.", "1e", "0x1", "{} {}", '"\n"',
    '"\\x"', '"\\u12g4"', "\ufeff{}", "NaN", "-Infinity", '{"a": NaN}', '{"a": [Infinity]}', "\xa0{}", "\u0661",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_JSON)
def test_no_json(text: str) -> None:
    assert verdict(text.encode(), None) == "invalid_json"


def test_bytes_that_are_no_text() -> None:
    for value in (b"\xff", b'{"a": "\xed\xa0\x80"}', b'{"a": "\xc0\xaf"}', '{"a": 1}'.encode("utf-16")):
        assert verdict(value) == "invalid_json"


def test_depth() -> None:
    assert raw(other=nested(99)) == GOOD
    assert raw(other=nested(100)) == "invalid_json"
    assert raw(other=nested(100) + ', "other": 1') == "invalid_json"
    assert raw(other=json.dumps('"' + nested(200) + "\\")) == GOOD
    assert raw(other='{"a": ' * 99 + "1" + "}" * 99) == GOOD
    assert raw(other='{"a": ' * 100 + "1" + "}" * 100) == "invalid_json"
    assert verdict(nested(100).encode()) == "not_an_object"
    assert verdict(nested(101).encode()) == "invalid_json"
    assert verdict(nested(500_000).encode()) == "invalid_json"
    assert verdict(b"[" * (1 << 20)) == "invalid_json"
    assert raw(other="[" + ",".join(["[]", "{}"] * 200) + "]") == GOOD


@pytest.mark.parametrize("text", ["[]", '"type"', "1", "1e999", "9" * 5000, "null", "true"])
def test_not_an_object(text: str) -> None:
    assert verdict(text.encode(), None) == "not_an_object"


def test_lone_surrogates() -> None:
    for name in ("type", "event_id", "user_id", "item_id", "event_time", "request_id", "surface", "position"):
        assert raw(**{name: LONE}) == "invalid_json"
        assert raw(**{name: f"[{LONE}]"}) == "invalid_json"
        assert raw(**{name: r'"\udc00\ud800"'}) == "invalid_json"
    for features in (LONE, f"[1.5, {LONE}]", f'{{"a": {LONE}}}', f"{{{LONE}: null}}", f'{{"a": {LONE}, "a": 1}}'):
        assert raw(features=features) == "invalid_json"
    for where in (  # where nobody reads
        raw(other=f"{{{LONE}: [{LONE}]}}"),
        raw(**{r"\ud800": "1"}),
        raw(event_id=f'{LONE}, "event_id": "e"'),
        raw(type='"profile"', item_id=LONE),
        raw(None, type='"heartbeat"', event_id=LONE),
        raw(event_id="7", user_id=LONE),
        verdict(LONE.encode()),
    ):
        assert where == "invalid_json"


@pytest.mark.parametrize("name", ["type", "event_id", "user_id", "item_id", "event_time"])
def test_required_fields(name: str) -> None:
    assert of(**{name: ...}) == "missing_field"
    assert of(**{name: None}) == "missing_field"
    for value in NEITHER:
        assert of(**{name: value}) == "wrong_type"
    assert (
        raw(**{name: "1.0"}) == raw(**{name: "1e3"}) == raw(**{name: "1e999"}) == raw(**{name: "-0.0"}) == "wrong_type"
    )


@pytest.mark.parametrize("name", ["request_id", "surface", "position", "features"])
def test_optional_fields(name: str) -> None:
    assert of(**{name: None}) == of(**{name: ...}) == GOOD
    assert of(**{name: False}) == of(**{name: []}) == of(**{name: 1.5}) == raw(**{name: "1e999"}) == "wrong_type"


def test_type() -> None:
    assert of(type=1) == "wrong_type"
    for kind in ("purchase", "", "Click", "impression "):
        assert of(type=kind) == "unknown_type"
    assert of(type="purchase", event_id=...) == "unknown_type"


def test_ids() -> None:
    assert of(event_id=7) == "wrong_type"
    assert of(event_id="") == of(event_id="x" * 129) == "out_of_range"
    assert of(event_id="💡" * 128) == {**GOOD, "event_id": "💡" * 128}
    for name in ("user_id", "item_id", "request_id"):
        for value in ("", "x" * 257, INT64 + 1, -INT64 - 2):
            assert of(**{name: value}) == "out_of_range"
        for text in ("1" * 20, "1" * 21, "-" + "1" * 20, "9" * 5000, "-" + "9" * 5000):
            assert raw(**{name: text}) == "out_of_range"
    assert of(item_id="💡" * 256, request_id=INT64) == {**GOOD, "item_id": "💡" * 256, "request_id": str(INT64)}


def test_item_of_a_profile_is_ignored() -> None:
    for item in ("true", '""', "1e999", "[[1]]", "9" * 30, "null"):
        event = raw(type='"profile"', item_id=item)
        assert isinstance(event, dict)
        assert "item_id" not in event
    assert raw(type='"profile"', item_id="NaN") == raw(type='"profile"', item_id=nested(100)) == "invalid_json"


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00z", 0),
        ("1970-01-01 00:00:00.0019999999999999999999Z", 1),
        ("1970-01-01T00:00:00.1Z", 100),
        ("1970-01-01T00:00:00.12Z", 120),
        ("1970-01-01T00:00:00-00:00", 0),
        ("1970-01-01T23:59:00+23:59", 0),
        ("1969-12-31T00:01:00-23:59", 0),
        ("1970-01-01T00:00:60Z", 60_000),
        ("1970-01-01T23:59:60.5Z", 86_400_500),
        ("1972-02-29T00:00:00Z", 789 * 86_400_000),
        ("2000-02-29T12:34:56.789+01:30", 951_822_296_789),
        ("2023-11-14T22:13:24.250Z", 1_700_000_004_250),
        ("2023-11-15T00:13:24.250+02:00", 1_700_000_004_250),
    ],
)
def test_good_times(text: str, ms: int) -> None:
    assert of(event_time=text) == {**GOOD, "event_time": ms}


BAD_TIMES = [
    "", "now", "1700000000000", "2023-11-14", "2023-11-14T22:13:24", "2023-11-14T22:13Z", "2023-11-14T24:00:00Z",
    "2023-11-14T22:60:24Z", "2023-11-14T22:13:61Z", "2023-02-29T00:00:00Z", "1900-02-29T00:00:00Z",
    "2023-00-01T00:00:00Z", "2023-13-01T00:00:00Z", "2023-01-00T00:00:00Z", "2023-04-31T00:00:00Z",
    "2023-11-14T22:13:24.Z", "2023-11-14T22:13:24,5Z", "2023-11-14T22:13:24+0200", "2023-11-14T22:13:24+02",
    "2023-11-14T22:13:24+24:00", "2023-11-14T22:13:24+02:60", "2023-11-14T22:13:24Z\n", " 2023-11-14T22:13:24Z",
    "2023-11-14_22:13:24Z", "2023-11-14  22:13:24Z", "23-11-14T22:13:24Z", "12023-11-14T22:13:24Z",
    "2023-11-14T22:13:24\u221202:00", "\u0662023-11-14T22:13:24Z", "2023-11-14T22:13:24.\u0665Z", "20231114T221324Z",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_TIMES)
def test_bad_times(text: str) -> None:
    assert of(event_time=text) == "bad_time"


def test_times_out_of_range() -> None:
    for time in (
        -1,
        INT64 + 1,
        -INT64 - 2,
        "1969-12-31T23:59:59.9999Z",
        "1970-01-01T00:00:00+00:01",
        "0000-02-29T00:00:00Z",
    ):
        assert of(event_time=time) == "out_of_range"
    assert raw(event_time="9" * 5000) == "out_of_range"
    assert of(event_time=0) == raw(event_time="-0") == {**GOOD, "event_time": 0}
    assert of(event_time=INT64) == of(event_time="9999-12-31T23:59:60-23:59") == "future_time"


def test_future() -> None:
    assert of(event_time=NOW + FUTURE) == {**GOOD, "event_time": NOW + FUTURE}
    assert of(event_time=NOW + FUTURE + 1) == "future_time"
    beat = {"type": "heartbeat", "event_time": NOW + FUTURE + CLOSING}
    assert of(None, **beat) == beat
    assert of(None, type="heartbeat", event_time=NOW + FUTURE + CLOSING + 1) == "future_time"


def test_heartbeats() -> None:
    beat = {"type": "heartbeat", "event_time": 5}
    assert verdict(json.dumps(beat).encode(), None) == beat
    assert (
        of(None, type="heartbeat", event_time="1970-01-01T00:00:00.005Z", event_id=7, user_id=[], features=1.5) == beat
    )
    assert of(b"", **beat) == of(b"u", **beat) == "key_mismatch"
    assert of(type="heartbeat", event_time=...) == "missing_field"
    assert of(type="heartbeat", event_time=5.0) == "wrong_type"


def test_surface_and_position() -> None:
    assert of(surface="💡" * 128, position=-INT64 - 1) == {**GOOD, "surface": "💡" * 128, "position": -INT64 - 1}
    assert of(surface=7) == of(position="7") == "wrong_type"
    assert of(surface="x" * 129) == of(position=INT64 + 1) == "out_of_range"


def test_features() -> None:
    many = {f"f{n}": n for n in range(32)}
    assert of(features={}) == {**GOOD, "features": {}}
    assert of(features={**many, "null": None}) == {**GOOD, "features": many}
    assert of(features={**many, "more": ""}) == "out_of_range"
    assert of(features={"💡" * 128: "💡" * 128}) == {**GOOD, "features": {"💡" * 128: "💡" * 128}}
    assert of(features={"x" * 129: None}) == {**GOOD, "features": {}}
    for features in ({"x" * 129: 1}, {"a": "x" * 129}, {"a": INT64 + 1}):
        assert of(features=features) == "out_of_range"
    for member in NEITHER:
        assert of(features={"a": member}) == of(features={"x" * 129: member}) == "wrong_type"
        assert of(features={**many, "a": member}) == "wrong_type"
        assert of(features={"a": member, "b": "x" * 129}) == "wrong_type"
        assert of(features={"b": "x" * 129, "a": member}) == "out_of_range"  # one member after the other
    assert raw(features='{"a": 1.5, "a": 1}') == {**GOOD, "features": {"a": 1}}
    assert raw(features='{"a": 1, "a": null}') == {**GOOD, "features": {}}


def test_keys() -> None:
    assert of(None) == "null_key"
    for key in (b"", b"U", b"u ", b"\xff"):
        assert of(key) == "key_mismatch"
    assert of(b"07", user_id=7) == "key_mismatch"


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"type": "purchase"}, "unknown_type"),
    ({"event_id": 7}, "wrong_type"),
    ({"user_id": ""}, "out_of_range"),
    ({"item_id": ...}, "missing_field"),
    ({"event_time": "yesterday"}, "bad_time"),
    ({"request_id": True}, "wrong_type"),
    ({"surface": "x" * 129}, "out_of_range"),
    ({"position": "first"}, "wrong_type"),
    ({"features": {"a": "x" * 129}}, "out_of_range"),
]


@pytest.mark.parametrize("first", range(len(BROKEN)))
def test_fields_are_read_in_order(first: int) -> None:
    """Whatever is wrong further on, and with the key, the first broken field names the reason."""
    for last in range(first, len(BROKEN)):
        change: Json = {}
        for fields, _ in BROKEN[first : last + 1]:
            change |= fields
        assert of(**change) == of(b"other", **change) == of(None, **change) == BROKEN[first][1]


def test_time_is_judged_before_what_follows() -> None:
    for time, reason in ((-1, "out_of_range"), (NOW + FUTURE + 1, "future_time")):
        assert of(None, event_time=time, request_id=1.5, features=[]) == reason
        assert of(event_time=time, item_id="") == "out_of_range"
        assert of(event_time=time, item_id=...) == "missing_field"


def test_last_of_a_name_counts() -> None:
    assert raw(event_time='5, "event_time": 6') == {**GOOD, "event_time": 6}
    assert raw(event_id='"x", "event_id": null') == "missing_field"
    assert raw(b"v", user_id='1.5, "user_id": "v"') == {**GOOD, "user_id": "v"}
