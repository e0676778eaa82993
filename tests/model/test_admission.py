"""Admission: nobody is refused who has come often enough, and few are let in before (P9)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgr.model.admission import Sketch
from tests.model.test_index import START, build, i64, u64


def test_admission_waits_for_the_count_and_never_refuses_one_that_has_it() -> None:
    index, ids = build(64, 8, admit_min=3), u64(*range(10))
    for _ in range(2):
        assert len(index.map(ids, np.full(10, START), 0, watermark_ms=START).fresh) == 0
    assert index.tally.unadmitted == 20
    assert len(index.map(ids, np.full(10, START), 0, watermark_ms=START).fresh) == 10
    assert len(index.map(u64(77, 77, 77), np.full(3, START), 0, watermark_ms=START).fresh) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60)), min_size=5, max_size=60), max_size=20))
def test_the_sketch_never_counts_too_little(steps: list[list[tuple[int, int]]]) -> None:
    """Halvings, after some two thousand tokens, included."""
    sketch, truth = Sketch(16), dict.fromkeys(range(401), 0)
    for step in steps:
        times = dict(step)  # distinct keys
        estimates = sketch.count(u64(*times), i64(*times.values()))
        truth |= {key: truth[key] + count for key, count in times.items()}
        assert all(estimate >= truth[key] for key, estimate in zip(times, estimates, strict=True))
        if sketch.counted == 0:
            truth = {key: count // 2 for key, count in truth.items()}


def test_the_sketch_seldom_counts_too_much() -> None:
    """Half as many ids as columns: few that came once count as twice, none as three times."""
    false = []
    for seed in range(50):
        ids = np.random.default_rng(seed).integers(0, 2**64, 128, dtype=np.uint64)
        sketch, once = Sketch(256), np.ones(1, np.int64)
        false += [int(sketch.count(ids[n : n + 1], once)[0]) for n in range(128)]
    assert np.mean(np.array(false) >= 2) < 0.01 and np.mean(np.array(false) >= 3) < 0.001
