"""The softmax over a whole catalogue, block by block of rows that stay in the cache: no T x N matrix in memory.

The loss is a mean, so the gradient of a block's scores is known as soon as they are: forward leaves both gradients
behind, and nothing is computed twice. The scores give each target's rank as well. The plain twin is
`F.cross_entropy(queries @ catalogue.T, target)`.
"""

from typing import Any

import torch
from torch import Tensor

ROWS = 128


def full_softmax(queries: Tensor, catalogue: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """queries f32[T, D], catalogue f32[N, D], target i64[T] -> mean of -log softmax, and ranks i64[T]: 1 is the best,
    ties and what is not finite count against the target."""
    loss, rank = _FullSoftmax.apply(queries, catalogue, target)  # type: ignore[no-untyped-call]
    return loss, rank


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, catalogue: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        dq, dc = torch.empty_like(queries), torch.zeros_like(catalogue)
        rank = torch.empty_like(target)
        total = queries.new_zeros((), dtype=torch.float64)
        for start in range(0, len(queries), ROWS):
            part = slice(start, start + ROWS)
            scores = queries[part] @ catalogue.T
            at = target[part, None]
            own = scores.gather(1, at)
            rank[part] = scores.shape[1] - (scores < own).sum(1)
            top = scores.amax(1, keepdim=True)
            sums = scores.sub_(top).exp_().sum(1, keepdim=True)
            total += (sums.log() + top - own).sum(dtype=torch.float64)
            gradient = scores.div_(sums).scatter_add_(1, at, torch.full_like(own, -1))
            torch.mm(gradient, catalogue, out=dq[part])
            dc.addmm_(gradient.T, queries[part])
        ctx.save_for_backward(dq, dc)
        ctx.mark_non_differentiable(rank)
        return (total / len(queries)).to(queries.dtype), rank

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        dq, dc = ctx.saved_tensors
        scale = gradients[0] / len(dq)
        return dq * scale, dc * scale, None
