"""Questions to answers, without HTTP."""

import pytest
from prometheus_client import REGISTRY

from streamgr.errors import ConfigError
from streamgr.serve.wire import InvalidRequest, RankRequest, RetrieveRequest
from tests.serve.kit import NOW, FakeSequences, Service, Weights, settings, some_events

ITEMS = [f"i{n}" for n in range(40)]


def serving(sequences: FakeSequences | None = None, **scorer: object) -> Service:
    config = settings(**scorer)
    service = Service(config, sequences or FakeSequences({"u": some_events(20)}))
    weights = Weights(config)
    weights.learn(ITEMS)
    service.live.install(weights.publish())
    return service


def count(name: str) -> float:
    return REGISTRY.get_sample_value(f"streamgr_{name}") or 0.0


def test_the_score_is_the_weighted_sum_over_the_asked_tasks() -> None:
    ranker = serving(task_weights={"like": 5.0, "click": 0.5}).ranker
    for item in ranker.rank(RankRequest("u", ITEMS)).items:
        p = item.probabilities
        assert item.score == pytest.approx(0.5 * p["click"] + 5 * p["like"])
    for item in ranker.rank(RankRequest("u", ITEMS, ["click"])).items:
        assert item.score == pytest.approx(0.5 * item.probabilities["click"])


def test_a_task_that_the_weights_leave_out_counts_nothing() -> None:
    for item in serving(task_weights={"like": 1.0}).ranker.rank(RankRequest("u", ITEMS)).items:
        assert item.score == item.probabilities["like"]


@pytest.mark.parametrize("weights", [{"buy": 1.0}, {"click": float("nan")}])
def test_task_weights_must_be_of_tasks_and_finite(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(weights))):
        Service(settings(task_weights=weights))


def test_a_candidate_is_blind_to_the_others_and_to_their_order() -> None:
    ranker = serving().ranker
    together = {item.item_id: item.score for item in ranker.rank(RankRequest("u", ITEMS)).items}
    backwards = {item.item_id: item.score for item in ranker.rank(RankRequest("u", ITEMS[::-1])).items}
    alone = {item: ranker.rank(RankRequest("u", [item])).items[0].score for item in ITEMS}
    assert together == pytest.approx(alone, abs=1e-6)
    assert together == pytest.approx(backwards, abs=1e-6)


def test_ties_are_broken_by_the_items_text() -> None:
    ranker = serving(task_weights={"click": 0.0}).ranker
    answer = ranker.rank(RankRequest("u", ITEMS[::-1], k=7))
    assert [item.item_id for item in answer.items] == sorted(ITEMS)[:7]


def test_unknown_items_are_counted() -> None:
    ranker, before, asked = serving().ranker, count("unknown_items_total"), count("candidates_total")
    answer = ranker.rank(RankRequest("u", ["i1", "stranger", "stranger", "another"]))
    assert len(answer.items) == 3
    assert count("unknown_items_total") == before + 2
    assert count("candidates_total") == asked + 3


def test_items_without_a_text_are_left_out_counted_and_made_up_for() -> None:
    everything = serving().ranker.retrieve(RetrieveRequest("nobody", 40)).items
    missing = {item.item_id for item in everything[:15]}
    sequences = FakeSequences(unnamed=missing)
    before = count("textless_items_total")
    found = serving(sequences).ranker.retrieve(RetrieveRequest("nobody", 5)).items
    assert found == everything[15:20]
    assert count("textless_items_total") == before + 15


def test_seen_reaches_further_back_than_the_models_window() -> None:
    rows = [(1, f"i{n}", NOW - 500_000 + n * 1000, "") for n in range(40)] + some_events(64, NOW)
    service = serving(FakeSequences({"u": rows}))
    answer = service.ranker.retrieve(RetrieveRequest("u", 100))
    assert answer.sequence_length == 64  # `history_length`
    assert [item.item_id for item in answer.items] == []  # but all 40 have been seen


def test_the_event_clock_sees_everything_that_has_happened_and_the_wall_clock_what_is_past() -> None:
    ahead = FakeSequences({"u": some_events(20, NOW + 3_600_000)})
    assert serving(ahead, clock="event").ranker.rank(RankRequest("u", ["i1"])).sequence_length == 20
    early = sum(row[2] < NOW for row in ahead.users["u"])
    assert serving(ahead).ranker.rank(RankRequest("u", ["i1"])).sequence_length == early


def test_an_unknown_task_names_itself() -> None:
    with pytest.raises(InvalidRequest) as raised:
        serving().ranker.rank(RankRequest("u", ["i1"], ["like", "share"]))
    assert raised.value.field == "tasks[1]"
