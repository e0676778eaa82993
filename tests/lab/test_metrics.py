"""The measures against values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgr.lab import metrics


def test_normalized_entropy_by_hand() -> None:
    # labels 1 0 0 0 at p .5 .25 .25 .25: loss = (ln 2 + 3 ln 4/3) / 4; entropy of .25 = (ln 4)/4 + 3/4 ln 4/3
    loss = (math.log(2) + 3 * math.log(4 / 3)) / 4
    entropy = math.log(4) / 4 + 3 / 4 * math.log(4 / 3)
    assert metrics.log_loss([1, 0, 0, 0], [0.5, 0.25, 0.25, 0.25]) == pytest.approx(loss)
    assert metrics.normalized_entropy([1, 0, 0, 0], [0.5, 0.25, 0.25, 0.25]) == pytest.approx(loss / entropy)
    assert metrics.normalized_entropy([1, 0, 0, 0], [0.25] * 4) == pytest.approx(1.0)


def test_certainty_that_is_wrong_costs_much_but_not_infinitely() -> None:
    assert metrics.log_loss([1], [0.0]) == pytest.approx(-math.log(1e-7))
    assert metrics.log_loss([0], [1.0]) == pytest.approx(-math.log(1e-7))


def test_auc_by_hand() -> None:
    assert metrics.auc([1, 0], [0.9, 0.1]) == 1.0
    assert metrics.auc([0, 1], [0.9, 0.1]) == 0.0
    # positives .8 .4, negatives .6 .4 .2: pairs won 3 + 1, tied 1 of 6
    assert metrics.auc([1, 1, 0, 0, 0], [0.8, 0.4, 0.6, 0.4, 0.2]) == pytest.approx(4.5 / 6)
    assert metrics.auc([1, 0, 1, 0], [3, 3, 3, 3]) == 0.5


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30))
def test_auc_is_the_share_of_pairs_won(rows: list[tuple[bool, int]]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for y, p in rows if y for z, n in rows if not z]
    wanted = sum(pairs) / len(pairs) if pairs else None
    assert metrics.auc([y for y, _ in rows], [s for _, s in rows]) == (
        None if wanted is None else pytest.approx(wanted)
    )


def test_ranks_by_hand() -> None:
    ranks = [1, 3, 10, 11, -1]
    assert metrics.hit_rate(ranks) == pytest.approx(3 / 5)
    assert metrics.hit_rate(ranks, k=1) == pytest.approx(1 / 5)
    assert metrics.ndcg(ranks) == pytest.approx((1 + 0.5 + 1 / math.log2(11)) / 5)
    assert metrics.ndcg([1, 1], k=1) == 1.0


def test_ties_count_against() -> None:
    assert metrics.pessimistic_rank([3.0, 1.0, 2.0], 0) == 1
    assert metrics.pessimistic_rank([3.0, 3.0, 2.0], 0) == 2
    assert metrics.pessimistic_rank(np.zeros(7), 3) == 7


def test_undefined_is_none_and_never_a_guess() -> None:
    for measure in (metrics.auc, metrics.normalized_entropy, metrics.log_loss):
        assert measure([], []) is None
    for labels in ([1, 1], [0, 0]):
        assert metrics.normalized_entropy(labels, [0.5, 0.5]) is None
        assert metrics.auc(labels, [0.5, 0.1]) is None
    assert metrics.calibration([0, 0], [0.5, 0.1]) is None
    assert metrics.calibration([1, 0], [0.5, 0.25]) == 0.75
    assert metrics.hit_rate([]) is metrics.ndcg([]) is metrics.base_rate([]) is None
    with pytest.raises(ValueError, match="one length"):
        metrics.auc([1], [0.5, 0.5])
