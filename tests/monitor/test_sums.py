"""Sums of predictions against the plain measures over all of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgr.lab import metrics
from streamgr.monitor.sums import BINS_A_UNIT, Sums, total

judged = st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60)


@given(judged, st.integers(0, 60))
def test_sums_of_parts_are_the_measures_of_the_whole(rows: list[tuple[float, bool]], cut: int) -> None:
    sums = total(Sums.of(p, label) for p, label in rows[:cut]) + total(Sums.of(p, label) for p, label in rows[cut:])
    p, labels = [p for p, _ in rows], [int(label) for _, label in rows]
    assert sums.targets == len(rows)
    assert sums.rate == metrics.base_rate(labels)
    assert same(sums.normalized_entropy, metrics.normalized_entropy(labels, p))
    assert same(sums.calibration, metrics.calibration(labels, p))
    assert Sums.unpack(sums.pack()) == sums
    wanted = metrics.auc(labels, p)
    assert (sums.auc is None) == (wanted is None)
    if sums.auc is not None and wanted is not None:  # ties within a bin: at most half of the pairs that share one
        shared = sum(n * k for n, k in sums.bins.values()) / (sums.positives * (sums.targets - sums.positives))
        assert abs(sums.auc - wanted) <= shared / 2 + 1e-12


def test_a_bin_is_an_eighth_of_logit() -> None:
    low, high = (1 / (1 + math.exp(-k / BINS_A_UNIT)) for k in (3.01, 4.01))
    assert Sums.of(low, True).bins.keys() != Sums.of(high, True).bins.keys()
    assert Sums.of(low, True).bins.keys() == Sums.of(low + 1e-4, True).bins.keys()


def test_nothing_judged_has_no_measures() -> None:
    assert (Sums().rate, Sums().normalized_entropy, Sums().calibration, Sums().auc) == (None, None, None, None)


def same(a: float | None, b: float | None) -> bool:
    return a is b is None or (a is not None and b is not None and a == pytest.approx(b, rel=1e-9))
