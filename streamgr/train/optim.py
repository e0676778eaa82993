"""Row-wise Adagrad for the ID table: one accumulator a row, touched rows only.

    acc[r] += mean_d(g[r, d]^2);   w[r] -= lr * g[r] / sqrt(acc[r]);   acc[r] starts at INITIAL

Starting at 0, the first step of a row would have length lr whatever its gradient, which in a table of newcomers is
mostly noise. A slot that changes hands starts again: the new item must not inherit the old one's caution.
Fallback rows are shared by many ids and learn at a quarter of the rate. Dense parameters go to `torch.optim.AdamW`.
"""

import torch
from torch import Tensor

INITIAL = 0.03
FALLBACK_SHARE = 0.25


class RowAdagrad:
    """Owns the accumulators f32[R] of a table with R rows, of which 1..`fallback_rows` are shared."""

    def __init__(self, rows: int, fallback_rows: int, learning_rate: float) -> None:
        self.accumulator = torch.full((rows,), INITIAL)
        self._rate = torch.full((rows,), learning_rate)
        self._rate[: fallback_rows + 1] *= FALLBACK_SHARE

    def reset(self, rows: Tensor) -> None:
        """These rows (i64[k]) have been given to new ids."""
        self.accumulator[rows] = INITIAL

    @torch.no_grad()
    def step(self, weight: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Move `weight` f32[R, D] in place. rows i64[k] without repetitions; gradient f32[k, D], summed per row."""
        accumulated = self.accumulator.index_select(0, rows) + gradient.square().mean(dim=1)
        self.accumulator.index_copy_(0, rows, accumulated)
        scale = self._rate.index_select(0, rows) / accumulated.sqrt()
        weight.index_copy_(0, rows, weight.index_select(0, rows) - scale[:, None] * gradient)
