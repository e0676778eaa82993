"""The comparison: fair baselines, the same targets for all, and nothing learned before it is judged."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgr.errors import DataError
from streamgr.lab.compare import (
    SHRINK,
    Answer,
    Comparison,
    Plan,
    Popularity,
    Row,
    Tail,
    Tally,
    closed_together,
    read_rows,
)


def row(event: str, item: str = "a", *, click: bool = False, p: float | None = 0.5, **more: object) -> Row:
    fields = {
        "event_id": event,
        "user": "u",
        "item": item,
        "time": 0,
        "watermark": 1000,
        "version": 1,
        "labels": ["click"] if click else [],
        "kind": "impression",
        "p": None if p is None else {"click": p},
        "rank": None,
        "offset": 0,
        "partition": 0,
    }
    return Row(**(fields | more))  # type: ignore[arg-type]


def comparison(*, oracle: bool = False) -> Comparison:
    return Comparison("click", half_life_seconds=60.0, live_seconds=60.0, oracle=oracle)


# -- popularity


def test_an_unknown_item_gets_the_base_rate() -> None:
    popularity = Popularity(60.0, 60.0)
    for _ in range(400):
        popularity.learn("a", 0, clicked=False, shown=True)
    assert popularity.predict("never seen", 0) < 0.05


@given(clicks=st.integers(0, 50), passes=st.integers(0, 50))
def test_a_rate_lies_between_the_items_own_and_the_base_rate(clicks: int, passes: int) -> None:
    popularity = Popularity(60.0, 60.0)
    for clicked in [True] * clicks + [False] * passes:
        popularity.learn("a", 0, clicked=clicked, shown=True)
    if clicks + passes:
        base, own = popularity.predict("other", 0), clicks / (clicks + passes)
        assert min(base, own) - 1e-9 <= popularity.predict("a", 0) <= max(base, own) + 1e-9


def test_counts_fade_with_event_time_towards_the_base_rate() -> None:
    popularity = Popularity(half_life_seconds=10.0, live_seconds=1000.0)
    for _ in range(100):
        popularity.learn("good", 0, clicked=True, shown=True)
        popularity.learn("bad", 0, clicked=False, shown=True)
    base = popularity.predict("other", 0)
    fresh, aged, old = (popularity.predict("good", ms) for ms in (0, 10_000, 200_000))
    assert fresh == pytest.approx((100 + SHRINK * base) / (100 + SHRINK))
    assert aged == pytest.approx((50 + SHRINK * base) / (50 + SHRINK))
    assert old == pytest.approx(base, abs=1e-3)


def test_ranks_count_live_items_only_and_ties_share_their_middle() -> None:
    popularity = Popularity(60.0, live_seconds=30.0)
    for n in range(300):  # beyond the first allocation
        popularity.learn(f"i{n}", 100_000, clicked=False, shown=True)
    popularity.learn("best", 100_000, clicked=True, shown=True)
    popularity.learn("gone", 60_000, clicked=True, shown=True)
    assert popularity.rank("best", 100_000) == 1
    assert popularity.rank("i7", 100_000) == 1 + 1 + 299 // 2
    assert popularity.rank("gone", 100_000) == popularity.rank("unknown", 100_000) == -1


# -- the figures


@given(st.lists(st.booleans(), min_size=2, max_size=200).filter(lambda labels: 0 < sum(labels) < len(labels)))
def test_guessing_the_base_rate_is_a_normalized_entropy_of_one(labels: list[bool]) -> None:
    tally = Tally()
    for label in labels:
        tally.judge(label, {"continuous": sum(labels) / len(labels)})
    assert tally.normalized_entropy("continuous") == pytest.approx(1.0)


def test_a_figure_that_cannot_be_known_is_none() -> None:
    tally = Tally()
    assert tally.normalized_entropy("oracle") is None and tally.hit_rate("frozen") is None
    tally.judge(True, {"continuous": 0.9})
    assert tally.normalized_entropy("continuous") is None, "one class only"


def test_a_probability_of_zero_or_one_stays_finite() -> None:
    tally = Tally()
    tally.judge(True, {"continuous": 0.0})
    tally.judge(False, {"continuous": 1.0})
    assert math.isfinite(tally.normalized_entropy("continuous") or math.nan)


def test_hits_are_ranks_from_one_to_ten() -> None:
    tally = Tally()
    for rank in (1, 10, 11, -1):
        tally.search({"continuous": rank})
    assert tally.hit_rate("continuous") == 0.5


# -- the comparison


def test_popularity_is_judged_before_it_learns_what_closed_with_it() -> None:
    """Two rows of one record: the second may not profit from the first."""
    together, apart = comparison(), comparison()
    rows = [row("e1", click=True), row("e2", click=True), row("e3", item="b")]
    together.close(rows, {}, {})
    for one in rows:
        apart.close([one], {}, {})
    assert together.total.loss["popularity"] > apart.total.loss["popularity"]


def test_after_the_freeze_all_models_are_judged_on_the_same_targets() -> None:
    c = comparison(oracle=True)
    c.close([row("before", click=True)], {}, {"before": {"click": 0.5}})
    c.freeze(7)
    answers = {"e1": Answer({"click": 0.4}, 3), "e2": Answer({"click": 0.2}, None), "e4": Answer({"click": 0.1}, None)}
    truth = {"e1": {"click": 0.9}, "e2": {"click": 0.1}, "e3": {"click": 0.1}}
    rows = [row("e1", click=True, rank=12), row("e2"), row("no frozen answer: e3"), row("e4")]
    c.close(rows, answers, truth)
    assert c.frozen_version == 7 and c.learned_at_freeze == 1 and c.learned == 5
    assert c.left_out == 2, "without the frozen answer, or without the truth, nobody is judged"
    assert c.total.targets == 2
    assert c.total.loss.keys() == {"continuous", "frozen", "popularity", "oracle"}
    assert c.total.loss["frozen"] == pytest.approx(-math.log(0.4) - math.log(0.8))
    assert c.total.loss["oracle"] == pytest.approx(-2 * math.log(0.9))
    assert c.total.hits == {"continuous": 0, "frozen": 1, "popularity": 1}, "ranks 12, 3 and, as the only item, 1"


def test_a_replay_has_no_oracle_and_loses_no_target_for_it() -> None:
    c = comparison()
    c.close([row("e1"), row("e2", click=True)], {}, {})
    assert c.left_out == 0 and c.total.targets == 2
    assert c.total.normalized_entropy("oracle") is None


def test_an_organic_action_is_a_retrieval_target_only() -> None:
    c = comparison()
    c.close([row("e1", p=None, kind="click", rank=1)], {}, {})
    c.close([row("e2", p=None, kind="click", rank=2)], {}, {})
    assert c.total.targets == 0 and c.total.retrievals == 2
    assert c.total.hit_rate("continuous") == 1.0 and c.total.hit_rate("popularity") == 0.5


# -- when to freeze, and the log


def test_a_timed_run_freezes_when_a_third_of_its_targets_are_learned() -> None:
    plan = Plan(seconds=30.0, label_delay_seconds=2.0)
    assert not plan.due(learned=0, elapsed_seconds=29.0), "nothing learned, nothing to freeze"
    rate = 100.0
    frozen = next(t for t in range(1, 40) if plan.due(int(rate * max(0, t - 2)), float(t)))
    assert (frozen - 2) / 30 == pytest.approx(1 / 3, abs=0.05)


def test_a_replay_freezes_at_a_third_of_the_file() -> None:
    plan = Plan(targets=300)
    assert not plan.due(99, 1e9) and plan.due(100, 0.0)


def test_rows_are_grouped_by_the_record_that_closed_them() -> None:
    rows = [row("a", offset=1), row("b", offset=1), row("c", offset=1, partition=1), row("d", offset=2)]
    assert [[r.event_id for r in group] for group in closed_together(rows)] == [["a", "b"], ["c"], ["d"]]
    assert list(closed_together([])) == []


def test_a_tail_hands_out_whole_lines_once(tmp_path: Path) -> None:
    file = tmp_path / "log"
    tail = Tail(file)
    assert tail.lines() == []
    file.write_bytes(b"one\ntw")
    assert tail.lines() == [b"one"]
    with file.open("ab") as more:
        more.write(b"o\n\nthree\n")
    assert tail.lines() == [b"two", b"three"]
    assert tail.lines() == []


def test_the_trainers_line_is_read_and_damage_is_named() -> None:
    line = (
        b'{"event_id":"r2.0","user":"u38","item":"i63","time":5,"watermark":9,"version":1,"labels":["click"],'
        b'"kind":"impression","p":{"click":0.12,"like":0.1},"rank":-1,"live":0,"offset":66,"partition":1,"learned_ms":7}'
    )
    (read,) = read_rows([line], "predictions")
    assert read.p == {"click": 0.12, "like": 0.1} and read.rank == -1
    with pytest.raises(DataError, match="predictions"):
        read_rows([line[:-9]], "predictions")
