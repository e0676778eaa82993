"""The rules of `streamgr.events`: what is taken, how it then reads, and the reason under which the rest is set aside.

All records go in at once and one sequencer works them off; each test reads one fact out of what came of them.
"""

import json
from typing import Any

import pytest

from streamgr.clock import SystemClock
from tests.contract.conftest import Fresh
from tests.system import Json, System

T = 1_700_000_000_000  # 2023-11-14T22:13:20Z
MIB = 1 << 20
LONG = "😀" * 256  # 256 code points, 1 KiB
INT64 = 2**63 - 1
Bad = tuple[bytes | None, bytes | None, str]


def click(user: Any, **change: Any) -> Json:
    """A good click, with fields changed; `...` leaves one out."""
    event = {"type": "click", "event_id": "e", "user_id": user, "item_id": "i", "event_time": T, **change}
    return {k: v for k, v in event.items() if v is not ...}


def text(event: Any) -> bytes:
    return json.dumps(event).encode()


def sized(user: str, size: int) -> bytes:
    """A good click whose value is exactly so many bytes."""
    short = len(text(click(user, pad="")))
    return text(click(user, pad="x" * (size - short)))


def shown(**change: Any) -> Json:
    return {"type": "click", "item_id": "i", "event_time": T, "event_id": "e", **change}


# user -> (values under that user's key, the events of the sequence)
GOOD: dict[str, tuple[list[bytes | None], list[Json]]] = {
    "42": ([text(click(42, item_id=-7))], [shown(item_id="-7")]),
    str(INT64): ([text(click(INT64, item_id=-(2**63)))], [shown(item_id=str(-(2**63)))]),
    "integers": ([text(click("integers", item_id=7, request_id=9, position=-1))], [shown(item_id="7")]),
    LONG: ([text(click(LONG, item_id=LONG, event_id="😀" * 128))], [shown(item_id=LONG, event_id="😀" * 128)]),
    "nul\0in\0it": ([text(click("nul\0in\0it", item_id="\0", event_id="\0"))], [shown(item_id="\0", event_id="\0")]),
    "null is absent": (
        [text(click("null is absent", request_id=None, surface=None, position=None, features=None))],
        [shown()],
    ),
    "all fields": (
        [text(click("all fields", request_id="r", surface="home", position=3, features={"country": "BR", "age": 7}))],
        [shown()],
    ),
    "unknown fields": (
        [text(click("unknown fields", extra={"a": [1, 2.5, None]}, late=True, actions=["x"]))],
        [shown()],
    ),
    "features at the edge": (
        [text(click("features at the edge", features={f"{k:0128}": "é" * 128 for k in range(32)}))],
        [shown()],
    ),
    "zero": ([text(click("zero", event_time=0))], [shown(event_time=0)]),
    "offsets": (
        [
            text(click("offsets", event_id="a", event_time="2023-11-14T22:13:20Z")),
            text(click("offsets", event_id="b", event_time="2023-11-15T03:43:20.001+05:30")),
            text(click("offsets", event_id="c", event_time="2023-11-14T14:13:20.0029999-08:00")),
            text(click("offsets", event_id="d", event_time="2023-11-14T22:13:20.5Z")),
            text(click("offsets", event_id="e", event_time="2023-11-14T22:13:20.999999999Z")),
        ],
        [
            shown(event_id="a"),
            shown(event_id="b", event_time=T + 1),
            shown(event_id="c", event_time=T + 2),
            shown(event_id="d", event_time=T + 500),
            shown(event_id="e", event_time=T + 999),
        ],
    ),
    "again": (
        [
            text(click("again", item_id="first")),
            text(click("again", item_id="second", request_id="r")),  # the same event says something else: no change
            text(click("again", item_id="third", event_time="2023-11-14T22:13:20+00:00")),
            text(click("again", item_id="other time", event_time=T + 1)),
            text(click("again", item_id="other type", type="like")),
        ],
        [
            shown(item_id="first"),
            shown(item_id="other type", type="like"),
            shown(item_id="other time", event_time=T + 1),
        ],
    ),
    "erased": ([text(click("erased")), None], []),
    "erased and back": (
        [text(click("erased and back", event_id="old")), None, text(click("erased and back", event_id="new"))],
        [shown(event_id="new")],
    ),
    "erased, and the same again": (
        [text(click("erased, and the same again")), None, text(click("erased, and the same again"))],
        [shown()],
    ),
    "never there": ([None], []),
    "a MiB": ([sized("a MiB", MIB)], [shown()]),
}  # fmt: skip


def profile(user: str, at: int, features: Json | None, **change: Any) -> bytes:
    return text(
        click(user, type="profile", event_id=f"p{at}", item_id=..., event_time=T + at, features=features, **change)
    )


BR, US = {"country": "BR"}, {"country": "US"}
RUNS = [(0, BR), (1, BR), (2, BR), (3, US), (4, US), (5, BR)]
STARTS = [0, 3, 5]


def bad(reason: str, **change: Any) -> Bad:
    return b"bad", text(click("bad", **change)), reason


def of(reason: str, value: bytes | None, key: bytes | None = b"bad") -> Bad:
    return key, value, reason


BAD: list[Bad] = [
    *[of("invalid_json", v) for v in (b"", b"x", b"{", b'{"a": NaN}', text(click("bad")) + b"}", b"[" * 100_000)],
    of("invalid_json", text(click("bad"))[:-1] + b',"x":"\xff"}'),
    *[of("not_an_object", v) for v in (b"null", b"1", b'"text"', b"[]", b"true")],
    *[bad("missing_field", **{name: ...}) for name in ("type", "event_id", "user_id", "item_id", "event_time")],
    *[bad("missing_field", **{name: None}) for name in ("type", "event_id", "user_id", "item_id", "event_time")],
    bad("wrong_type", type=1),
    bad("wrong_type", event_id=1),
    *[bad("wrong_type", item_id=v) for v in (1.5, 1.0, True, ["i"], {})],
    *[bad("wrong_type", user_id=v) for v in (1.5, False, [])],
    *[bad("wrong_type", event_time=v) for v in (1.7e12 + 0.5, True, {}, [T])],
    *[bad("wrong_type", request_id=v) for v in (1.5, True, [])],
    *[bad("wrong_type", surface=v) for v in (1, [])],
    *[bad("wrong_type", position=v) for v in ("1", 1.5, True)],
    *[bad("wrong_type", features=v) for v in ("x", [], {"a": []}, {"a": {}}, {"a": True}, {"a": 1.5})],
    *[bad("out_of_range", event_id=v) for v in ("", "x" * 129)],
    *[bad("out_of_range", item_id=v) for v in ("", "😀" * 257, INT64 + 1, -(2**63) - 1, 10**400)],
    *[bad("out_of_range", request_id=v) for v in ("", "x" * 257, INT64 + 1)],
    (b"", text(click("")), "out_of_range"),
    (b"x" * 257, text(click("x" * 257)), "out_of_range"),
    *[bad("out_of_range", event_time=v) for v in (-1, INT64 + 1)],
    bad("out_of_range", position=INT64 + 1),
    bad("out_of_range", features={str(k): 1 for k in range(33)}),
    bad("out_of_range", features={"k" * 129: 1}),
    bad("out_of_range", features={"k": "v" * 129}),
    bad("out_of_range", features={"k": INT64 + 1}),
    *[bad("unknown_type", type=v) for v in ("", "purchase", "Click")],
    *[
        bad("bad_time", event_time=v)
        for v in (
            "",
            "yesterday",
            str(T),
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-11-14T22:13:20.5",
            "2023-02-30T00:00:00Z",
            "2023-11-14T24:01:00Z",
            "2023-11-14T22:13:20+25:00",
            "2023-11-14T22:13:20.Z",
            " 2023-11-14T22:13:20Z",
        )
    ],
    of("key_mismatch", text(click("bad")), b"good"),
    of("key_mismatch", text(click("bad")), b""),
    of("key_mismatch", text(click("bad")), b"\xff\xfe"),
    of("key_mismatch", text(click(42)), b"042"),
    of("null_key", text(click("bad")), None),
    of("null_key", None, None),
    of("missing_field", b'{"type":"heartbeat"}', None),
    of("wrong_type", b'{"type":"heartbeat","event_time":true}', None),
    of("too_large", sized("bad", MIB + 1)),
    of("too_large", b"x" * (MIB + 1)),
]


@pytest.fixture(scope="module")
def system(fresh: Fresh) -> System:
    system = fresh()
    rows: list[tuple[bytes | None, bytes | None, int | None]] = []
    for user, (values, _) in GOOD.items():
        rows += [(user.encode(), value, None) for value in values]
    for user, order in {"in order": RUNS, "shuffled": [RUNS[n] for n in (4, 2, 5, 1, 0, 3)]}.items():
        rows += [(user.encode(), profile(user, at, features), None) for at, features in order]
    rows += [(key, value, 2) for key, value, _ in BAD]
    rows += [(None, text({"type": "heartbeat", "event_time": T, "extra": 1}), p) for p in range(4)]
    now = SystemClock().now_ms()
    rows.append((b"soon", text(click("soon", event_time=now + 50_000)), None))
    rows.append((b"too soon", text(click("too soon", event_time=now + 75_000)), 2))
    system.publish(rows)
    system.run("sequencer", "--until-end")
    return system


@pytest.fixture(scope="module")
def sequences(system: System) -> dict[str, list[Json]]:
    exported = system.exported()
    assert [s["user_id"] for s in exported] == sorted(s["user_id"] for s in exported)
    return {s["user_id"]: s["events"] for s in exported}


@pytest.fixture(scope="module")
def letters(system: System) -> list[Any]:
    return system.read("dead-letters")


@pytest.mark.parametrize("user", GOOD)
def test_a_good_event_reads_as_the_contract_says(sequences: dict[str, list[Json]], user: str) -> None:
    assert sequences.get(user, []) == GOOD[user][1]


def test_a_bad_record_makes_no_sequence(sequences: dict[str, list[Json]]) -> None:
    assert set(sequences) - set(GOOD) == {"in order", "shuffled", "soon"}
    assert {u for u in GOOD if u not in sequences} == {"erased", "never there"}


@pytest.mark.parametrize("user", ["in order", "shuffled"])
def test_of_equal_profiles_in_a_row_the_first_is_kept(sequences: dict[str, list[Json]], user: str) -> None:
    assert [(e["type"], e["event_time"] - T) for e in sequences[user]] == [("profile", at) for at in STARTS]


def test_each_bad_record_has_one_letter_that_names_its_source(system: System, letters: list[Any]) -> None:
    published = {(m.partition(), m.offset()): m for m in system.read("events")}
    for letter in letters:
        headers = dict(letter.headers())
        assert sorted(headers) == ["offset", "partition", "reason", "topic"]
        assert headers["topic"].decode() == f"{system.prefix}.events"
        source = published.pop((int(headers["partition"]), int(headers["offset"])))
        assert (letter.partition(), letter.key(), letter.value()) == (source.partition(), source.key(), source.value())
    assert len(letters) == len(BAD) + 1


@pytest.mark.parametrize("n", range(len(BAD)), ids=lambda n: f"{n}-{BAD[n][2]}")
def test_a_bad_record_lies_under_its_reason(letters: list[Any], n: int) -> None:
    key, value, reason = BAD[n]
    assert [dict(m.headers())["reason"].decode() for m in letters if (m.key(), m.value()) == (key, value)] == [reason]


def test_a_minute_ahead_of_the_records_own_time_is_too_far(letters: list[Any]) -> None:
    assert [dict(m.headers())["reason"] for m in letters[-1:]] == [b"future_time"]


def test_several_faults_make_one_letter(fresh: Fresh) -> None:
    """Whatever the order in which they are found; also texts that no UTF-8 can carry, and numbers beyond any type."""
    system = fresh()
    worst = {"type": "purchase", "event_id": 7, "user_id": [], "event_time": "never", "features": 3}
    deep = text(click("bad"))[:-1] + b',"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    rows = [
        (None, text(worst), 0),
        (b"x", text(worst), 0),
        (b"bad", text(click("bad", item_id="\ud800")), 0),
        (b"bad", text(click("bad", features={"\udfff": 1})), 0),
        (b"bad", deep, 0),
        (b"good", text(click("good")), 0),
        (b"huge", text(click("huge"))[:-1] + b',"n":' + b"9" * 10_000 + b',"f":1e999}', 0),
    ]
    system.publish(list(rows))
    system.run("sequencer", "--until-end")
    positions = [int(dict(m.headers())["offset"]) for m in system.read("dead-letters")]
    assert positions[:4] == [0, 1, 2, 3]
    assert len(set(positions)) == len(positions)
    assert {s["user_id"] for s in system.exported()} | {"bad", "huge"} == {"good", "bad", "huge"}
