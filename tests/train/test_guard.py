"""What the guard lets out, what it holds back and says, and for how long."""

import numpy as np
import pytest
import torch

from streamgr import config
from streamgr.train.guard import CLASS_TARGETS, LET_GO, WITHHELD, Candidate, Guard
from streamgr.train.prequential import Prequential
from tests.weights.kit import quiet

SETTINGS = config.Weights(compared_versions=4, max_withheld=3)


def candidate(**changes: object) -> Candidate:
    return Candidate(
        **{
            "dense": {"w": torch.ones(3, 4), "b": torch.zeros(2)},
            "rows": torch.tensor([3, 8]),
            "weight": torch.ones(2, 4, dtype=torch.bfloat16),
            "gradient_norm": 2.0,
            "entropy": {"click": 0.9},
        }
        | changes
    )


def counted(reason: str) -> float:
    return WITHHELD.labels(reason)._value.get()


@pytest.mark.parametrize(
    ("reason", "changes", "says"),
    [
        ("nonfinite", {"dense": {"w": torch.ones(2), "b": torch.tensor([float("nan")])}}, "b holds values that are"),
        ("nonfinite", {"weight": torch.tensor([[0.0], [float("inf")]]).bfloat16()}, "1 rows of the table, first.* 8"),
        ("dense", {"dense": {"w": torch.full((100,), 1e3), "b": torch.full((100,), 1e3)}}, "1.414e.04, at most 10000"),
        ("row", {"weight": torch.tensor([[2_000.0], [1.0]]).bfloat16()}, "row 3 of the table .* 2000, at most 1000"),
        ("gradient", {"gradient_norm": 1_001.0}, "1001, at most 1000"),
    ],
)
def test_what_is_broken_is_withheld_by_name_and_never_let_go(reason: str, changes: dict, says: str) -> None:
    guard, before = Guard(SETTINGS, quiet()), counted(reason)
    for _ in range(2 * SETTINGS.max_withheld):
        verdict = guard.judge(candidate(**changes))
        assert verdict is not None and verdict.reason == reason and verdict.remedy
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(verdict.what)
    assert counted(reason) == before + 2 * SETTINGS.max_withheld
    assert guard.judge(candidate()) is None


def test_an_empty_delta_is_fine() -> None:
    none = candidate(rows=torch.zeros(0, dtype=torch.int64), weight=torch.zeros(0, 4, dtype=torch.bfloat16), dense={})
    assert Guard(SETTINGS, quiet()).judge(none) is None


def test_entropy_is_compared_with_the_median_of_the_last_versions() -> None:
    guard = Guard(SETTINGS, quiet())
    for entropy in (3.0, 0.90, 0.88, 0.92):  # nothing is compared before there are four; one of them is odd
        assert guard.judge(candidate(entropy={"click": entropy})) is None
        guard.published(candidate(entropy={"click": entropy}))
    assert guard.judge(candidate(entropy={"click": 1.13})) is None  # the median is 0.91, 1.1375 is allowed
    verdict = guard.judge(candidate(entropy={"click": 1.15}))
    assert verdict is not None and "click rose to 1.1500, the last versions' allows 1.1375" in verdict.what
    assert guard.judge(candidate(entropy={"like": 9.0})) is None  # nothing to compare it with
    assert guard.judge(candidate(entropy={})) is None  # too few targets


def test_a_rise_that_stays_becomes_the_measure() -> None:
    guard, before = Guard(SETTINGS, quiet()), LET_GO._value.get()
    for _ in range(4):
        guard.published(candidate())
    risen = candidate(entropy={"click": 2.0})
    assert [guard.judge(risen) is None for _ in range(4)] == [False, False, False, True]
    assert LET_GO._value.get() == before + 1
    guard.published(risen)
    assert guard.judge(risen) is None


def test_one_good_version_begins_the_count_anew() -> None:
    guard = Guard(SETTINGS, quiet())
    for _ in range(4):
        guard.published(candidate())
    risen = candidate(entropy={"click": 2.0})
    for _ in range(3):
        assert [guard.judge(risen) is None for _ in range(3)] == [False] * 3
        assert guard.judge(candidate()) is None


def test_recent_entropy_needs_targets_of_both_classes() -> None:
    prequential = Prequential(["click", "like"], 500, 100.0)
    random = np.random.default_rng(1)
    labels = np.stack([random.random(300) < 0.3, np.arange(300) < CLASS_TARGETS - 1], 1)
    prequential.add_ranking(np.full((300, 2), 0.3, np.float32), labels)
    assert prequential.recent_entropy(301, CLASS_TARGETS) == {}
    found = prequential.recent_entropy(300, CLASS_TARGETS)
    assert found.keys() == {"click"} and found["click"] == pytest.approx(1.0, abs=0.01)
    prequential.add_ranking(np.full((300, 2), 0.99, np.float32), labels)  # only the newest count
    assert prequential.recent_entropy(300, CLASS_TARGETS)["click"] > 3
