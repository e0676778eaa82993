"""The oracle against its plain twin on the same streams, and both against a few that are worked out by hand."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import streams
from tests.oracle import Json, Oracle, Target
from tests.slow_oracle import SlowOracle

Model = type[Oracle] | type[SlowOracle]
TIMES = st.integers(0, 15)
USERS = st.sampled_from("uv")
EVENTS = st.builds(
    lambda kind, time, event_id, user, item, request, features: {
        "type": kind, "event_time": time, "event_id": event_id, "user_id": user,
        **({"features": features} if kind == "profile" else {"item_id": item}),
        **({"request_id": request} if request and kind != "profile" else {}),
    },
    st.sampled_from(["impression", "impression", "click", "like", "profile"]),
    TIMES, st.sampled_from(["1", "2", "\uffff", "💡"]), USERS,
    st.sampled_from("ij"), st.sampled_from([None, "r", "s"]), st.sampled_from([{}, {"a": 1}, {"a": "1"}]),
)  # fmt: skip
HEARTBEATS = st.builds(lambda time: {"type": "heartbeat", "event_time": time}, TIMES)
ERASURES = st.builds(lambda user: {"erase": user}, USERS)
RECORDS = st.integers(0, 15).flatmap(lambda n: {14: HEARTBEATS, 15: ERASURES}.get(n, EVENTS))


def impression(event_id: str, at: int, item: str = "i", user: str = "u", **more: str) -> Json:
    return {"type": "impression", "event_id": event_id, "event_time": at, "item_id": item, "user_id": user, **more}


def click(event_id: str, at: int, item: str = "i", user: str = "u", **more: str) -> Json:
    return impression(event_id, at, item, user, **more) | {"type": "click"}


def profile(event_id: str, at: int, **features: str) -> Json:
    return {"type": "profile", "event_id": event_id, "event_time": at, "user_id": "u", "features": features}


def heartbeat(at: int) -> Json:
    return {"type": "heartbeat", "event_time": at}


def fed(model: Model, *records: Json, **limits: int) -> Oracle | SlowOracle:
    """A window of 10, lateness of 2, steps of 1, unless told otherwise; offsets from 0."""
    arguments: Any = {"window_ms": 10, "lateness_ms": 2, "step_ms": 1, **limits}
    oracle = model(**arguments)
    for offset, record in enumerate(records):
        oracle.feed(offset, record)
    return oracle


def ids(oracle: Oracle | SlowOracle) -> list[list[str]]:
    return [[e["event_id"] for e in sequence["events"]] for sequence in oracle.sequences()]


def facts(oracle: Oracle | SlowOracle) -> tuple[Any, ...]:
    targets = sorted((t.offset, t.user, t.event_id, t.item, t.labels) for t in oracle.targets)
    counts = (oracle.duplicates, oracle.expired, oracle.late)
    return targets, counts, oracle.newest, oracle.watermark, list(oracle.sequences())


@pytest.fixture(params=[Oracle, SlowOracle])
def model(request: pytest.FixtureRequest) -> Model:
    chosen: Model = request.param
    return chosen


@settings(max_examples=500, deadline=None)
@given(
    records=st.integers(0, 50).flatmap(lambda n: st.lists(RECORDS, min_size=n, max_size=n)),
    drift=st.sampled_from([0, 1, 2]),
    window=st.integers(1, 15),
    lateness=st.integers(0, 8),
    step=st.integers(1, 5),
    max_step=st.sampled_from([0, 1, 4, 20]),
    keep=st.sampled_from([None, 0, 3]),
)
def test_twins_agree(
    records: list[Json], drift: int, window: int, lateness: int, step: int, max_step: int, keep: int | None
) -> None:
    """So few users, items, ids and times that everything collides, while time drifts on."""
    keep_ms = 0 if keep is None else window + lateness + step + keep
    fast = Oracle(window, lateness, step, max_step_ms=max_step, keep_ms=keep_ms)
    slow = SlowOracle(window, lateness, step, max_step_ms=max_step, keep_ms=keep_ms)
    for offset, record in enumerate(records):
        if drift and "erase" not in record:
            record = {**record, "event_time": record["event_time"] + drift * offset}
        fast.feed(offset, record)
        slow.feed(offset, record)
        assert facts(fast) == facts(slow)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("limits", [{}, {"max_step_ms": 700, "keep_ms": 5_000}])
def test_twins_agree_on_a_stream(seed: int, limits: Any) -> None:
    records = [*streams.events(seed, 400, users=5, items=8, span_ms=20_000), heartbeat(streams.START + 60_000)]
    fast, slow = Oracle(2_000, 1_000, 200, **limits), SlowOracle(2_000, 1_000, 200, **limits)
    for offset, record in enumerate(records):
        fast.feed(offset, record)
        slow.feed(offset, record)
    assert facts(fast) == facts(slow)
    assert fast.duplicates and fast.late and len(fast.targets) > 100
    assert bool(fast.expired) == bool(limits)


def test_labels(model: Model) -> None:
    """A window has its start and not its end; an action joins the latest impression, of its request if it has one."""
    oracle = fed(
        model,
        impression("a", 0, request_id="r"),
        impression("b", 4),
        click("1", 4, request_id="r") | {"type": "like"},
        click("2", 13),
        click("3", 14),
        click("4", 10, request_id="r"),
        heartbeat(16),
    )
    assert set(oracle.targets) == {
        Target(3, "u", "a", "i", ("like",)),  # 13 closes what was shown at 0, with 2 of lateness: 11 >= 10
        Target(6, "u", "b", "i", ("click",)),
        Target(6, "u", "3", "i", ("click",)),  # organic
        Target(6, "u", "4", "i", ("click",)),  # of request r, whose window ended at 10
    }
    [sequence] = oracle.sequences()
    assert sequence["events"][0] == {
        "type": "impression", "item_id": "i", "event_time": 0, "event_id": "a", "actions": ["like"],
    }  # fmt: skip
    assert oracle.late == 0


def test_late(model: Model) -> None:
    oracle = fed(
        model,
        impression("a", 0),
        heartbeat(12),
        click("late", 5),
        impression("too late", 0, "j"),
        click("later", 5, "j"),
        heartbeat(40),
    )
    assert set(oracle.targets) == {Target(1, "u", "a", "i", ())}
    [sequence] = oracle.sequences()
    assert [e.get("actions") for e in sequence["events"]] == [["click"], ["click"], None, None]
    assert [e.get("late") for e in sequence["events"]] == [None, True, True, True]
    assert oracle.late == 3


def test_late_stays_late(model: Model) -> None:
    """A late action gains no label for an impression that comes later still and takes it."""
    oracle = fed(model, impression("a", 0), heartbeat(12), click("1", 9), impression("b", 5), heartbeat(40))
    assert set(oracle.targets) == {Target(1, "u", "a", "i", ()), Target(4, "u", "b", "i", ())}
    [sequence] = oracle.sequences()
    assert [e.get("actions") for e in sequence["events"]] == [None, ["click"], None]


def test_order(model: Model) -> None:
    """At the same time: profile, impressions, actions by kind; ids by their UTF-8, where UTF-16 would say otherwise."""
    like = click("0", 5) | {"type": "like"}
    oracle = fed(
        model, like, click("3", 5), impression("💡", 5), impression("\uffff", 5), profile("9", 5), heartbeat(99)
    )
    assert ids(oracle) == [["9", "\uffff", "💡", "3", "0"]]
    assert set(oracle.targets) == {
        Target(5, "u", "\uffff", "i", ()),
        Target(5, "u", "💡", "i", ("click", "like")),
    }


def test_the_same_again_moves_nothing(model: Model) -> None:
    again = [impression("a", 50), impression("a", 50), impression("a", 50)]
    oracle = fed(model, heartbeat(10), *again, max_step_ms=5)
    assert (oracle.newest, oracle.watermark, oracle.duplicates) == (15, 13, 2)
    oracle = fed(model, heartbeat(10), *again, {"erase": "u"}, *again, max_step_ms=5)
    assert (oracle.newest, oracle.watermark, oracle.duplicates) == (20, 18, 4)


def test_one_record_moves_so_far(model: Model) -> None:
    oracle = fed(model, heartbeat(1000), heartbeat(10), heartbeat(1100), heartbeat(1025), max_step_ms=20, step_ms=10)
    assert (oracle.newest, oracle.watermark) == (1025, 1020)


def test_erasure_takes_the_open_labels_along(model: Model) -> None:
    oracle = fed(model, impression("a", 0), {"erase": "u"}, click("1", 1), heartbeat(100))
    assert oracle.targets == [Target(3, "u", "1", "i", ("click",))]
    assert ids(oracle) == [["1"]]


def test_expired(model: Model) -> None:
    """Kept is what is not before the cut, watermark - keep: 98 - 13 = 85."""
    late = [impression("a", 84), profile("p", 84), click("b", 84), click("a", 85, user="v"), click("a", 85, user="v")]
    oracle = fed(model, heartbeat(100), *late, keep_ms=13)
    assert (oracle.expired, oracle.duplicates, ids(oracle)) == (3, 1, [["a"]])
    oracle.feed(9, heartbeat(101))
    assert (ids(oracle), len(oracle.targets)) == ([], 1)
    assert fed(model, *late, heartbeat(100)).expired == 0


def test_the_profile_that_holds_stays(model: Model) -> None:
    profiles = [profile("1", 1, c="B"), profile("2", 2, c="B"), profile("3", 20, c="B"), profile("4", 21, c="U")]
    oracle = fed(model, *profiles, impression("a", 6), keep_ms=13)
    assert ids(oracle) == [["2", "a", "4"]]  # watermark 19, cut 6: the second holds, and the third says the same
    oracle = fed(model, *profiles, heartbeat(30), keep_ms=13)
    assert ids(oracle) == [["2", "4"]]  # cut 15
    oracle = fed(model, *profiles, heartbeat(36), keep_ms=13)
    assert ids(oracle) == [["3", "4"]]  # cut 21
    oracle = fed(model, *profiles, heartbeat(99), keep_ms=13)
    assert ids(oracle) == [["4"]]


def test_no_action_joins_what_is_trimmed(model: Model) -> None:
    """Trimmed after the click came, it counts for the label all the same; before, the click is organic."""
    oracle = fed(model, impression("a", 4), click("1", 6), impression("b", 30), heartbeat(20), keep_ms=23)
    assert ids(oracle) == [["1", "b"]]
    assert oracle.targets == [Target(2, "u", "a", "i", ("click",))]
    oracle = fed(model, impression("a", 4), impression("b", 30), click("1", 6), heartbeat(31), keep_ms=23)
    assert oracle.targets == [Target(1, "u", "a", "i", ()), Target(3, "u", "1", "i", ("click",))]
