"""The Dirichlet stream has the law it claims, and one pass predicts before it learns."""

import numpy as np
import pytest

from streamgr.lab.dirichlet import Records, available_of, generate
from streamgr.lab.sequential import MODELS, Shape
from streamgr.lab.streaming import Recipe, run


@pytest.fixture(scope="module")
def records() -> Records:
    return generate(records=2000, length=24, items=400, categories=20, seed=1)


def test_ids_are_there_when_they_are_drawn_and_of_their_category(records: Records) -> None:
    assert (records.items < records.available[:, None]).all()
    assert records.available[0] == 160 and (np.diff(records.available) >= 0).all() and records.available[-1] >= 399
    own = np.take_along_axis(records.chosen, records.drawn, 1)
    assert np.array_equal(records.category[records.items], own)
    assert np.array_equal(np.bincount(records.category), np.full(20, 20))
    assert len(np.unique(records.items[-200:])) > 390 and records.items[:100].max() < 180
    again = generate(records=2000, length=24, items=400, categories=20, seed=1)
    assert np.array_equal(records.items, again.items)
    assert not np.array_equal(records.items, generate(2000, 24, 400, 20, seed=2).items)


def test_categories_follow_the_urn(records: Records) -> None:
    """Of what has probability p, a share p comes true: at each position, for small p and for large."""
    k = records.chosen.shape[1]
    for n in (1, 5, 23):
        counts = (records.drawn[:, :n, None] == np.arange(k)).sum(1)
        p = (records.alpha[:, None] * records.prior + counts) / (records.alpha + n)[:, None]
        assert np.allclose(p.sum(1), 1)
        came = records.drawn[:, n, None] == np.arange(k)
        for low, high in ((0.001, 0.2), (0.2, 0.5), (0.5, 0.9), (0.9, 1.0)):
            chosen = (p > low) & (p <= high)
            deviation = np.sqrt((p * (1 - p))[chosen].sum()) + 1e-9
            assert abs((came - p)[chosen].sum()) < 4 * deviation


def test_items_are_even_within_their_category(records: Records) -> None:
    early = records.items[:, ::5][records.items[:, ::5] < 160]  # available all along
    counts = np.bincount(early, minlength=160)
    expected = counts.mean()
    assert abs(counts - expected).max() < 6 * np.sqrt(expected) + 0.3 * expected


def test_the_oracle_is_the_hit_rate_of_who_knows_the_law(records: Records) -> None:
    rows = np.arange(1800, 2000)
    hits, k = [], records.chosen.shape[1]
    for row in rows:
        for n in range(1, records.items.shape[1]):
            counts = (records.drawn[row, :n, None] == np.arange(k)).sum(0)
            p = (records.alpha[row] * records.prior[row] + counts) / (records.alpha[row] + n)
            live = np.arange(records.available[row])
            score = np.zeros(len(live))
            for c in range(k):
                of_it = records.category[live] == records.chosen[row, c]
                score[of_it] = p[c] / of_it.sum()
            best = np.argsort(-score, kind="stable")[:10]
            hits.append(records.items[row, n] in best)
    assert records.oracle(rows, (10,))[0] == pytest.approx(np.mean(hits), abs=4 * 0.5 / np.sqrt(len(hits)))
    assert records.oracle(rows, (400,))[0] == pytest.approx(1)


def test_too_few_items_are_refused() -> None:
    with pytest.raises(ValueError, match="categories"):
        generate(10, 5, items=100, categories=30, seed=1)
    assert available_of(np.array([0, 1, 0, 1]), np.array([[0, 1]]), np.array([3]))[0].tolist() == [[2, 1]]


@pytest.mark.parametrize("model", MODELS)
def test_one_pass_learns_and_repeats_itself(model: str) -> None:
    stream = generate(records=240, length=16, items=80, categories=8, seed=3, most=1)
    shape, recipe = Shape(dim=16, layers=1, length=16, dropout=0.0), Recipe(records_a_step=4, learning_rate=1e-2)
    course = run(model, stream, shape, recipe, seed=1)
    assert course.hits.shape == (60, 2)
    assert course.late(0.2)[0] > course.hits[:6, 0].mean() + 0.15
    assert course.loss[-12:].mean() < course.loss[:6].mean()  # though there is more and more to choose from
    if model == "sasrec":
        again = run(model, stream, shape, recipe, seed=1)
        assert np.array_equal(course.hits, again.hits)


def test_what_is_learned_later_changes_no_earlier_prediction() -> None:
    stream = generate(records=40, length=10, items=40, categories=8, seed=5)
    shape, recipe = Shape(dim=8, layers=1, length=10, dropout=0.0), Recipe(records_a_step=4)
    whole = run("hstu -rab", stream, shape, recipe, seed=1)
    half = Records(
        stream.items[:20], stream.available[:20], stream.category, stream.chosen[:20], stream.prior[:20],
        stream.alpha[:20], stream.drawn[:20],
    )  # fmt: skip
    assert np.array_equal(run("hstu -rab", half, shape, recipe, seed=1).hits, whole.hits[:5])
