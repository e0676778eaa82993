"""The index of an ID table on a GPU: the rules of `index`, its columns in device memory, bit for bit.

Same calls, same keys in the same slots, same evictions in the same order, same counts: `state` of one twin is
`load_state` of the other. Keys are i64 here, the bits of the u64 (torch has few unsigned types). What it does:

- A lookup is one kernel. A batch to map is sorted by time, then stably by key, so the last event of a run is a key's
  newest and the length of the run its count: no atomics. One kernel looks each key up once and touches its slot.
- Keys without one go through the rounds of `index`: one kernel turns them to a bucket, a stable sort by bucket ranks
  them, one kernel lets the r-th claim the r-th slot that is to be had.
- Integers all the way; logarithms of counts and of sums are tables that numpy made (`decay`), so no result depends on
  a maths library. Only `share` is floating point, and may differ in its last bit.

The host waits for the device where a size must be known: `map` twice (who has no slot; what happened), once more and
once a round where some have none, twice with admission; `live` once, `draw` once a round; `find` never.

Everything is launched on the current device and stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from streamgr.errors import ConfigError, DataError
from streamgr.model import decay, hashing, index_kernels
from streamgr.model.admission import LIMIT, ROWS, Sketch
from streamgr.model.index import COLUMNS, EMPTY, GROUP, Tally

BLOCK = 128  # keys a program: one a thread of four warps
MOST_WIDTH = 64  # slots of a bucket, one bit each of a word
KINDS = 256  # values of a field
SIGN = -(1 << 63)  # flipped, the order of i64 is that of u64


@dataclass(frozen=True, slots=True)
class Mapped:
    """`index.Mapped` in tensors: slots i64[n], -1 where a key has none; fresh i64[k] ascending; fresh_keys i64[k]."""

    slots: Tensor
    fresh: Tensor
    fresh_keys: Tensor


@dataclass(frozen=True, slots=True)
class _New:
    """Keys i64[m] that want a slot, u64-ascending and distinct; their newest event, count and field (u8)."""

    keys: Tensor
    newest: Tensor
    counts: Tensor
    kinds: Tensor

    def only(self, at: Tensor) -> "_New":
        return _New(self.keys[at], self.newest[at], self.counts[at], self.kinds[at])


class TritonIndex:
    """`index.Index` with torch tensors on a device instead of numpy arrays; one owner, not thread safe."""

    def __init__(
        self,
        slots: int,
        width: int,
        *,
        lives_ms: Sequence[int],
        half_life_ms: int,
        sketch: Sketch | None = None,
        admit_min: int = 1,
        pin_depth: int = 0,
        device: torch.device | str = "cuda",
    ) -> None:
        """As `index.Index`; what `sketch` has counted is taken over. `ConfigError` for buckets wider than 64."""
        if width > MOST_WIDTH:
            raise ConfigError(
                f"buckets of {width} slots are too wide for a GPU",
                where="table.bucket_width",
                remedy=f"at most {MOST_WIDTH}",
            )
        self.width, self.device = width, torch.device(device)
        self._half_life_ms, self._admit_min, self._pin_depth = half_life_ms, admit_min, pin_depth
        self._sketch = None if sketch is None else TorchSketch(sketch, self.device)
        lives = np.full(KINDS, -1, np.int64)  # of every value that a field can have, so no read is out of bounds
        lives[: len(lives_ms)] = lives_ms
        self._lives = self._tensor(lives)
        self._softplus = self._tensor(decay.SOFTPLUS)
        self._counts = self._tensor(decay.counts(1 << 12))
        self.watermark, self.total, self.batch = EMPTY + 1, decay.NEVER, 0
        self.tally = Tally()
        self._lay(slots)

    def _lay(self, slots: int) -> None:
        """Empty columns of so many slots."""
        self.buckets = slots // self.width
        self.keys = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.until_ms = torch.full_like(self.keys, EMPTY)
        self.score = torch.full_like(self.keys, decay.NEVER)
        self.field = torch.zeros_like(self.keys, dtype=torch.uint8)
        self.tag = torch.zeros_like(self.field)
        self.pin = torch.full_like(self.keys, np.iinfo(np.int32).min, dtype=torch.int32)

    def __len__(self) -> int:
        """How many slots there are."""
        return len(self.keys)

    # --- reading

    def find(self, keys: Tensor, watermark_ms: int) -> Tensor:
        """The slot i64[n] of each key i64[n] at a watermark, -1 without one. Changes nothing, waits for nothing."""
        slots = torch.empty_like(keys)
        scalars = [self.buckets, max(watermark_ms, EMPTY + 1)]
        self._launch(index_kernels.find, len(keys), [keys.contiguous(), slots, *self._searched()], scalars)
        return slots

    def live(self, watermark_ms: int, field: int | None = None) -> Tensor:
        """The slots i64[k], ascending, that hold something at a watermark (of one field)."""
        held = self.until_ms >= max(watermark_ms, EMPTY + 1)
        if field is not None:
            held &= self.field == field
        return _places(held)

    def draw(self, count: int, field: int, watermark_ms: int, rng: np.random.Generator) -> Tensor:
        """`count` slots i64[count] that hold a key of the field, uniformly with repetition; none where none do.

        The numbers are drawn on the host, and are those that `index` draws.
        """
        found: list[Tensor] = []
        missing, oldest = count, max(watermark_ms, EMPTY + 1)
        for _ in range(4):
            drawn = self._tensor(rng.integers(0, len(self), max(1024, 2 * missing)))
            kept = drawn[(self.until_ms[drawn] >= oldest) & (self.field[drawn] == field)][:missing]
            found.append(kept)
            missing -= len(kept)
            if not missing:
                return torch.cat(found)
        some = self.live(watermark_ms, field)
        if not len(some):
            return some
        return torch.cat([*found, some[self._tensor(rng.integers(0, len(some), missing))]])

    def share(self, slots: Tensor) -> Tensor:
        """f64[n]: the chance that a token drawn from the recent past (by the half life) is this slot's key."""
        apart = (self.score[slots] - self.total).clamp_(-1022 << decay.FRACTION, 0)
        return torch.exp2(apart.double() / (1 << decay.FRACTION))

    # --- mapping

    def map(self, keys: Tensor, times: Tensor, fields: Tensor | int, *, watermark_ms: int) -> Mapped:
        """Admit, touch and evict: keys i64[n], times i64[n] (event ms), fields u8[n], in any order, repeats allowed.

        The watermark never moves back: a lower one counts as the highest so far. `DataError` for a new key of a field
        without a life.
        """
        self.watermark = max(self.watermark, watermark_ms)
        self.batch += 1
        slots = torch.full_like(keys, -1)
        nothing = keys.new_empty(0)
        if not len(keys):
            return Mapped(slots, nothing, nothing)
        by_time = torch.argsort(times)
        ordered, order = torch.sort(keys[by_time] ^ SIGN, stable=True)
        order = by_time[order]
        starts = torch.searchsorted(ordered, ordered)
        if isinstance(fields, int):
            fields = torch.full_like(keys, fields, dtype=torch.uint8)
        else:  # a key that comes with several has the lowest
            lowest = torch.full_like(fields, KINDS - 1).scatter_reduce_(0, starts, fields[order], "amin")
            fields = torch.empty_like(fields).index_copy_(0, order, lowest[starts])
        held, fates = self._touch(ordered, order, starts, times, fields)
        last = _places(fates == index_kernels.WANTED.value)

        newest, stale, unknown = torch.stack([
            times.max(),
            (fates == index_kernels.STALE.value).sum(),
            (fates == index_kernels.UNKNOWN.value).sum(),
        ]).tolist()  # fmt: skip
        seen = decay.at(np.array([newest]), self._half_life_ms) + decay.times(np.array([len(keys)]))
        self.total = int(decay.add(np.array(self.total), seen)[0])
        if unknown:
            raise DataError(f"{unknown} keys of a field without a life", where="table", remedy="report it: a bug")
        self.tally.stale += stale
        fresh, fresh_keys = nothing, nothing
        if len(last):
            event = order[last]
            new = _New(ordered[last] ^ SIGN, times[event], last - starts[last] + 1, fields[event])
            begin = starts[last]
            if self._sketch is not None:
                often = _places(self._sketch.count(new.keys, new.counts) >= self._admit_min)
                self.tally.unadmitted += len(begin) - len(often)
                new, begin = new.only(often), begin[often]
            taken, placed = self._place(new)
            held[begin] = taken
            fresh, by_slot = torch.sort(taken)
            fresh, fresh_keys = fresh[len(taken) - placed :], new.keys[by_slot[len(taken) - placed :]]
        slots[order] = held[starts]
        return Mapped(slots, fresh, fresh_keys)

    def _touch(
        self, ordered: Tensor, order: Tensor, starts: Tensor, times: Tensor, fields: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The slot i64[n] of each key at the start of its run, and what became of the key, u8[n] at its end."""
        if len(ordered) >= len(self._counts):
            self._counts = self._tensor(decay.counts(1 << len(ordered).bit_length()))
        held, fates = torch.empty_like(ordered), torch.empty_like(fields)
        batch = [ordered, order, starts, times.contiguous(), fields.contiguous(), held, fates]
        columns = [*self._searched(), self.score, self.field, self.pin, self._lives, self._softplus, self._counts]
        scalars = [self.buckets, self.watermark, self.batch, self._half_life_ms]
        self._launch(index_kernels.touch, len(ordered), batch + columns, scalars)
        return held, fates

    def _place(self, new: _New) -> tuple[Tensor, int]:
        """Slots i64[m], -1 where everything is pinned, and how many have one; they hold them from now on."""
        taken, evicted = torch.full_like(new.keys, -1), torch.zeros_like(new.kinds)
        waiting = torch.arange(len(new.keys), device=self.device)
        wants = [new.keys, new.newest, new.counts, new.kinds, taken, evicted]
        judged = [self.until_ms, self.score, self.pin]
        written = [self.tag, self.keys, self.until_ms, self.score, self.field, self.pin, self._lives, self._counts]
        while n := len(waiting):
            bucket = torch.empty_like(waiting, dtype=torch.int32)
            choices, left = torch.empty_like(waiting), torch.empty_like(waiting, dtype=torch.uint8)
            scalars = [self.buckets, self.watermark, self.batch - self._pin_depth]
            self._launch(index_kernels.turn, n, [waiting, new.keys, bucket, choices, *judged], scalars)
            bucket, turns = torch.sort(bucket, stable=True)
            ranked = [waiting, turns, bucket, torch.searchsorted(bucket, bucket), choices, left]
            scalars = [self.watermark, self.batch, self._half_life_ms]
            self._launch(index_kernels.claim, n, [*ranked, *wants, *written], scalars)
            waiting = waiting[_places(left)]
        placed, evictions = torch.stack([(taken >= 0).sum(), evicted.sum()]).tolist()
        self.tally.admissions += placed
        self.tally.evictions += evictions
        self.tally.unplaced += len(taken) - placed
        return taken, placed

    def _launch(self, kernel: Any, n: int, columns: list[Tensor], scalars: list[int]) -> None:
        """A lane for each of n."""
        if n:
            groups = self.width // GROUP
            kernel[(triton.cdiv(n, BLOCK),)](*columns, n, *scalars, GROUPS=groups, BLOCK=BLOCK)

    def _searched(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a lookup reads: the tags of eight slots as one word, the keys, their lives."""
        return self.tag.view(torch.int64), self.keys, self.until_ms

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    # --- moving

    def put(self, slots: Tensor, keys: Tensor, until_ms: Tensor, field: Tensor) -> None:
        """Make slots hold exactly this; their scores are those of one event at the end of their lives."""
        self.keys[slots], self.until_ms[slots], self.field[slots] = keys, until_ms, field
        self.tag[slots] = ((fmix64(keys) >> 56) & 0xFF).clamp_(min=1).to(torch.uint8)
        self.score[slots] = at(until_ms, self._half_life_ms)

    def homes(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The two buckets, i64[n] each, in which each key i64[n] may live."""
        white = fmix64(keys)
        apart = (fmix64(white ^ _signed(hashing.SECOND)) >> 32) | 1
        return (white >> 32) & (self.buckets - 1), ((white >> 32) ^ apart) & (self.buckets - 1)

    def grow(self) -> Tensor:
        """Twice the slots. Every bucket splits in two by one more bit of its keys' hashes; nobody is displaced.

        Returns where each old slot has gone, i64[old slots].
        """
        at = torch.arange(len(self), device=self.device)
        column = at % self.width
        stays = self.homes(self.keys)[0] == at // self.width
        old = {name: getattr(self, name) for name in COLUMNS}
        self._lay(2 * len(self))
        first, second = self.homes(old["keys"])
        moved = torch.where(stays, first, second) * self.width + column
        moved = torch.where(old["until_ms"] == EMPTY, at, moved)
        for name, values in old.items():
            getattr(self, name)[moved] = values
        return moved

    def state(self) -> dict[str, NDArray[Any]]:
        """A copy of everything, for checkpoints: what `index.Index.state` gives."""
        t = self.tally
        scalars = [self.watermark, self.total, self.batch]
        scalars += [t.admissions, t.evictions, t.unadmitted, t.unplaced, t.stale]
        found: dict[str, NDArray[Any]] = {name: getattr(self, name).cpu().numpy().copy() for name in COLUMNS}
        found["keys"] = found["keys"].view(np.uint64)
        found["scalars"] = np.array(scalars, np.int64)
        if self._sketch is not None:
            found["sketch"] = self._sketch.cells.cpu().numpy().astype(np.uint16)
            found["sketch_counted"] = np.array([self._sketch.counted])
        return found

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Become what `state` was taken from, by either twin; same settings, any size."""
        self._lay(len(state["keys"]))
        for name in COLUMNS:
            column = getattr(self, name)
            values = state[name].view(np.int64) if name == "keys" else state[name]
            column.copy_(torch.from_numpy(values))
        self.watermark, self.total, self.batch, *tally = (int(x) for x in state["scalars"])
        self.tally = Tally(*tally)
        if self._sketch is not None:
            self._sketch.cells.copy_(torch.from_numpy(state["sketch"].astype(np.int32)))
            self._sketch.counted = int(state["sketch_counted"][0])


class TorchSketch:
    """`admission.Sketch` in tensors: cells i32[4, width]."""

    def __init__(self, sketch: Sketch, device: torch.device) -> None:
        self.width, self.counted = sketch.width, sketch.counted
        self.cells = torch.from_numpy(sketch.cells.astype(np.int32)).to(device)

    def count(self, keys: Tensor, times: Tensor) -> Tensor:
        """Add `times[i]` to each distinct key, return its estimate i64[n], this batch included.

        A cell takes the largest estimate, in whatever order they come.
        """
        white, columns = keys, []
        for row in range(ROWS):
            white = fmix64(white + (row + 1))
            columns.append((white & (self.width - 1)) + row * self.width)
        at, cells = torch.stack(columns), self.cells.view(-1)
        estimate = (cells[at].amin(0) + times).clamp_(max=LIMIT)
        cells.scatter_reduce_(0, at.view(-1), estimate.to(torch.int32).repeat(ROWS), "amax")
        self.counted += int(times.sum())
        if self.counted >= 8 * self.width:
            self.cells >>= 1
            self.counted = 0
        return estimate


def fmix64(keys: Tensor) -> Tensor:
    """`hashing.fmix64` of i64[n], the bits of u64."""
    white = torch.empty_like(keys)
    if len(keys):
        index_kernels.whiten[(triton.cdiv(len(keys), BLOCK),)](keys.contiguous(), white, len(keys), BLOCK=BLOCK)
    return white


def at(times: Tensor, half_life_ms: int) -> Tensor:
    """`decay.at` of i64[n]."""
    t = times.clamp(0, decay.LATEST_MS)
    return ((t // half_life_ms) << decay.FRACTION) + ((t % half_life_ms) << decay.FRACTION) // half_life_ms


def _places(mask: Tensor) -> Tensor:
    """Where something is set, i64[k] ascending."""
    return torch.nonzero(mask).squeeze(1)


def _signed(value: np.uint64) -> int:
    return int(value.view(np.int64))
