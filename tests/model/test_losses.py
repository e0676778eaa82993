import numpy as np
import pytest
import torch
from torch.nn import functional as F

from streamgr.model.losses import ranking_loss, sampled_softmax


def keys(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def test_ranking_loss_sums_over_tasks_and_means_over_targets() -> None:
    logits, labels = torch.zeros(3, 2), torch.tensor([[1, 0], [0, 0], [1, 1]])
    assert ranking_loss(logits, labels).item() == pytest.approx(2 * np.log(2))
    assert ranking_loss(torch.tensor([[20.0, -20.0]]), torch.tensor([[1, 0]])).item() < 1e-6


def test_sampled_softmax_is_cross_entropy_over_the_positive_and_the_negatives() -> None:
    g = torch.Generator().manual_seed(0)
    queries, positives, negatives = (torch.randn(n, 8, generator=g) for n in (4, 4, 5))
    queries = F.normalize(queries, dim=1)
    logits = torch.stack(
        [
            torch.cat([(q @ F.normalize(p, dim=0))[None], F.normalize(negatives, dim=1) @ q])
            for q, p in zip(queries, positives, strict=True)
        ]
    )
    wanted = F.cross_entropy(logits / 0.05, torch.zeros(4, dtype=torch.long))
    got = sampled_softmax(queries, positives, negatives, keys(1, 2, 3, 4), keys(5, 6, 7, 8, 9), 0.05)
    torch.testing.assert_close(got, wanted)


def test_a_negative_that_is_the_positive_is_masked_for_that_row_only() -> None:
    queries = F.normalize(torch.eye(2), dim=1)
    items = torch.eye(2)
    big = 2**63 + 5  # no rounding on the way: keys are 64 bits
    alone = sampled_softmax(queries, items, items[:1], keys(big, big + 1), keys(big), 0.05)
    wanted = F.softplus(torch.tensor(-20.0)) / 2  # row 0: masked; row 1: cosine 0 against 1
    torch.testing.assert_close(alone, wanted)


def test_without_targets_both_are_zero_and_differentiable() -> None:
    none = torch.zeros(0, 8, requires_grad=True)
    loss = ranking_loss(none, torch.zeros(0, 8)) + sampled_softmax(
        none, none, torch.ones(3, 8), keys(), keys(1, 2, 3), 0.05
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and none.grad is not None
