"""Exact, and in one total order."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgr.model.hashing import U64
from streamgr.serve import retrieval
from streamgr.serve.retrieval import Best, Items, nearest


def catalogue(n: int, seed: int, dim: int = 8, *, levels: int = 0) -> Items:
    """n items in a table of 2 n rows; levels > 0: so few different vectors that ties are the rule."""
    r = np.random.default_rng(seed)
    weight = torch.from_numpy(r.standard_normal((2 * n + 1, dim)).astype(np.float32))
    if levels:
        weight = weight[r.integers(0, levels, len(weight))]
    rows = np.sort(r.permutation(2 * n)[:n] + 1)
    return Items(weight, 1 / weight.norm(dim=1), torch.from_numpy(rows), r.permutation(n).astype(np.uint64))


def queries(b: int, seed: int, dim: int = 8) -> torch.Tensor:
    made = torch.randn(b, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=1)


def by_sorting(asked: torch.Tensor, items: Items, k: int, without: Sequence[U64]) -> list[list[int]]:
    """All scores, sorted."""
    scores = items.similarities(asked, 0, len(items.rows))
    found = []
    for i, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda j: (-row[j], items.keys[j]))
        found.append([j for j in order if items.keys[j] not in without[i]][:k])
    return found


def order(best: list[Best]) -> list[list[int]]:
    return [one.index.tolist() for one in best]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(1, 130), st.integers(1, 3), st.integers(1, 40), st.integers(0, 999))
def test_the_best_are_those_of_a_whole_sort_whatever_the_blocks(n: int, k: int, b: int, block: int, seed: int) -> None:
    """Scores that tie within and across blocks: few different vectors, all of them exact in any order of summing."""
    r = np.random.default_rng(seed)
    items, asked = catalogue(n, seed), torch.zeros(b, 8)
    weight = torch.zeros_like(items.weight)
    weight[:, 0] = torch.from_numpy(r.integers(-2, 3, len(weight)).astype(np.float32))
    items = Items(weight, torch.ones(len(weight)), items.rows, items.keys)
    asked[:, 0] = torch.from_numpy(r.choice([-1.0, 0.5, 1.0], b).astype(np.float32))
    without = [r.choice(items.keys, r.integers(0, n)) for _ in range(b)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_ROWS", block)
        assert order(nearest(asked, items, k, without)) == by_sorting(asked, items, k, without)


def test_similarities_are_cosines_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ROWS", 7)
    items, asked = catalogue(50, 1), queries(3, 2)
    expected = torch.nn.functional.cosine_similarity(items.weight[items.rows][None], asked[:, None], dim=2)
    for i, best in enumerate(nearest(asked, items, 50)):
        assert sorted(best.index.tolist()) == list(range(50))
        np.testing.assert_allclose(best.scores, expected[i][best.index].numpy(), atol=1e-6)


def test_several_queries_at_once_find_what_each_finds_alone() -> None:
    items, asked = catalogue(3_000, 5), queries(4, 6)
    without = [items.keys[i * 100 : i * 200] for i in range(4)]
    together = nearest(asked, items, 20, without)
    for i, best in enumerate(together):
        alone = nearest(asked[i : i + 1], items, 20, without[i : i + 1])[0]
        np.testing.assert_allclose(best.scores, alone.scores, atol=1e-6)
        assert not np.isin(items.keys[best.index], without[i]).any()


def test_what_is_held_grows_with_k_and_not_with_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ROWS", 64)
    held: list[int] = []
    offer = Best.offer

    def watched(self: Best, scores: np.ndarray, start: int, keys: U64, without: U64) -> None:
        assert len(scores) <= 64
        offer(self, scores, start, keys, without)
        held.append(len(self.index))

    monkeypatch.setattr(Best, "offer", watched)
    nearest(queries(1, 1), catalogue(5_000, 1, levels=3), 10)
    assert len(held) == 79 and max(held) == 10


def test_nothing_live_is_no_error() -> None:
    none = Items(torch.ones(3, 8), torch.ones(3), torch.zeros(0, dtype=torch.int64), np.zeros(0, np.uint64))
    assert order(nearest(queries(2, 1), none, 10)) == [[], []]
