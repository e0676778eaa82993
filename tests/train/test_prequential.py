import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgr.train.prequential import Prequential, auc


def judged(p: np.ndarray, y: np.ndarray, window: int = 10_000, half_life: float = 1e9) -> dict[str, float | None]:
    figures = Prequential(["click"], window, half_life)
    figures.add_ranking(p[:, None].astype(np.float32), y[:, None].astype(bool))
    return figures.figures()


def test_guessing_the_base_rate_has_normalized_entropy_one() -> None:
    y = np.arange(1000) % 4 == 0
    figures = judged(np.full(1000, 0.25), y)
    assert figures["normalized_entropy/click"] == pytest.approx(1.0)
    assert figures["faded_normalized_entropy/click"] == pytest.approx(1.0)
    assert figures["calibration/click"] == pytest.approx(1.0)
    assert figures["base_rate/click"] == 0.25
    assert figures["auc/click"] == 0.5


def test_figures_that_do_not_exist_are_none() -> None:
    figures = judged(np.full(10, 0.25), np.zeros(10))
    assert [figures[f"{name}/click"] for name in ("normalized_entropy", "auc", "calibration")] == [None] * 3
    assert Prequential(["click"], 5, 5).figures()["hit_rate_at_10/any"] is None


def test_the_window_forgets_and_the_faded_figure_halves() -> None:
    p, y = np.full(300, 0.5), np.r_[np.ones(200), np.arange(100) % 2]
    assert judged(p, y, window=100)["base_rate/click"] == 0.5
    rows = Prequential(["click"], 10, 100)
    rows.add_retrieval(np.r_[np.full(1000, 1), np.full(100, -1)], np.ones((1100, 1), bool))
    assert rows.figures()["faded_hit_rate_at_10/click"] == pytest.approx(0.5, abs=0.01)


def test_retrieval_counts_by_kind() -> None:
    figures = Prequential(["click", "like"], 100, 100)
    figures.add_retrieval(np.array([1, 3, 11, -1]), np.array([[1, 0], [1, 1], [0, 1], [1, 0]], bool))
    found = figures.figures()
    assert found["hit_rate_at_10/any"] == 0.5
    assert found["hit_rate_at_10/click"] == pytest.approx(2 / 3)
    assert found["ndcg_at_10/like"] == pytest.approx(0.5 / 2)


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_order(pairs) -> None:
    p, y = np.array([p for p, _ in pairs]), np.array([float(y) for _, y in pairs])
    wins = [(a > b) + (a == b) / 2 for a in p[y > 0] for b in p[y == 0]]
    assert auc(p, y) == (pytest.approx(np.mean(wins)) if wins else None)


def test_the_state_goes_on_as_if_nothing_had_happened() -> None:
    generator = np.random.default_rng(1)
    kept, restored = Prequential(["click"], 50, 20), Prequential(["click"], 50, 20)
    for part in range(4):
        p, y = generator.random((33, 1)).astype(np.float32), generator.random((33, 1)) < 0.5
        ranks = generator.integers(-1, 20, 33)
        kept.add_ranking(p, y)
        kept.add_retrieval(ranks, y)
        if part == 2:
            restored.load_state(kept.state())
    restored.add_ranking(p, y)
    restored.add_retrieval(ranks, y)
    assert restored.figures() == kept.figures()
