"""Joins, order and lateness (decision 9), as `sequences export` and `examples list` tell them.

Each scenario is a user; times are milliseconds after T. The stream comes in two halves: between them a heartbeat at
30 s carries every watermark to 25 s, which closes what was shown up to 15 s; after them another closes all.
"""

import itertools
import json

import pytest

from tests.contract.conftest import Fresh
from tests.system import PARTITIONS, Json, System

T = 1_700_000_000_000
WINDOW = 10_000
SETTINGS = {
    "sequence__attribution_window_seconds": WINDOW / 1000,
    "sequence__lateness_seconds": 5.0,
    "sequence__close_step_seconds": 1.0,
}
Event = tuple[str, str, int, str, str | None]  # type, event id, time, item, request


def imp(event_id: str, at: int, request: str | None = None, item: str = "i") -> Event:
    return "impression", event_id, at, item, request


def act(kind: str, at: int, request: str | None = None, item: str = "i", event_id: str = "") -> Event:
    return kind, event_id or f"{kind}{at}", at, item, request


# user -> first half, second half, {impression: kinds joined}, late events, {target: labels}
Scenario = tuple[list[Event], list[Event], dict[str, list[str]], set[str], dict[str, list[str]]]
W = WINDOW
SCENARIOS: dict[str, Scenario] = {
    "the window's edge, by request": (
        [imp("a", 0, "r"), act("click", W - 1, "r"), act("like", W, "r")],
        [],
        {"a": ["click"]},
        set(),
        {"a": ["click"], "like10000": ["like"]},
    ),
    "the window's edge, by item": (
        [imp("a", 0), act("click", W - 1), act("like", W)],
        [],
        {"a": ["click"]},
        set(),
        {"a": ["click"], "like10000": ["like"]},
    ),
    "at once, and before": (
        [imp("a", 1_000, "r"), act("click", 1_000, "r"), act("like", 999, "r")],
        [],
        {"a": ["click"]},
        set(),
        {"a": ["click"], "like999": ["like"]},
    ),
    "the latest impression before it": (
        [imp("a", 0, "q"), imp("b", 5_000, "r"), act("like", 4_999), act("click", 5_000)],
        [],
        {"a": ["like"], "b": ["click"]},
        set(),
        {"a": ["like"], "b": ["click"]},
    ),
    "a request beats a later impression": (
        [imp("a", 0, "q"), imp("b", 5_000, "r"), act("like", 6_000, "q"), act("click", 6_000, "r")],
        [],
        {"a": ["like"], "b": ["click"]},
        set(),
        {"a": ["like"], "b": ["click"]},
    ),
    "shown twice in one request": (
        [imp("a", 0, "r"), imp("b", 1_000, "r"), act("click", 2_000, "r"), act("like", 500, "r")],
        [],
        {"a": ["like"], "b": ["click"]},
        set(),
        {"a": ["like"], "b": ["click"]},
    ),
    "shown twice at one time": (
        [imp("b", 0, "r"), imp("a", 0, "r"), act("click", 1, "r")],
        [],
        {"b": ["click"]},
        set(),
        {"a": [], "b": ["click"]},
    ),
    "another request is organic": (
        [imp("a", 0, "r"), act("click", 1, "other")],
        [],
        {},
        set(),
        {"a": [], "click1": ["click"]},
    ),
    "another item is organic": (
        [imp("a", 0), act("click", 1, item="j")],
        [],
        {},
        set(),
        {"a": [], "click1": ["click"]},
    ),
    "a request's action meets no impression without": (
        [imp("a", 0), act("click", 1, "r")],
        [],
        {},
        set(),
        {"a": [], "click1": ["click"]},
    ),
    "kinds are sorted and named once": (
        [imp("a", 0), act("like", 1), act("click", 2), act("click", 3)],
        [],
        {"a": ["click", "like"]},
        set(),
        {"a": ["click", "like"]},
    ),
    "the action comes first": (
        [act("click", 2_000, "r"), imp("a", 1_000, "r")],
        [],
        {"a": ["click"]},
        set(),
        {"a": ["click"]},
    ),
    "a nearer impression comes later": (
        [imp("a", 0), act("click", 5_000), imp("b", 4_000)],
        [],
        {"b": ["click"]},
        set(),
        {"a": [], "b": ["click"]},
    ),
    "closed at 15 s, open at 15.001 s": (
        [],
        [imp("closed", 15_000, "q"), imp("open", 15_001, "r"), act("click", 15_500, "q"), act("like", 15_500, "r")],
        {"closed": ["click"], "open": ["like"]},
        {"closed", "click15500"},
        {"open": ["like"]},
    ),
    "the action is late": (
        [imp("a", 15_000, "r"), imp("b", 15_001, "q"), act("like", 15_100, "r")],
        [act("click", 15_200, "r"), act("click", 15_300, "q")],
        {"a": ["click", "like"], "b": ["click"]},
        {"click15200"},
        {"a": ["like"], "b": ["click"]},
    ),
    "the joined impression comes late": (
        [imp("a", 0, "q"), act("click", 6_000)],
        [imp("b", 5_000, "r")],
        {"b": ["click"]},
        {"b"},
        {"a": ["click"]},
    ),
    "an organic action has no lateness": ([], [act("click", 100)], {}, set(), {"click100": ["click"]}),
    "the same again, late": (
        [imp("a", 0), act("click", 1)],
        [imp("a", 0), act("click", 1)],
        {"a": ["click"]},
        set(),
        {"a": ["click"]},
    ),
    "ties": (
        [
            act("like", 0, event_id="a"),
            act("click", 0, event_id="é"),
            act("click", 0, event_id="z"),
            act("click", 0, event_id="Z"),
            imp("zz", 0, item="j"),
            imp("aa", 0, item="j"),
            ("profile", "zzz", 0, "", None),
        ],
        [],
        {},
        set(),
        {"a": ["like"], "é": ["click"], "z": ["click"], "Z": ["click"], "aa": [], "zz": []},
    ),
}  # fmt: skip
SHUFFLED: list[Event] = [
    imp("a", 0, "r"),
    imp("b", 3_000, "s"),
    act("click", 3_000),
    act("like", 2_999),
    act("click", 4_000, "r"),
    ("profile", "p", 3_000, "", None),
]


def value(user: str, event: Event) -> bytes:
    kind, event_id, at, item, request = event
    fields = {"type": kind, "event_id": event_id, "user_id": user, "event_time": T + at, "item_id": item or None}
    return json.dumps({**fields, "request_id": request, "features": {"k": 1} if kind == "profile" else None}).encode()


def heartbeats(at: int) -> list[tuple[None, bytes, int]]:
    return [(None, json.dumps({"type": "heartbeat", "event_time": T + at}).encode(), p) for p in range(PARTITIONS)]


@pytest.fixture(scope="module")
def system(fresh: Fresh) -> System:
    system = fresh(**SETTINGS)
    orders = itertools.islice(itertools.permutations(SHUFFLED), 0, None, 31)
    first = sorted(SCENARIOS, key=lambda u: max((e[2] for e in SCENARIOS[u][0]), default=0))  # none closes another's
    system.publish([(f"s{n}".encode(), value(f"s{n}", e), None) for n, order in enumerate(orders) for e in order])
    system.publish([(u.encode(), value(u, e), None) for u in first for e in SCENARIOS[u][0]])
    system.publish([*heartbeats(30_000)])
    system.publish([(u.encode(), value(u, e), None) for u, s in SCENARIOS.items() for e in s[1]])
    system.run("sequencer", "--until-end")
    system.still_open = {t["event_id"] for e in system.examples() for t in e["targets"]}  # type: ignore[attr-defined]
    system.publish([*heartbeats(60_000)])
    system.run("sequencer", "--until-end")
    return system


@pytest.fixture(scope="module")
def sequences(system: System) -> dict[str, list[Json]]:
    return {s["user_id"]: s["events"] for s in system.exported()}


@pytest.fixture(scope="module")
def examples(system: System) -> list[Json]:
    return list(system.examples())


@pytest.mark.parametrize("user", SCENARIOS)
def test_an_impression_lists_the_kinds_joined_to_it(sequences: dict[str, list[Json]], user: str) -> None:
    joined = {e["event_id"]: e["actions"] for e in sequences[user] if e.get("actions")}
    assert joined == SCENARIOS[user][2]


@pytest.mark.parametrize("user", SCENARIOS)
def test_what_comes_too_late_says_so(sequences: dict[str, list[Json]], user: str) -> None:
    assert {e["event_id"] for e in sequences[user] if e.get("late")} == SCENARIOS[user][3]


@pytest.mark.parametrize("user", SCENARIOS)
def test_targets_and_their_labels(examples: list[Json], user: str) -> None:
    targets = [t for e in examples if e["user"] == user for t in e["targets"]]
    assert {t["event_id"]: sorted(t["labels"]) for t in targets} == SCENARIOS[user][4]
    assert len(targets) == len(SCENARIOS[user][4])
    written = {e[1]: (e[3], T + e[2]) for half in SCENARIOS[user][:2] for e in half}
    assert all((t["item"], t["event_time"]) == written[t["event_id"]] for t in targets)


@pytest.mark.parametrize("user", SCENARIOS)
def test_every_event_is_there_once_and_in_order(sequences: dict[str, list[Json]], user: str) -> None:
    rank = {"profile": 0, "impression": 1}
    events = {e for half in SCENARIOS[user][:2] for e in half}
    order = sorted(events, key=lambda e: (e[2], rank.get(e[0], 2), e[0], e[1].encode()))
    assert [(e["type"], e["event_id"], e["event_time"] - T) for e in sequences[user]] == [e[:3] for e in order]


def test_the_order_of_arrival_does_not_show(sequences: dict[str, list[Json]], examples: list[Json]) -> None:
    told = {json.dumps(events) for user, events in sequences.items() if user.startswith("s") and user[1:].isdigit()}
    assert len(told) == 1
    joined = {e["event_id"]: e["actions"] for e in json.loads(told.pop()) if e.get("actions")}
    assert joined == {"a": ["click", "like"], "b": ["click"]}
    labels: dict[str, list[Json]] = {}
    for e in examples:
        labels.setdefault(e["user"], []).extend(e["targets"])
    assert len({json.dumps(t) for user, t in labels.items() if user.startswith("s") and user[1:].isdigit()}) == 1


def test_open_labels_stay_open_at_the_end_of_the_input(system: System) -> None:
    assert "open" not in system.still_open  # type: ignore[attr-defined]
    assert "a" in system.still_open  # type: ignore[attr-defined]


def test_positions_grow_and_name_each_example_once(examples: list[Json]) -> None:
    positions = [tuple(e["position"][k] for k in ("partition", "offset", "n")) for e in examples]
    assert len(set(positions)) == len(positions)
    for _, group in itertools.groupby(positions, key=lambda p: p[0]):
        assert (got := list(group)) == sorted(got)
