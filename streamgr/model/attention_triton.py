"""The attention of `attention` on a GPU: what the kernels of `attention_kernels` are launched with, and on what.

A batch is laid out on the host once for all layers and sent over as vectors: a mask is `visible` and two times a
token, never a matrix. The work is a list of tiles, so a short sequence costs one: for each tile of rows the tiles of
keys of which any of its rows sees any (a request's targets do not see each other, so there are none between them; a
local window leaves the middle out), for each tile of keys the range of tiles of rows that see it. The longest go first.

Beside the gradients themselves backward takes STRIDE * (position + time buckets) floats: what each program of `biases`
found, summed afterwards in one order.

Launches are on the tensors' device and torch's current stream there. Nothing waits for the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from streamgr.errors import ConfigError
from streamgr.model import attention_kernels
from streamgr.model.attention import Shape
from streamgr.model.tokens import Tokens

TILES = {torch.float32: 32, torch.bfloat16: 64}  # rows and keys of a tile that suit a dtype
STRIDE = 1024  # programs of `biases`, at most
LEAST_WIDTH = 16  # a tensor core's inner dimension
MOST_WIDTH = 128
MOST_POSITIONS = 8192  # a program of `biases` keeps as many sums in registers
ANYWHERE = (1 << 31) - 1  # as a window

# Warps and stages by bytes of an element, for head dims up to 64 and above. Chosen from what the compiler says: few
# spilled registers, and shared memory that there is everywhere: at most 96 KB as compiled for Ampere, whose smallest
# cards have 99, and 128 KB of Hopper's 227. So there is no table an architecture, and nothing to try out at run time.
LAUNCHES: Mapping[str, Mapping[int, tuple[tuple[int, int], tuple[int, int]]]] = {
    "forward": {2: ((4, 2), (8, 2)), 4: ((4, 2), (8, 1))},
    "rows": {2: ((4, 2), (8, 2)), 4: ((4, 2), (8, 1))},
    "keys": {2: ((4, 2), (8, 1)), 4: ((8, 2), (8, 1))},
    "biases": {2: ((8, 2), (8, 2)), 4: ((4, 1), (8, 1))},
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch on the device.

    visible i32[T]; asked, stamped i64[T], ms: query times and times. rows i32[r, 6]: start and length of the sequence,
    first row, then the tiles of keys: 0 to `ahead`, `begin` to `end`. keys i32[r, 5]: start, length, first key, then
    the tiles of rows, `begin` to `end`.
    """

    shape: Shape
    tile: int
    visible: Tensor
    asked: Tensor
    stamped: Tensor
    rows: Tensor
    keys: Tensor


def plan(tokens: Tokens, shape: Shape, device: torch.device | str = "cuda", tile: int = TILES[torch.float32]) -> Plan:
    """Lay out a batch. `ConfigError` for more position buckets than the kernels can hold."""
    if shape.positions > MOST_POSITIONS:
        raise ConfigError(
            f"{shape.positions} position buckets are too many for a GPU",
            where="model.position_buckets",
            remedy=f"at most {MOST_POSITIONS}",
        )
    rows, keys = work(tokens, shape, tile)
    small = [x.astype(np.int32) for x in (tokens.visible, rows, keys)]
    visible, on_rows, on_keys, asked, stamped = (
        torch.from_numpy(np.ascontiguousarray(x)).to(device)  # each its own: aligned, so no kernel is compiled twice
        for x in (*small, tokens.query_times, tokens.times)
    )
    return Plan(shape, tile, visible, asked, stamped, on_rows, on_keys)


def work(tokens: Tokens, shape: Shape, tile: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`Plan.rows` and `Plan.keys`."""
    lengths = np.diff(tokens.offsets)
    tiles = -(-lengths // tile)
    sequence = np.repeat(np.arange(len(lengths)), tiles)
    head = np.repeat(np.cumsum(tiles) - tiles, tiles)  # the first tile of each tile's sequence
    index = np.arange(len(sequence))
    first = (index - head) * tile
    start, length = tokens.offsets[sequence], lengths[sequence]
    if not len(index):
        return np.zeros((0, 6), np.int64), np.zeros((0, 5), np.int64)
    most = np.maximum.reduceat(tokens.visible, start + first)
    least = np.minimum.reduceat(tokens.visible, start + first)
    end = -(-most // tile)
    ahead, begin = np.zeros_like(end), np.zeros_like(end)
    if shape.local_window:
        begin = np.minimum(np.maximum(least - shape.local_window, 0) // tile, end)
        ahead = np.minimum(-(-shape.global_prefix // tile), end)
        begin = np.maximum(begin, ahead)
    rows = np.stack([start, length, first, ahead, begin, end], 1)
    cost = ahead + end - begin

    # Tile t of keys is seen from the first tile of rows that ends after it to the last that begins at or before it.
    far = len(index)
    row_first, row_last = np.full(far, far), np.full(far, -1)
    sees = end > 0
    np.minimum.at(row_first, (head + end - 1)[sees], index[sees])
    np.maximum.at(row_last, (head + np.minimum(begin, end - 1))[sees], index[sees])
    row_first = np.minimum.accumulate(row_first[::-1])[::-1]
    row_last = np.maximum.accumulate(row_last)
    row_last = np.where(first < shape.global_prefix, head + tiles[sequence] - 1, row_last)
    row_last = np.where(row_first <= row_last, row_last, row_first - 1)
    keys = np.stack([start, length, first, row_first - head, row_last + 1 - head], 1)
    seen = row_last - row_first
    return rows[np.argsort(-cost, kind="stable")], keys[np.argsort(-seen, kind="stable")]


def attend(  # noqa: PLR0917 (as `Attend`)
    q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None, plan: Plan
) -> Tensor:
    """See `attention.Attend`; float32 or bfloat16, one dtype for q, k and v, and head dims up to 128."""
    if q.shape[-1] > MOST_WIDTH:
        raise ConfigError(
            f"heads of {q.shape[-1]} channels are too wide for a GPU",
            where="model.heads",
            remedy=f"more heads: at most {MOST_WIDTH} channels each",
        )
    out: Tensor = _Attend.apply(q.contiguous(), k.contiguous(), v.contiguous(), position, time, plan)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None, plan: Plan
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position, time)
        ctx.plan = plan
        out = torch.empty_like(v)
        _launch("forward", len(plan.rows) * q.shape[1], q, [q, k, v, out], position, time, plan, plan.rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position, time = ctx.saved_tensors
        plan, g = ctx.plan, gradients[0].contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        programs = len(plan.rows) * q.shape[1]
        _launch("rows", programs, q, [q, k, v, g, dq], position, time, plan, plan.rows)
        _launch("keys", programs, q, [q, k, v, g, dk, dv], position, time, plan, plan.keys)
        if position is None or time is None or not (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
            return dq, dk, dv, None, None, None
        programs = min(STRIDE, len(plan.rows))
        by_position = torch.empty(programs, len(position), dtype=torch.float32, device=q.device)
        by_time = torch.empty(programs, len(time), dtype=torch.float32, device=q.device)
        _launch("biases", programs, q, [q, k, v, g, by_position, by_time], position, time, plan, plan.rows)
        return dq, dk, dv, by_position.sum(0).to(position.dtype), by_time.sum(0).to(time.dtype), None


def _launch(  # noqa: PLR0917
    name: str,
    programs: int,
    q: Tensor,
    tensors: list[Tensor],
    position: Tensor | None,
    time: Tensor | None,
    plan: Plan,
    work: Tensor,
) -> None:
    if not programs:
        return
    shape, biased = plan.shape, position is not None and time is not None
    sizes = kernel_sizes(name, q.shape[1], q.shape[2], shape, biased, plan.tile)
    warps, stages = LAUNCHES[name][q.element_size()][sizes["WIDTH"] > 64]
    counts = [len(plan.rows)] if name == "biases" else []
    window = shape.local_window or ANYWHERE
    numbers = [*counts, shape.positions, shape.times, window, shape.global_prefix]
    columns = [position if biased else q, time if biased else q, plan.visible, plan.asked, plan.stamped, work]
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        getattr(attention_kernels, name)[(programs,)](
            *tensors, *columns, *numbers, **sizes, num_warps=warps, num_stages=stages
        )


def kernel_sizes(name: str, heads: int, dim: int, shape: Shape, biased: bool, tile: int) -> dict[str, Any]:  # noqa: PLR0917
    """What a kernel is compiled for."""
    sizes: dict[str, Any] = {"HEADS": heads, "DIM": dim, "TILE": tile}
    sizes["WIDTH"] = max(LEAST_WIDTH, triton.next_power_of_2(dim))
    if name != "biases":
        return sizes | {"BIASED": biased}
    buckets = {"POSITIONS": triton.next_power_of_2(shape.positions), "TIMES": triton.next_power_of_2(shape.times)}
    return sizes | buckets | {"STRIDE": STRIDE}
