"""The index on a GPU against the one in numpy: the same calls, then every answer and every column, bit for bit.

There need be no GPU: Triton's interpreter runs the kernels on tensors of the CPU. It is asked for as Triton is
imported, so before anything else here; that they compile as well is a matter of its own (last test).
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from streamgr.errors import ConfigError, DataError
from streamgr.model import decay
from streamgr.model.admission import Sketch
from streamgr.model.index import EMPTY, FOREVER, Index

with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="no Triton here (it is for Linux): `pip install -e .[gpu]`")
    from triton.runtime.interpreter import InterpretedFunction

    from streamgr.model import index_kernels
    from streamgr.model.index_triton import TorchSketch, TritonIndex, at

START = 1_700_000_000_000
EDGES = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
LIVES = [100_000, 40_000, 20_000]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


def tensor(values: NDArray[Any]) -> torch.Tensor:
    """A copy, u64 as the i64 of the same bits."""
    return torch.from_numpy((values.view(np.int64) if values.dtype == np.uint64 else values).copy())


def same(one: NDArray[Any], other: torch.Tensor) -> bool:
    return np.array_equal(tensor(one).numpy(), other.numpy())


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """The first launch imports more of Triton. Not for longer: other tests start processes that inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


class Twins:
    """Both indexes, and every call made of both. The one on a GPU gets each batch in an order of its own."""

    def __init__(
        self,
        slots: int,
        width: int,
        *,
        admit: int = 1,
        pin_depth: int = 0,
        half_life: int = 25_000,
        lives: Sequence[int] = LIVES,
    ) -> None:
        def build(kind: Any, **more: Any) -> Any:
            sketch = Sketch(slots) if admit > 1 else None
            rules = {"lives_ms": lives, "half_life_ms": half_life, "admit_min": admit, "pin_depth": pin_depth}
            return kind(slots, width, sketch=sketch, **rules, **more)

        self.numpy: Index = build(Index)
        self.triton: TritonIndex = build(TritonIndex, device="cpu")

    def map(self, keys: U64, times: I64, watermark: int, *, field: int | None = None, seed: int = 0) -> I64:
        """One field for all, or any with any: a key may come with several."""
        fields = np.random.default_rng(seed).integers(0, len(LIVES), len(keys)).astype(np.uint8)
        one = self.numpy.map(keys, times, fields if field is None else field, watermark_ms=watermark)
        order = np.random.default_rng(seed).permutation(len(keys))
        other = self.triton.map(
            tensor(keys[order]),
            tensor(times[order]),
            tensor(fields[order]) if field is None else field,
            watermark_ms=watermark,
        )
        assert same(one.slots[order], other.slots)
        assert same(one.fresh, other.fresh) and same(one.fresh_keys, other.fresh_keys)
        return one.slots

    def find(self, keys: U64, watermark: int) -> None:
        assert same(self.numpy.find(keys, watermark), self.triton.find(tensor(keys), watermark))

    def agree(self) -> None:
        """Every column, the sketch, the tally, watermark, total and batch."""
        one, other = self.numpy.state(), self.triton.state()
        assert one.keys() == other.keys() and len(self.numpy) == len(self.triton)
        for name, column in one.items():
            assert column.dtype == other[name].dtype and np.array_equal(column, other[name]), name


keys = st.one_of(st.sampled_from(EDGES), st.integers(1, 60))
offsets = st.one_of(st.integers(-80_000, 5_000), st.sampled_from([0, -100_000, -100_001]))
events = st.lists(st.tuples(keys, offsets), max_size=40)
odd_times = st.sampled_from([EMPTY, -1, 0, decay.LATEST_MS, 2**62, FOREVER - 1, FOREVER])


class Machine(RuleBasedStateMachine):
    """Any sequence of calls, on tables small enough that most of what can happen does."""

    @initialize(
        shape=st.sampled_from([(16, 8), (8, 8), (32, 16), (48, 24), (32, 32)]),
        admit=st.sampled_from([1, 1, 2]),
        pin_depth=st.integers(0, 2),
        half_life=st.sampled_from([1_000, 25_000, 1 << 42]),
        lives=st.sampled_from([LIVES, [50_000, FOREVER, 1]]),
    )
    def build(self, shape: tuple[int, int], admit: int, pin_depth: int, half_life: int, lives: Sequence[int]) -> None:
        self.twins = Twins(*shape, admit=admit, pin_depth=pin_depth, half_life=half_life, lives=lives)
        self.now, self.grown = START, 0

    def _map(self, batch: list[tuple[int, int]], field: int | None, seed: int) -> None:
        ids, times = (np.array([x[i] for x in batch], dtype) for i, dtype in enumerate((np.uint64, np.int64)))
        self.twins.map(ids, times, self.now, field=field, seed=seed)

    @rule(batch=events, later=st.integers(-5_000, 60_000), field=st.sampled_from([None, None, 1]), seed=st.integers(0))
    def map(self, batch: list[tuple[int, int]], later: int, field: int | None, seed: int) -> None:
        self.now += later
        self._map([(key, self.now + offset) for key, offset in batch], field, seed)

    @rule(keys=st.lists(st.integers(0, 500), min_size=60, max_size=90), seed=st.integers(0))
    def crowd(self, keys: list[int], seed: int) -> None:
        """More than there is room for."""
        self._map([(key, self.now - key) for key in keys], None, seed)

    @rule(batch=st.lists(st.tuples(keys, odd_times), max_size=6), seed=st.integers(0))
    def map_odd_times(self, batch: list[tuple[int, int]], seed: int) -> None:
        self._map(batch, None, seed)

    @rule(apart=st.one_of(st.integers(-200_000, 200_000), st.sampled_from([EMPTY - START, FOREVER - START])))
    def find(self, apart: int) -> None:
        """At any watermark: a key that came back may hold two slots at a lower one."""
        ids = np.array([*EDGES, *range(2, 70)], np.uint64)
        self.twins.find(ids, min(max(self.now + apart, EMPTY), FOREVER))

    @rule(field=st.integers(0, 2), seed=st.integers(0, 99), apart=st.integers(-50_000, 50_000))
    def read(self, field: int, seed: int, apart: int) -> None:
        one, other, watermark = self.twins.numpy, self.twins.triton, self.now + apart
        assert same(one.live(watermark), other.live(watermark))
        slots = one.live(watermark, field)
        assert same(slots, other.live(watermark, field))
        drawn = (twin.draw(5, field, watermark, np.random.default_rng(seed)) for twin in (one, other))
        assert same(*drawn)  # type: ignore[arg-type]
        assert np.allclose(one.share(slots), other.share(tensor(slots)).numpy(), rtol=1e-12)

    @rule(ids=st.lists(keys, unique=True, max_size=5), second=st.booleans(), until=st.one_of(offsets, odd_times))
    def put(self, ids: list[int], second: bool, until: int) -> None:
        one, other = self.twins.numpy, self.twins.triton
        values = np.array(ids, np.uint64)
        homes = one.homes(values)
        assert all(same(a, b) for a, b in zip(homes, other.homes(tensor(values)), strict=True))
        column = np.arange(len(ids)) % one.width
        slots, unique = np.unique(homes[second] * one.width + column, return_index=True)
        until = until if abs(until) > 200_000 else self.now + until
        untils, fields = np.full(len(slots), until), (values[unique] % np.uint64(3)).astype(np.uint8)
        one.put(slots, values[unique], untils, fields)
        other.put(*(tensor(x) for x in (slots, values[unique], untils, fields)))

    @precondition(lambda self: self.grown < 2)
    @rule()
    def grow(self) -> None:
        self.grown += 1
        assert same(self.twins.numpy.grow(), self.twins.triton.grow())

    @rule()
    def swap(self) -> None:
        """Each goes on from the other's state."""
        one, other = self.twins.numpy.state(), self.twins.triton.state()
        self.twins.numpy.load_state(other)
        self.twins.triton.load_state(one)

    @invariant()
    def agree(self) -> None:
        self.twins.agree()


TestTwins = Machine.TestCase
TestTwins.settings = settings(max_examples=40, stateful_step_count=8, deadline=None)


@pytest.mark.parametrize(("width", "slots"), [(8, 16), (16, 32), (32, 64)])
def test_everything_that_can_become_of_a_key_does_in_both(width: int, slots: int) -> None:
    r, now = np.random.default_rng(width), START
    twins = Twins(slots, width, admit=2, pin_depth=1)
    for step in range(6):
        now += int(r.integers(10_000, 20_000))
        ids = r.integers(0, 3 * slots, 2 * slots).astype(np.uint64) * np.uint64(EDGES[-1])
        ids[:3] = EDGES[:3]
        ago = r.integers(0, 50_000, len(ids)) if step % 2 else np.zeros(len(ids), np.int64)  # then scores are equal
        twins.map(ids, now - ago, now, seed=step)
        twins.agree()
    tally = twins.numpy.tally
    expiries = tally.admissions - tally.evictions - len(twins.numpy.live(now))
    assert min(tally.admissions, tally.evictions, tally.unadmitted, tally.stale, tally.unplaced, expiries) > 0


def test_a_hot_key_and_batches_of_many_programs() -> None:
    """Runs that cross the border between two programs, counts beyond the first table of logarithms."""
    twins, r = Twins(256, 8), np.random.default_rng(3)
    twins.map(np.array([2**63], np.uint64), np.array([START]), START)
    ids = np.where(np.arange(5_000) % 10 > 0, 2**63, r.integers(0, 400, 5_000).astype(np.uint64)).astype(np.uint64)
    for step in range(2):
        twins.map(ids, START + r.integers(0, 1_000, len(ids)), START, seed=step)
        twins.agree()
    assert (twins.numpy.find(ids, START) >= 0).mean() > 0.9


def test_a_key_that_came_back_is_found_alike_at_a_lower_watermark() -> None:
    """Its old slot was pinned when it had expired, so it has two: in the same bucket, and in both."""
    twins = Twins(32, 32, pin_depth=1)
    ids = np.arange(12, dtype=np.uint64) * np.uint64(3)
    twins.map(ids, np.full(12, START), START)
    twins.map(ids, np.full(12, START + 200_000), START + 200_000)
    columns = twins.numpy.keys[twins.numpy.live(START)]
    assert len(columns) == 24 and len(set(columns.tolist())) == 12
    twins.find(ids, START)
    twins.find(ids, START + 200_000)


def test_in_the_last_millisecond_of_its_life_a_key_is_evicted_and_after_it_expired() -> None:
    for late, evictions in ((0, 1), (1, 0)):
        twins, now = Twins(8, 8), START + LIVES[0] + late
        twins.map(np.arange(0, 24, 3, dtype=np.uint64), np.full(8, START), START, field=0)
        twins.map(np.array([30], np.uint64), np.array([now]), now, field=0)
        twins.agree()
        assert twins.numpy.tally.evictions == evictions


def test_the_sketch_halves_and_saturates_alike() -> None:
    one, r = Sketch(16), np.random.default_rng(5)
    other, halved = TorchSketch(one, torch.device("cpu")), 0
    for limit in (3, 50, 70_000, 400, 3, 3):
        ids = np.unique(r.integers(0, 900, 200).astype(np.uint64) * np.uint64(EDGES[-1]))
        times = r.integers(1, limit, len(ids))
        assert same(one.count(ids, times), other.count(tensor(ids), tensor(times)))
        assert np.array_equal(one.cells, other.cells.numpy()) and one.counted == other.counted
        halved += one.counted == 0
    assert halved >= 2


def test_both_take_the_same_numbers() -> None:
    """The table of counts is what numpy makes of them one by one, and scores of times agree at the ends of i64."""
    table = decay.counts(3_000)
    assert table[0] == 0 and all(table[n] == decay.times(np.array([n]))[0] for n in range(1, 3_001))
    times = np.array([EMPTY, -1, 0, START, decay.LATEST_MS, decay.LATEST_MS + 1, FOREVER])
    for half_life in (1_000, 25_000, 1 << 42):
        assert same(decay.at(times, half_life), at(tensor(times), half_life))


def test_bad_input_has_a_name() -> None:
    with pytest.raises(ConfigError, match="too wide"):
        TritonIndex(128, 128, lives_ms=LIVES, half_life_ms=1_000, device="cpu")
    index = Twins(16, 8).triton
    with pytest.raises(DataError, match="field"):
        index.map(torch.tensor([1]), torch.tensor([START]), 3, watermark_ms=START)


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """To machine code of an H100, without one; in a process of its own that does not interpret."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    argv = [sys.executable, "-m", "tests.model.compile_kernels"]
    run = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    made = dict(line.split() for line in run.stdout.splitlines())
    kernels = {
        name
        for name, kernel in vars(index_kernels).items()
        if isinstance(kernel, InterpretedFunction) and name[0] != "_"
    }
    assert made.keys() == kernels and all(int(size) > 1_000 for size in made.values())
