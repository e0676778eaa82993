"""The board: records and readings in, one snapshot out; and nothing old shown as if it were now."""

import json
import math

import pytest

from streamgr.config import Config, Monitor
from streamgr.errors import ConfigError
from streamgr.monitor.board import AUC, CALIBRATION, CTR, LETTERS, NE, Board, group_versions
from streamgr.monitor.readings import Readings, Target
from streamgr.monitor.sums import Sums
from streamgr.monitor.timeline import Timeline
from streamgr.monitor.windows import Windows
from streamgr.scrape import Metrics
from streamgr.weights.log import Entry
from streamgr.weights.manifest import ClaimRecord, Rejected, Unpinned
from tests.monitor import kit
from tests.monitor.kit import T0


def test_a_lived_board_says_what_is() -> None:
    shown = kit.lived().snapshot(T0)
    json.dumps(shown, allow_nan=False)
    assert shown["freshness"] == {
        "target_seconds": 60.0,
        "age_seconds": 1.5,
        "status": "fresh",
        "answered": {"n": 90, "p50": pytest.approx(1.0, abs=0.1), "p99": pytest.approx(58.8, abs=0.5)},
        "share_within_target": 1.0,
        "as_of_ms": T0,
    }
    assert {h["name"]: h["n"] for h in shown["hops"]} == {
        "event_to_sequence_seconds": 900,
        "label_to_gradient_seconds": 0,
        "gradient_to_serving_seconds": 0,
        "event_to_serving_seconds": 0,  # nothing moved within the window
    }
    assert shown["lag"][0] | {"as_of_ms": 0} == {
        "source": "scorer", "topic": "streamgr.events", "records": 3, "seconds": 1.5, "as_of_ms": 0,
    }  # fmt: skip
    assert shown["traffic"]["events_per_second"] == 100.0
    assert shown["quality"]["tasks"]["click"]["normalized_entropy"] == 0.82
    assert shown["quality"]["tasks"]["like"]["normalized_entropy"] is None
    assert shown["vocabulary"]["slots"] == 4096 and shown["vocabulary"]["evictions"] == {"expired": 24, "full": 0}
    assert shown["weights"]["served"] == 7 and shown["weights"]["newest"] == 50
    assert shown["weights"]["rejected"] == {"digest": 2}
    assert shown["dead_letters"]["hour"] == 3
    assert shown["dead_letters"]["by_reason"] == {"bad_time": 2, "other": 1}
    assert shown["canary"]["weights"]["last"] == 2.4
    assert [(s["name"], s["up"]) for s in shown["sources"]] == [(n, True) for n in ("broker", *kit.SOURCES)]
    away = kit.lived().snapshot(T0 + 6_000)
    assert not away["sources"][0]["up"] and away["broker"]["as_of_ms"] == T0


def test_online_quality_is_by_version_and_in_the_metrics() -> None:
    board = kit.lived()
    board.tick(T0)
    online = board.snapshot(T0)["online"]
    assert online["samples"] == 40
    click = online["tasks"]["click"]
    assert (click["targets"], click["ctr"], click["calibration"]) == (40, 14 / 40, round(40 * 0.3 / 14, 4))
    assert online["versions"] == [{"first": 30, "last": 31, "tasks": online["tasks"]}]
    wanted = {NE: click["normalized_entropy"], CALIBRATION: click["calibration"], AUC: 0.5, CTR: 0.35}
    for figure, value in wanted.items():
        assert figure.labels("click")._value.get() == pytest.approx(value, abs=1e-3)
    assert math.isnan(NE.labels("like")._value.get()), "no like was seen: nothing to divide by"


def test_what_a_source_last_said_grows_old_and_the_source_is_away() -> None:
    board = kit.lived()
    for seconds in range(1, 13):
        at = T0 + seconds * 1000
        board.silent("trainer", "Connection refused", at)
        board.answered("scorer", kit.scorer(at - 2_000), "", at)
        board.tick(at)
    shown = board.snapshot(at)
    trainer = next(s for s in shown["sources"] if s["name"] == "trainer")
    assert (trainer["up"], trainer["silent_seconds"], trainer["why"]) == (False, 12.0, "Connection refused")
    assert shown["vocabulary"]["as_of_ms"] == shown["quality"]["as_of_ms"] == T0, "the last figures, and since when"
    assert shown["vocabulary"]["used"] == 96
    assert shown["freshness"]["as_of_ms"] == at
    assert shown["points"][-1]["used"] is None and shown["points"][-1]["ne"] is None, "a gap, not a line that goes on"
    assert shown["points"][-1]["age"] == 2.0


def test_freshness_of_a_scorer_that_is_away_is_not_known() -> None:
    board = kit.lived()
    assert board.snapshot(T0 + 4_000)["freshness"]["status"] == "fresh"
    shown = board.snapshot(T0 + 5_000)["freshness"]
    assert (shown["status"], shown["age_seconds"], shown["as_of_ms"]) == ("unknown", 1.5, T0)


def test_weights_older_than_the_target_are_stale() -> None:
    board = kit.lived()
    board.answered("scorer", kit.scorer(T0 - 61_000), "", T0)
    assert board.snapshot(T0)["freshness"]["status"] == "stale"


def test_a_board_that_has_seen_nothing_says_so() -> None:
    shown = Board(Config(), T0).snapshot(T0 + 1_000)
    json.dumps(shown, allow_nan=False)
    assert shown["freshness"]["status"] == "unknown" and shown["freshness"]["age_seconds"] is None
    assert shown["weights"]["newest"] is None and shown["vocabulary"]["slots"] is None
    assert all(not s["up"] and s["silent_seconds"] == 1.0 for s in shown["sources"])


def test_a_restarted_role_counts_from_nought() -> None:
    readings = Readings([Target("s", "http://s")], 60_000, T0)
    for seconds, count in ((0, 900), (1, 1_000), (2, 40)):
        text = kit.histogram("event_to_sequence_seconds", {0.25: count, float("inf"): count})
        readings.answered("s", Metrics(text + "\n"), "", T0 + 1_000 * seconds)
    assert readings.lately("event_to_sequence_seconds") == {0.25: 40, math.inf: 40}


def test_percentiles_are_of_the_window_not_of_the_whole_life() -> None:
    readings = Readings([Target("s", "http://s")], 10_000, T0)
    for seconds in range(100):
        slow = 1_000 if seconds >= 50 else 20 * seconds  # until 50 s everything was slow, then fast
        counts = {1.0: max(0, seconds - 50), 60.0: slow + max(0, seconds - 50), math.inf: slow + max(0, seconds - 50)}
        readings.answered(
            "s", Metrics(kit.histogram("score_model_age_seconds", counts) + "\n"), "", T0 + 1_000 * seconds
        )
    assert readings.lately("score_model_age_seconds") == {1.0: 10, 60.0: 10, math.inf: 10}
    assert len(readings.sources["s"].kept) <= 12


def test_the_timeline_knows_pins_claims_and_who_was_fenced_off() -> None:
    timeline = Timeline()
    for entry in (
        Entry(0, ClaimRecord(T0, 0)),
        Entry(1, kit.manifest(1, kind="snapshot")),
        Entry(2, ClaimRecord(T0 + 5, 1)),
        Entry(3, kit.manifest(2)),
        Entry(4, kit.manifest(2, epoch=2)),
        kit.pin(1, 5, "clicks fell"),
        Entry(6, Rejected("digest", "flipped")),
    ):
        timeline.take(entry, T0 + 9)
    shown = timeline.show()
    assert [(v["version"], v["fenced"]) for v in shown["versions"]] == [(1, False), (2, True), (2, False)]
    assert (shown["pinned"], shown["unreadable"]) == (1, 1)
    assert [m["kind"] for m in shown["marks"]] == ["claim", "claim", "pin"]
    timeline.take(Entry(7, Unpinned()), T0 + 10)
    assert timeline.show()["pinned"] is None
    assert timeline.show()["marks"][-1] == {"kind": "unpin", "at_ms": T0 + 10, "version": 1, "why": ""}


def test_reasons_are_the_contracts_and_all_others_are_one() -> None:
    before = {reason: LETTERS.labels(reason)._value.get() for reason in ("null_key", "other")}
    board = Board(Config(), T0)
    for reason in ("null_key", "made up", "x" * 1000):
        board.dead_letter(reason, T0, 0)
    after = {reason: LETTERS.labels(reason)._value.get() - n for reason, n in before.items()}
    assert after == {"null_key": 1, "other": 2}


def test_what_a_table_kept_comes_back() -> None:
    first, second = kit.lived(), Board(kit.config(), T0)
    kept = [first.dead_letter("bad_time", T0, 0)]
    first.score(kit.score("v", T0, 50, {"a": 0.4}))
    shown = {"type": "impression", "event_id": "e", "user_id": "v", "item_id": "a", "event_time": T0 + 20}
    first.events(kit.events([shown], T0 + 20), T0 + 20)
    kept += first.settle(T0 + 60_000)
    for table, key, at_ms, value in kept:
        step = 60_000 if table == "dead_letters" else second.quality_step_ms
        second.restore(table, key, at_ms - at_ms % step, json.loads(json.dumps(value)))
    after = second.snapshot(T0 + 1_000)
    assert after["dead_letters"]["by_reason"] == {"bad_time": 1}
    assert after["online"]["tasks"]["click"]["targets"] == 1
    with pytest.raises((ValueError, TypeError)):
        second.restore("quality", "1/click/0", T0, [1, 2])


def test_unreadable_scores_are_counted_and_change_nothing() -> None:
    board = Board(kit.config(), T0)
    for value in (None, b"{", b'{"kind": "rank"}', b"\xff"):
        board.score(value)
    online = board.snapshot(T0)["online"]
    assert (online["samples"], online["unreadable"]) == (0, 4)


def test_windows_add_up_and_go() -> None:
    windows: Windows[int] = Windows(10, 100)
    for at in (0, 5, 12, 29):
        windows.add("a", at, 1)
    assert windows.since(0) == {"a": 4}
    assert windows.since(10) == {"a": 2} and windows.since(9) == {"a": 4}
    assert list(windows.each(10)) == [(10, {"a": 1}), (20, {"a": 1})]
    windows.forget(111)
    assert windows.since(0) == {"a": 2}


def test_versions_are_shown_together_until_they_say_something() -> None:
    assert group_versions({}) == []
    assert group_versions({7: 3}) == [(7, 7)]
    assert group_versions({v: 50 for v in range(1, 11)}) == [(7, 10), (3, 6)]
    assert group_versions({1: 500, 2: 500, 9: 500}) == [(9, 9), (2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("text", "name", "url"),
    [
        ("http://sequencer:9464", "sequencer", "http://sequencer:9464"),
        ("http://127.0.0.1:9465/", "127.0.0.1:9465", "http://127.0.0.1:9465"),
        ("trainer=http://127.0.0.1:9465", "trainer", "http://127.0.0.1:9465"),
    ],
)
def test_targets_have_names(text: str, name: str, url: str) -> None:
    assert Target.of(text) == Target(name, url)


@pytest.mark.parametrize(
    "text", ["sequencer:9464", "ftp://x", "http://", "http://a:b", "http://a/metrics", "=http://a"]
)
def test_what_is_no_target_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.scrape"):
        Target.of(text)


def test_sums_survive_the_wire() -> None:
    assert Sums.unpack(json.loads(json.dumps(Sums.of(0.3, True).pack()))) == Sums.of(0.3, True)


def test_the_default_target_is_an_edge() -> None:
    from streamgr.telemetry import FRESHNESS_BUCKETS

    assert Monitor().target_seconds in FRESHNESS_BUCKETS
