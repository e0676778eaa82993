"""`topics/schemas` and `topics/examples` say what the decoder does."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from streamgr.decoder import Decoder
from streamgr.events import BadRecord, Record
from tests.streams import columns

TOPICS = Path(__file__).resolve().parents[1] / "topics"
SCHEMA = json.loads((TOPICS / "schemas" / "event.json").read_text())
EXAMPLES = sorted(f for f in (TOPICS / "examples").glob("*.json") if f.name != "bad.json")
BAD = json.loads((TOPICS / "examples" / "bad.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
DECODER = Decoder(["click", "like"], max_future_ms=60_000)
NOW = 1_700_000_100_000
BEYOND_THE_SCHEMA = {"unknown_type", "future_time", "key_mismatch", "null_key"}  # kinds, clocks and keys are not in it


def record(key: str | None, value: bytes, append_ms: int = NOW) -> Record:
    return Record("t", 0, 0, None if key is None else key.encode(), value, append_ms)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_the_good_examples_are_good(file: Path) -> None:
    example = json.loads(file.read_text())
    VALIDATOR.validate(example["value"])
    assert example["value"]["type"] == file.stem
    (outcome,) = DECODER.decode(columns([record(example["key"], json.dumps(example["value"]).encode())]))
    assert not isinstance(outcome, BadRecord), outcome


def test_there_is_an_example_of_every_type() -> None:
    assert {f.stem for f in EXAMPLES} == {"impression", "click", "like", "profile", "heartbeat"}


@pytest.mark.parametrize("example", BAD, ids=lambda e: e["reason"])
def test_the_bad_examples_are_bad_for_their_reason(example: dict[str, Any]) -> None:
    text = example.get("text", json.dumps(example.get("value")))
    (outcome,) = DECODER.decode(columns([record(example["key"], text.encode())]))
    assert isinstance(outcome, BadRecord)
    assert outcome.reason == example["reason"]
    if example["reason"] != "invalid_json" and example["reason"] not in BEYOND_THE_SCHEMA:
        assert not VALIDATOR.is_valid(json.loads(text))


BASE: dict[str, Any] = {"type": "click", "event_id": "e", "user_id": "u", "item_id": "i", "event_time": 5}
IDS = [None, "", "x", "é" * 256, "é" * 257, 7, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, True, [], {}, 1.5]
TIMES = [None, 0, -1, 2**63, "2020-02-29T00:00:00Z", "2020-02-29 00:00:00.123456+23:59", "2020-02-29T00:00:00",
         "2020-13-01T00:00:00Z", "2020-01-01T24:00:00Z", "2020-01-01T00:00:00Z ", "", True, 1.5, []]  # fmt: skip
TEXTS = [None, "", "x" * 128, "x" * 129, 1, False, []]
CHOICES: dict[str, list[Any]] = {
    "type": [None, "impression", "click", "profile", "heartbeat", 1, [], True],
    "event_id": [None, "", "x" * 128, "x" * 129, 1, True],
    "user_id": IDS,
    "item_id": IDS,
    "event_time": TIMES,
    "request_id": IDS,
    "surface": TEXTS,
    "position": [None, 0, -(2**63), 2**63, 1.5, "1", False],
    "features": [None, {}, [], "x", {"a": 1}, {"a": None}, {"a": True}, {"a": 1.5}, {"a": "x" * 129}, {"x" * 129: 1},
                 {"a": 2**63}, {str(n): n for n in range(32)}, {str(n): n for n in range(33)}],
    "unknown": [None, {"a": [1.5]}],
}  # fmt: skip
CHANGES = st.dictionaries(st.sampled_from(sorted(CHOICES)), st.integers(0, 99), max_size=3)


@settings(max_examples=500, deadline=None)
@given(CHANGES)
def test_the_schema_accepts_what_the_decoder_accepts(changes: dict[str, int]) -> None:
    event = BASE | {name: CHOICES[name][n % len(CHOICES[name])] for name, n in changes.items()}
    key = None if event["type"] == "heartbeat" else str(event["user_id"])
    (outcome,) = DECODER.decode(columns([record(key, json.dumps(event).encode(), append_ms=2**62)]))
    accepted = not isinstance(outcome, BadRecord) or outcome.reason == "future_time"
    assert VALIDATOR.is_valid(event) == accepted, outcome
