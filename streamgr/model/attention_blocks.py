"""The attention of `attention` on a CPU: tile by tile, each small enough for the cache, with its own backward.

Sequences of like length lie side by side in blocks (`jagged`); a block's rows are cut into tiles, and a tile has only
the columns that its rows can see: that is half of them in a causal sequence, a window's worth in a semi-local one.

Both biases are one table: pair (p, t) is row p * time_buckets + t of their sum, and one last row, NOTHING, is so low
that SiLU and its derivative are exactly 0: that is the mask, padding included. So a pair costs one gather forward and
one bin count backward, and a pair of tokens four bytes of plan. A plan keeps at most PLAN_BYTES of it: what does not
fit is laid out again each time that it is needed, so memory stays bounded however long the sequences are.

What SiLU takes is kept for the backward pass up to SCORE_BYTES a layer, and beyond that made again; all else that is as
large lies in a few buffers that every tile uses: a fresh allocation of that size is fresh pages, and touching those
costs as much as the arithmetic. The sums run in a fixed order: same input, same bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgr.model import jagged
from streamgr.model.attention import Shape, time_bucket
from streamgr.model.tokens import Tokens

NOTHING = -1e9
ROWS = 64  # of a tile, twice as many in a long sequence: fewer skip more, more make better matrix products
COLUMNS = 1024
PLAN_BYTES = 256 << 20
SCORE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of a block and some columns of it. bias i32[b * rows * columns]: rows of the bias table, if kept."""

    rows: slice
    columns: slice
    bias: Tensor | None

    def cells(self, b: int) -> tuple[int, int, int]:
        """(b, rows, columns)"""
        return b, self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


@dataclass(frozen=True, slots=True)
class Block:
    """b sequences padded to n places, i64[b, n] each: its tokens, and of those what they see, ask at and stand at.

    visible is 0 and real False in padding. first: how many places the blocks before it have.
    """

    first: int
    tokens: Tensor
    real: Tensor
    visible: Tensor
    asked: Tensor
    times: Tensor
    tiles: list[Tile]


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch laid out once, for all layers, forward and backward.

    Of token i, i64[T]: `sequence`, the place where its (padded) sequence begins, `width`, how long that is, and
    `place`, where in it the token stands.
    """

    blocks: Sequence[Block]
    shape: Shape
    sequence: Tensor
    width: Tensor
    place: Tensor

    @property
    def places(self) -> int:
        return sum(block.tokens.numel() for block in self.blocks)


def plan(tokens: Tokens, shape: Shape) -> Plan:
    """Lay out a batch."""
    blocks: list[Block] = []
    sequence, width, place = (torch.empty(len(tokens), dtype=torch.int64) for _ in range(3))
    first, room = 0, PLAN_BYTES
    for laid in jagged.blocks(tokens.offsets):
        index, real = torch.from_numpy(laid.tokens), torch.from_numpy(laid.real)
        b, n = index.shape
        visible, asked, times = (
            torch.from_numpy(of[laid.tokens]) for of in (tokens.visible, tokens.query_times, tokens.times)
        )
        block = Block(first, index, real, visible * real, asked, times, [])
        for rows, columns in _tiles(laid.real, block.visible.numpy(), shape):
            room -= 4 * b * (rows.stop - rows.start) * (columns.stop - columns.start)
            bias = bias_rows(block, rows, columns, shape) if room >= 0 else None
            block.tiles.append(Tile(rows, columns, bias))
        blocks.append(block)
        mine = index[real]
        width[mine], place[mine] = n, torch.arange(n).expand(b, n)[real]
        sequence[mine] = (torch.arange(b) * n + first)[:, None].expand(b, n)[real]
        first += b * n
    return Plan(blocks, shape, sequence, width, place)


def _tiles(real: NDArray[np.bool_], visible: NDArray[np.int64], shape: Shape) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of a block's tiles: each row tile with the stretches of columns that any of its rows sees."""
    b, n = real.shape
    height = ROWS if b > 1 else 2 * ROWS
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        seen = visible[:, rows][real[:, rows]]
        stretches = [(0, int(seen.max())), (rows.start, rows.stop)]
        if shape.local_window:
            prefix, near = min(shape.global_prefix, int(seen.max())), max(0, int(seen.min()) - shape.local_window)
            stretches = [(0, prefix), (near, int(seen.max())), (rows.start, rows.stop)]
        end = 0
        for begin, stop in sorted(stretches):
            for column in range(max(begin, end), stop, COLUMNS):
                yield rows, slice(column, min(column + COLUMNS, stop))
            end = max(end, stop)


def bias_rows(block: Block, rows: slice, columns: slice, shape: Shape) -> Tensor:
    """i32[b * rows * columns]: which row of the bias table each pair of a tile has."""
    column = torch.arange(columns.start, columns.stop, dtype=torch.int32)
    distance = block.visible[:, rows, None].to(torch.int32) - column
    hidden = distance <= 0
    if shape.local_window:
        hidden |= (distance > shape.local_window) & (column >= shape.global_prefix)
    if rows.start < columns.stop and columns.start < rows.stop:
        itself = torch.arange(max(rows.start, columns.start), min(rows.stop, columns.stop))
        hidden[:, itself - rows.start, itself - columns.start] = ~block.real[:, itself]
    elapsed = block.asked[:, rows, None] - block.times[:, None, columns]
    bias = time_bucket(elapsed, shape.times).add_(distance.clamp_(0, shape.positions - 1), alpha=shape.times)
    return bias.masked_fill_(hidden, shape.positions * shape.times).view(-1)


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
        ctx.plan, ctx.kept, left = plan, [], SCORE_BYTES if any(ctx.needs_input_grad) else 0
        padding, room = _Padding(plan, q), _Room(plan, q)
        q, k, v = (padding.add(x) for x in (q, k, v))
        out = torch.zeros_like(v)
        for block in plan.blocks:
            bq, bk, bv, bout = (padding.of(block, x) for x in (q, k, v, out))
            for tile in block.tiles:
                scores = room.scores(tile, bq, bk, _bias(block, tile, plan.shape), table, keep=left > 0)
                weights = torch.ops.aten.silu.out(scores, out=room.other(scores))
                bout[:, tile.rows].add_(torch.bmm(weights, bv[:, tile.columns]))
                if left > 0:
                    ctx.kept.append(scores)
                    left -= scores.nbytes
        return padding.remove(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table = ctx.saved_tensors
        plan: Plan = ctx.plan
        padding, room = _Padding(plan, q), _Room(plan, q)
        q, k, v, g = (padding.add(x) for x in (q, k, v, gradients[0]))
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        dtable = torch.zeros(len(table), dtype=torch.float64) if ctx.needs_input_grad[3] else None
        kept = iter(ctx.kept)
        for block in plan.blocks:
            bq, bk, bv, bg, tq, tk, tv = (padding.of(block, x) for x in (q, k, v, g, dq, dk, dv))
            for tile in block.tiles:
                bias = _bias(block, tile, plan.shape)
                scores = next(kept, None)
                if scores is None:
                    scores = room.scores(tile, bq, bk, bias, table, keep=False)
                weights = torch.ops.aten.silu.out(scores, out=room.other(scores))
                rq, rg, ck, cv = bq[:, tile.rows], bg[:, tile.rows], bk[:, tile.columns], bv[:, tile.columns]
                tv[:, tile.columns].add_(torch.bmm(weights.transpose(1, 2), rg))
                ds = torch.bmm(rg, cv.transpose(1, 2), out=weights)
                torch.ops.aten.silu_backward.grad_input(ds, scores, grad_input=ds)
                tq[:, tile.rows].add_(torch.bmm(ds, ck))
                tk[:, tile.columns].add_(torch.bmm(ds.transpose(1, 2), rq))
                if dtable is not None:
                    dtable += torch.bincount(bias, room.over_heads(ds, len(block.tokens)), minlength=len(table))
        found = None if dtable is None else dtable.to(table.dtype)
        return padding.remove(dq), padding.remove(dk), padding.remove(dv), found, None


def _bias(block: Block, tile: Tile, shape: Shape) -> Tensor:
    return bias_rows(block, tile.rows, tile.columns, shape) if tile.bias is None else tile.bias


class _Padding:
    """The way from tokens f32[T, H, d] to the places of all blocks f32[places * H, d], head by head, and back."""

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.shape = like.shape
        heads = like.shape[1]
        head = torch.arange(heads)
        rows = [(block.tokens[:, None] * heads + head[:, None]).view(-1) for block in plan.blocks]
        self._there = torch.cat([head[:0], *rows])
        self._back = ((plan.sequence * heads + plan.place)[:, None] + plan.width[:, None] * head).view(-1)

    def add(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[2]).index_select(0, self._there)

    def remove(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._back).view(self.shape)

    def of(self, block: Block, x: Tensor) -> Tensor:
        """f32[b * H, n, d]: a block's part of what `add` gives."""
        b, n = block.tokens.shape
        heads, dim = self.shape[1:]
        return x[block.first * heads :][: b * heads * n].view(b * heads, n, dim)


class _Room:
    """Buffers for the pairs of one tile, all heads, which every tile of a pass uses."""

    def __init__(self, plan: Plan, q: Tensor) -> None:
        pairs = max((prod(tile.cells(len(block.tokens))) for block in plan.blocks for tile in block.tiles), default=0)
        self._scores, self._other = q.new_empty(pairs * q.shape[1]), q.new_empty(pairs * q.shape[1])
        self._pairs = q.new_empty(pairs)

    def scores(self, tile: Tile, q: Tensor, k: Tensor, bias: Tensor, table: Tensor, *, keep: bool) -> Tensor:
        """f32[b * H, rows, columns]: what SiLU takes."""
        q, k = q[:, tile.rows], k[:, tile.columns]
        shape = (len(q), q.shape[1], k.shape[1])
        room = q.new_empty(shape) if keep else self._scores[: prod(shape)].view(shape)
        scores = torch.bmm(q, k.transpose(1, 2), out=room)
        added = torch.index_select(table, 0, bias, out=self._pairs[: len(bias)]).view(-1, 1, *shape[1:])
        scores.view(len(added), -1, *shape[1:]).add_(added)
        return scores

    def other(self, scores: Tensor) -> Tensor:
        """Room for as many again."""
        return self._other[: scores.numel()].view(scores.shape)

    def over_heads(self, ds: Tensor, b: int) -> Tensor:
        """f32[b * rows * columns]: the sum over heads."""
        first, *others = ds.view(b, -1, ds.shape[1] * ds.shape[2]).unbind(1)
        if not others:
            return first.reshape(-1)
        total = torch.add(first, others[0], out=self._pairs[: first.numel()].view(first.shape))
        for head in others[1:]:
            total += head
        return total.view(-1)
