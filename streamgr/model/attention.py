"""HSTU's pointwise attention: no softmax, a sum weighted by SiLU, so intensity is kept.

    out[i] = sum_j m[i, j] * SiLU(q_i . k_j + rab_position[p(i, j)] + rab_time[t(i, j)]) * v_j
    m[i, j] = j == i, or j < visible[i] and near(i, j)         near: p <= local_window or j < global_prefix, if local
    p(i, j) = visible[i] - j, and 0 for j == i                 t(i, j) = time_bucket(query_time[i] - time[j])

The values come in divided by N, a constant that is stored with the weights and never a length: so nothing here depends
on padding or on the company a sequence is in. Without biases (`dlrm_v3`) both tables are None. `near` makes long
histories cheap: each token sees a window before it and the head of its sequence (semi-local attention, ULTRA-HSTU).

`reference` is the formula on one padded batch, in plain autograd, and the spec of the fast ones: `attention_blocks`
(CPU) and `attention_triton` (GPU). A `Plan` is what a batch's masks and buckets come to, laid out once for all layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from streamgr import config
from streamgr.model import jagged
from streamgr.model.tokens import Tokens

TIME_UNIT_MS = 64

# (q, k, v f32[T, H, d]; position bias f32[P], time bias f32[T'] or None, None; plan) -> f32[T, H, d]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Any], Tensor]


def time_bucket(milliseconds: Tensor, count: int) -> Tensor:
    """i64 -> i32: two buckets an octave of 1 + dt / 64 ms (edges at 1, 1.5, 2, 3, 4, 6, …), the last one open.

    With 64 buckets: 0 below 32 ms, 8 at 1 s, 19 at a minute, 31 at an hour, 40 at a day, 57 at a year, 63 from 6.5
    years; negative counts as 0. Read off a float's bits, exponent and first bit of the fraction, so that every
    backend agrees exactly, which no logarithm grants.
    """
    x = milliseconds.to(torch.float32).clamp_(min=0).div_(TIME_UNIT_MS).add_(1)
    return ((x.view(torch.int32) >> 22) - (127 << 1)).clamp_(max=count - 1)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a mask and its buckets depend on beside the tokens. local_window 0: everything before is near."""

    positions: int
    times: int
    local_window: int = 0
    global_prefix: int = 0

    @classmethod
    def of(cls, settings: config.Model) -> "Shape":
        return cls(settings.position_buckets, settings.time_buckets, settings.local_window, settings.global_prefix)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Every pair of one padded batch: what `reference` needs. B sequences of n places.

    tokens i64[B, n], real bool[B, n]: `jagged.Block`; mask bool[B, n, n]; position, time i64[B, n, n]: buckets.
    """

    tokens: Tensor
    real: Tensor
    mask: Tensor
    position: Tensor
    time: Tensor


def pairs(tokens: Tokens, shape: Shape) -> Pairs:
    """Lay out a batch for `reference`."""
    block = jagged.pad(tokens.offsets)
    n = block.tokens.shape[1]
    column = torch.arange(n)
    real, itself = torch.from_numpy(block.real), torch.eye(n, dtype=torch.bool)
    distance = torch.from_numpy(tokens.visible[block.tokens])[:, :, None] - column
    near = torch.ones_like(itself)
    if shape.local_window:
        near = (distance <= shape.local_window) | (column < shape.global_prefix)
    mask = (((distance > 0) & near) | itself) & real[:, :, None] & real[:, None, :]
    asked, stamped = tokens.query_times[block.tokens], tokens.times[block.tokens]
    elapsed = torch.from_numpy(asked)[:, :, None] - torch.from_numpy(stamped)[:, None, :]
    position = distance.clamp_(0, shape.positions - 1).masked_fill_(itself, 0)
    return Pairs(torch.from_numpy(block.tokens), real, mask, position, time_bucket(elapsed, shape.times).long())


def reference(  # noqa: PLR0917 (as `Attend`)
    q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None, plan: Pairs
) -> Tensor:
    """The formula, plainly, in whatever precision comes in."""
    q, k, v = (x[plan.tokens] for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    if position is not None and time is not None:
        scores = scores + (position[plan.position] + time[plan.time])[:, None]
    weights = F.silu(scores) * plan.mask[:, None]
    return torch.einsum("bhij,bjhd->bihd", weights, v)[plan.real]
