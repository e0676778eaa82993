"""The two losses, and what log Q makes of a sample."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from streamgr.model.losses import ranking_loss, sampled_softmax

TEMPERATURE = 0.2


def keys(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def evenly(count: int) -> NDArray[np.float32]:
    return np.zeros(count, np.float32)


def test_ranking_loss_sums_over_tasks_and_means_over_targets() -> None:
    logits, labels = torch.zeros(3, 2), torch.tensor([[1, 0], [0, 0], [1, 1]])
    assert ranking_loss(logits, labels).item() == pytest.approx(2 * np.log(2))
    assert ranking_loss(torch.tensor([[20.0, -20.0]]), torch.tensor([[1, 0]])).item() < 1e-6


def test_sampled_softmax_is_cross_entropy_over_the_positive_and_the_negatives() -> None:
    g = torch.Generator().manual_seed(0)
    queries, positives, negatives = (torch.randn(n, 8, generator=g) for n in (4, 4, 5))
    queries, log_q = F.normalize(queries, dim=1), torch.randn(5, generator=g)
    logits = torch.stack(
        [
            torch.cat([(q @ F.normalize(p, dim=0))[None] / 0.05, F.normalize(negatives, dim=1) @ q / 0.05 - log_q])
            for q, p in zip(queries, positives, strict=True)
        ]
    )
    wanted = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    got = sampled_softmax(queries, positives, negatives, keys(1, 2, 3, 4), keys(5, 6, 7, 8, 9), 0.05, log_q.numpy())
    torch.testing.assert_close(got, wanted)


def test_a_negative_that_is_the_positive_is_masked_for_that_row_only() -> None:
    queries = F.normalize(torch.eye(2), dim=1)
    items = torch.eye(2)
    big = 2**63 + 5  # no rounding on the way: keys are 64 bits
    alone = sampled_softmax(queries, items, items[:1], keys(big, big + 1), keys(big), 0.05, evenly(1))
    wanted = F.softplus(torch.tensor(-20.0)) / 2  # row 0: masked; row 1: cosine 0 against 1
    torch.testing.assert_close(alone, wanted)
    rare = sampled_softmax(queries, items, items[:1], keys(big, big), keys(big), 0.05, np.array([-20], np.float32))
    assert rare.item() == pytest.approx(0, abs=1e-6)  # however rare: by id, not by vector


def test_without_targets_both_are_zero_and_differentiable() -> None:
    none = torch.zeros(0, 8, requires_grad=True)
    loss = ranking_loss(none, torch.zeros(0, 8)) + sampled_softmax(
        none, none, torch.ones(3, 8), keys(), keys(1, 2, 3), 0.05, evenly(3)
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and none.grad is not None


class Catalogue:
    """Twenty items, and a sampling that loves some of them and hardly knows others."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)
        self.items = torch.randn(20, 6, generator=g)
        self.queries = F.normalize(torch.randn(3, 6, generator=g), dim=1)
        self.logits = self.queries @ F.normalize(self.items, dim=1).T / TEMPERATURE
        self.p = np.arange(1, 21) ** -1.1 / (np.arange(1, 21) ** -1.1).sum()

    def sampled(self, positive: int, drawn: int, seed: int, corrected: bool = True) -> tuple[float, torch.Tensor]:
        """Loss and gradient f32[6] of the first query for its item."""
        sample, ids = np.random.default_rng(seed).choice(20, drawn, p=self.p), np.arange(20, dtype=np.uint64)
        q = drawn * self.p[sample] if corrected else np.full(drawn, drawn / 20)
        query = self.queries[:1].clone().requires_grad_()
        own, others = self.items[[positive]], self.items[sample]
        log_q = np.log(q).astype(np.float32)
        loss = sampled_softmax(query, own, others, ids[[positive]], ids[sample], TEMPERATURE, log_q)
        (gradient,) = torch.autograd.grad(loss, query)
        return loss.item(), gradient[0]


@pytest.mark.parametrize("positive", [0, 19])  # the one drawn most, the one drawn least
def test_with_log_q_a_sample_estimates_the_partition_without_bias(positive: int) -> None:
    """Accidental hits masked, for the positive stands in it already."""
    catalogue = Catalogue()
    own = catalogue.logits[0, positive].item()
    found = [np.exp(catalogue.sampled(positive, 300, seed)[0] + own) for seed in range(1500)]
    wanted = catalogue.logits[0].exp().sum().item()
    assert abs(np.mean(found) - wanted) < 3 * np.std(found) / 1500**0.5 < 0.03 * wanted


def test_with_log_q_the_gradient_is_that_of_the_full_softmax() -> None:
    """But for what the log of a noisy sum takes, which vanishes with the size of the sample; without it for nothing."""
    catalogue = Catalogue()
    query = catalogue.queries[:1].clone().requires_grad_()
    loss = F.cross_entropy(query @ F.normalize(catalogue.items, dim=1).T / TEMPERATURE, torch.tensor([7]))
    (wanted,) = torch.autograd.grad(loss, query)
    errors = []
    for drawn, corrected in ((30, True), (1500, True), (1500, False)):
        found = torch.stack([catalogue.sampled(7, drawn, seed, corrected)[1] for seed in range(150)]).mean(0)
        errors.append(float((found - wanted[0]).norm() / wanted.norm()))
    small, large, uncorrected = errors
    assert large < 0.02 and large < small < uncorrected and uncorrected > 10 * large
