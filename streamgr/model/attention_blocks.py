"""The attention of `attention` on a CPU: block by block, each small enough for the cache, with its own backward.

Both biases are one table: pair (p, t) is row p * time_buckets + t of their sum, and one last row, NOTHING, is so low
that SiLU and its derivative are exactly 0: that is the mask, padding included. So a pair costs one gather forward and
one bin count backward. The sums run in a fixed order: same input, same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from streamgr.model import jagged
from streamgr.model.attention import Shape, time_bucket
from streamgr.model.tokens import Tokens

NOTHING = -1e9


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """tokens i64[b * n]; bias i32[b, n, n]: rows of the bias table; `cells`, `cell_tokens` i64[k]: the real ones."""

    tokens: Tensor
    bias: Tensor
    cells: Tensor
    cell_tokens: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch laid out once, for all layers, forward and backward."""

    blocks: Sequence[PlannedBlock]
    shape: Shape


def plan(tokens: Tokens, shape: Shape) -> Plan:
    """Lay out a batch."""
    return Plan([_planned(tokens, block, shape) for block in jagged.blocks(tokens.offsets)], shape)


def _planned(tokens: Tokens, block: jagged.Block, shape: Shape) -> PlannedBlock:
    b, n = block.tokens.shape
    column = torch.arange(n, dtype=torch.int32)
    visible = torch.from_numpy(tokens.visible[block.tokens]).to(torch.int32)
    real = torch.from_numpy(block.real)
    itself = torch.eye(n, dtype=torch.bool)
    distance = visible[:, :, None] - column
    seen = distance > 0
    if shape.local_window:
        seen &= (distance <= shape.local_window) | (column < shape.global_prefix)
    seen = (seen | itself) & real[:, :, None] & real[:, None, :]
    distance = distance.clamp_(0, shape.positions - 1).masked_fill_(itself, 0)
    asked, stamped = tokens.query_times[block.tokens], tokens.times[block.tokens]
    elapsed = torch.from_numpy(asked)[:, :, None] - torch.from_numpy(stamped)[:, None, :]
    bias = torch.where(seen, distance * shape.times + time_bucket(elapsed, shape.times), shape.positions * shape.times)
    flat = torch.from_numpy(block.tokens.reshape(b * n))
    cells = torch.from_numpy(block.real.reshape(b * n)).nonzero().squeeze(1)
    return PlannedBlock(flat, bias, cells, flat[cells])


def attend(  # noqa: PLR0917 (as `Attend`)
    q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None, plan: Plan
) -> Tensor:
    """See `attention.Attend`."""
    table = bias_table(q, position, time, plan.shape)
    out: Tensor = _Attend.apply(q, k, v, table, plan)  # type: ignore[no-untyped-call]
    return out


def bias_table(q: Tensor, position: Tensor | None, time: Tensor | None, shape: Shape) -> Tensor:
    """f32[P * T + 1]: the sum for every pair of buckets (zeros without biases), then NOTHING."""
    if position is None or time is None:
        pairs = q.new_zeros(shape.positions * shape.times)
    else:
        pairs = (position[:, None] + time[None, :]).reshape(-1)
    return torch.cat([pairs, q.new_full((1,), NOTHING)])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, plan: Plan) -> Tensor:  # noqa: PLR0917
        ctx.save_for_backward(q, k, v, table)
        ctx.plan = plan
        out = torch.empty_like(v)
        for block in plan.blocks:
            weights = F.silu(_scores(block, _heads(q, block), _heads(k, block), table))
            _spread(torch.bmm(weights, _heads(v, block)), block, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table = ctx.saved_tensors
        (g,) = gradients
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dtable = torch.zeros(len(table), dtype=torch.float64)
        for block in ctx.plan.blocks:
            bq, bk, bv, bg = (_heads(x, block) for x in (q, k, v, g))
            scores = _scores(block, bq, bk, table)
            _spread(torch.bmm(F.silu(scores).transpose(1, 2), bg), block, dv)
            ds = torch.ops.aten.silu_backward(torch.bmm(bg, bv.transpose(1, 2)), scores)
            _spread(torch.bmm(ds, bk), block, dq)
            _spread(torch.bmm(ds.transpose(1, 2), bq), block, dk)
            pairs = ds.view(block.bias.shape[0], -1, *block.bias.shape[1:]).sum(1)
            dtable += torch.bincount(block.bias.view(-1), pairs.view(-1), minlength=len(table))
        return dq, dk, dv, dtable.to(table.dtype), None


def _heads(x: Tensor, block: PlannedBlock) -> Tensor:
    """f32[T, H, d] -> f32[b * H, n, d]: a block of it."""
    b, n, _ = block.bias.shape
    return x.index_select(0, block.tokens).view(b, n, *x.shape[1:]).transpose(1, 2).reshape(-1, n, x.shape[2])


def _scores(block: PlannedBlock, q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    """f32[b * H, n, n]."""
    b, n, _ = block.bias.shape
    scores = torch.bmm(q, k.transpose(1, 2))
    scores.view(b, -1, n, n).add_(table.index_select(0, block.bias.view(-1)).view(b, 1, n, n))
    return scores


def _spread(x: Tensor, block: PlannedBlock, out: Tensor) -> None:
    """f32[b * H, n, d] back to the block's tokens in out f32[T, H, d]."""
    b, n, _ = block.bias.shape
    rows = x.view(b, -1, n, x.shape[2]).transpose(1, 2).reshape(b * n, *out.shape[1:])
    if len(block.cells) < len(block.tokens):
        rows = rows.index_select(0, block.cells)
    out.index_copy_(0, block.cell_tokens, rows)
