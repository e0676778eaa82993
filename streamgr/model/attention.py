"""HSTU's pointwise attention: no softmax, a sum weighted by SiLU, so intensity is kept.

    out[i] = sum_j m[i, j] * SiLU(q_i . k_j + rab_position[p(i, j)] + rab_time[t(i, j)]) * v_j
    m[i, j] = j < visible[i] or j == i      p(i, j) = visible[i] - j, and 0 for j == i
    t(i, j) = time_bucket(query_time[i] - time[j])

The values come in divided by N, a constant that is stored with the weights and never a length: so nothing here depends
on padding or on the company a sequence is in.

Both biases are one table: pair (p, t) is row p * time_buckets + t of their sum, and one last row, NOTHING, is so low
that SiLU and its derivative are exactly 0: that is the mask, padding included. So a pair costs one gather forward and
one bin count backward. `reference` is the formula on one padded batch, in plain autograd; `attend` goes block by block,
each small enough for the cache, with its own backward. Its sums run in a fixed order: same input, same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from streamgr.model import jagged
from streamgr.model.tokens import Tokens

NOTHING = -1e9
TIME_UNIT_MS = 64


def time_bucket(milliseconds: Tensor, count: int) -> Tensor:
    """i64 -> i32: two buckets an octave of 1 + dt / 64 ms (edges at 1, 1.5, 2, 3, 4, 6, …), the last one open.

    With 64 buckets: 0 below 32 ms, 8 at 1 s, 19 at a minute, 31 at an hour, 40 at a day, 57 at a year, 63 from 6.5
    years; negative counts as 0. Read off a float's bits, exponent and first bit of the fraction, so that every
    backend agrees exactly, which no logarithm grants.
    """
    x = milliseconds.clamp(min=0).to(torch.float32).div_(TIME_UNIT_MS).add_(1)
    return ((x.view(torch.int32) >> 22) - (127 << 1)).clamp_(max=count - 1)


def bias_table(position: Tensor, time: Tensor) -> Tensor:
    """f32[P], f32[T] -> f32[P * T + 1]: the sum for every pair of buckets, then NOTHING."""
    return torch.cat([(position[:, None] + time[None, :]).reshape(-1), position.new_full((1,), NOTHING)])


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """tokens i64[b * n]; bias i32[b, n, n]: rows of the bias table; `cells`, `cell_tokens` i64[k]: the real ones."""

    tokens: Tensor
    bias: Tensor
    cells: Tensor
    cell_tokens: Tensor


Plan = Sequence[PlannedBlock]


def plan(tokens: Tokens, positions: int, times: int) -> Plan:
    """Lay out a batch once, for all layers, forward and backward."""
    return [_planned(tokens, block, positions, times) for block in jagged.blocks(tokens.offsets)]


def plan_padded(tokens: Tokens, positions: int, times: int) -> Plan:
    """The same as one padded block, for `reference`."""
    return [_planned(tokens, jagged.pad(tokens.offsets), positions, times)]


def _planned(tokens: Tokens, block: jagged.Block, positions: int, times: int) -> PlannedBlock:
    b, n = block.tokens.shape
    column = torch.arange(n, dtype=torch.int32)
    visible = torch.from_numpy(tokens.visible[block.tokens]).to(torch.int32)
    real = torch.from_numpy(block.real)
    itself = torch.eye(n, dtype=torch.bool)
    distance = visible[:, :, None] - column
    seen = ((distance > 0) | itself) & real[:, :, None] & real[:, None, :]
    distance = distance.clamp_(0, positions - 1).masked_fill_(itself, 0)
    asked, stamped = tokens.query_times[block.tokens], tokens.times[block.tokens]
    elapsed = torch.from_numpy(asked)[:, :, None] - torch.from_numpy(stamped)[:, None, :]
    bias = torch.where(seen, distance * times + time_bucket(elapsed, times), positions * times)
    flat = torch.from_numpy(block.tokens.reshape(b * n))
    cells = torch.from_numpy(block.real.reshape(b * n)).nonzero().squeeze(1)
    return PlannedBlock(flat, bias, cells, flat[cells])


def reference(q: Tensor, k: Tensor, v: Tensor, table: Tensor, plan: Plan) -> Tensor:
    """The formula, plainly. q, k, v f32[T, H, d]; table f32[P * T + 1]; -> f32[T, H, d]."""
    (block,) = plan
    b, n, _ = block.bias.shape
    q, k, v = (x[block.tokens].view(b, n, *x.shape[1:]) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) + table[block.bias.long()][:, None]
    out = torch.einsum("bhij,bjhd->bihd", F.silu(scores), v)
    return out.reshape(b * n, *v.shape[2:])[block.cells]


def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, plan: Plan) -> Tensor:
    """The same, block by block. q, k, v f32[T, H, d]; table f32[P * T + 1]; -> f32[T, H, d]."""
    out: Tensor = _Attend.apply(q, k, v, table, plan)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, plan: Plan) -> Tensor:  # noqa: PLR0917
        ctx.save_for_backward(q, k, v, table)
        ctx.plan = plan
        out = torch.empty_like(v)
        for block in plan:
            weights = F.silu(_scores(block, _heads(q, block), _heads(k, block), table))
            _spread(torch.bmm(weights, _heads(v, block)), block, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table = ctx.saved_tensors
        (g,) = gradients
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dtable = torch.zeros(len(table), dtype=torch.float64)
        for block in ctx.plan:
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
