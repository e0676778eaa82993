"""Exact, and in one total order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamgr.serve import retrieval
from streamgr.serve.retrieval import best_first, similarities


@given(
    st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), max_size=60),
    st.integers(1, 70),
    st.randoms(use_true_random=False),
)
def test_best_first_is_the_whole_order_whatever_it_sorts_at_a_time(
    scores: list[float], first: int, rng: object
) -> None:
    keys = list(range(len(scores)))
    rng.shuffle(keys)  # type: ignore[attr-defined]
    order = list(best_first(np.array(scores, np.float32), np.array(keys, np.uint64), first))
    assert order == sorted(range(len(scores)), key=lambda i: (-scores[i], keys[i]))


def test_similarities_are_cosines_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ROWS", 7)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(100, 8, generator=generator)
    query = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    rows = torch.randperm(100, generator=generator)[:50]
    expected = torch.nn.functional.cosine_similarity(weight[rows], query[None])
    found = similarities(query, weight, 1 / weight.norm(dim=1), rows)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_nothing_live_is_no_error() -> None:
    empty = similarities(torch.ones(4), torch.ones(3, 4), torch.ones(3), torch.zeros(0, dtype=torch.int64))
    assert list(best_first(empty, np.zeros(0, np.uint64), 10)) == []
