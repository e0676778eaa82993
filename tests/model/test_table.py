"""The ID table against a slow oracle: dictionaries and loops with the same rules."""

import math
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamgr import config
from streamgr.errors import ConfigError, DataError
from streamgr.model.admission import Sketch
from streamgr.model.hashing import buckets, fallback_rows, fmix64
from streamgr.model.table import IdTable, TableStats

START = 1_700_000_000_000
EDGES = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2, 0x9E3779B97F4A7C15]


def geometry(
    slots: int = 16, width: int = 4, ttl: float = 100.0, half_life: float = 0.0, admit: int = 1
) -> config.Table:
    return config.Table(
        slots=slots, bucket_width=width, fallback_rows=8, ttl_seconds=ttl, half_life_seconds=half_life, admit_min=admit
    )


def u64(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def at(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


@dataclass
class Oracle:
    """slot -> (key, last ms, log2 score * 2^20); every rule of the module docstring, one key at a time."""

    rules: config.Table
    slots: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    watermark: int = -(2**62)
    admissions: int = 0
    evictions: int = 0
    expiries: int = 0
    unplaced: int = 0

    def homes(self, key: int) -> list[int]:
        width = self.rules.bucket_width
        first, second = buckets(u64(key), self.rules.slots // width)
        return [int(b) * width + w for b in (first[0], second[0]) for w in range(width)]

    def score(self, seen: list[int]) -> int:
        half_life = int((self.rules.half_life_seconds or self.rules.ttl_seconds / 4) * 1000)
        return (max(seen) << 20) // half_life + round(math.log2(len(seen)) * 2**20)

    def map(self, batch: list[tuple[int, int]], watermark: int) -> dict[int, int | None]:
        ttl = int(self.rules.ttl_seconds * 1000)
        self.watermark = max(self.watermark, watermark)
        for slot in [s for s, (_, last, _) in self.slots.items() if last < self.watermark - ttl]:
            del self.slots[slot]
            self.expiries += 1
        times: dict[int, list[int]] = {}
        for key, time in batch:
            times.setdefault(key, []).append(time)
        found: dict[int, int | None] = {}
        for key, seen in times.items():
            home = next((s for s in self.homes(key) if s in self.slots and self.slots[s][0] == key), None)
            found[key] = home
            if home is not None:
                _, last, score = self.slots[home]
                x = self.score(seen)
                gap = (abs(score - x) >> 8) / 4096
                more = round(math.log2(1 + 2**-gap) * 2**20) if gap < 26 else 0
                self.slots[home] = (key, max(last, *seen), max(score, x) + more)
        held = {s for s in found.values() if s is not None}
        waiting = sorted(k for k in times if found[k] is None and max(times[k]) >= self.watermark - ttl)
        while waiting:
            wishes: dict[int, int] = {}
            for key in waiting:
                choices = [s for s in self.homes(key) if s not in held]
                if choices:
                    best = min(choices, key=lambda s: (s in self.slots, self.slots.get(s, (0, 0, 0))[2]))
                    wishes.setdefault(best, key)
            if not wishes:
                break
            for slot, key in wishes.items():
                self.evictions += slot in self.slots
                self.admissions += 1
                self.slots[slot] = (key, max(times[key]), self.score(times[key]))
                found[key] = slot
                held.add(slot)
                waiting.remove(key)
        self.unplaced += len(waiting)
        return found

    def stats(self) -> TableStats:
        counts = (len(self.slots), self.admissions, self.evictions, self.expiries, self.unplaced)
        return TableStats(self.rules.slots, *counts)


keys = st.one_of(st.sampled_from(EDGES), st.integers(1, 40))
batches = st.lists(
    st.tuples(st.lists(st.tuples(keys, st.integers(0, 60_000)), max_size=30), st.integers(0, 60_000)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=120, deadline=None)
@given(batches, st.sampled_from([(16, 4), (8, 8), (32, 2), (16, 1)]), st.sampled_from([0.0, 1.0, 1e6]))
def test_the_table_is_its_rules(
    steps: list[tuple[list[tuple[int, int]], int]], shape: tuple[int, int], half_life: float
) -> None:
    """P1, P2, P3, P5, P6, P22, and that the new occupant starts at its fallback vector (P10)."""
    rules = geometry(*shape, ttl=100.0, half_life=half_life)
    table, oracle, now = IdTable(rules, 4, 1), Oracle(rules), START
    for batch, jump in steps:
        now += jump
        batch = [(key, now - ago) for key, ago in batch]
        ids, times = u64(*(k for k, _ in batch)), at(*(t for _, t in batch))
        before = {int(k): int(r) for r, k in zip(*table.live(now), strict=True)}
        lookup = table.map(ids, times, watermark_ms=now)
        wanted = oracle.map(batch, now)
        fallback = list(zip(*(x.tolist() for x in fallback_rows(ids, 8)), strict=True))
        for i, (key, _) in enumerate(batch):
            slot = wanted[key]
            rows = fallback[i] if slot is None else (slot + table.first_slot,) * 2
            assert (int(lookup.rows_a[i]), int(lookup.rows_b[i])) == rows
        live_rows, live_keys = table.live(now)
        assert {int(r) - table.first_slot: int(k) for r, k in zip(live_rows, live_keys, strict=True)} == {
            slot: key for slot, (key, _, _) in oracle.slots.items()
        }
        assert len(set(live_keys.tolist())) == len(live_keys)
        again = table.lookup(ids, watermark_ms=now)
        assert np.array_equal(again.rows_a, lookup.rows_a) and np.array_equal(again.rows_b, lookup.rows_b)
        assert table.stats() == oracle.stats()
        changed_hands = {
            r for k, r in ((int(k), int(r)) for r, k in zip(live_rows, live_keys, strict=True)) if before.get(k) != r
        }
        assert set(lookup.fresh.tolist()) == changed_hands
        for row, key in zip(live_rows, live_keys, strict=True):
            if row in lookup.fresh:
                a, b = fallback_rows(u64(int(key)), 8)
                assert torch.equal(table.weight[int(row)], (table.weight[int(a[0])] + table.weight[int(b[0])]) / 2)
        table.weight[table.first_slot :] += 1.0  # so that a slot that was not reset shows
    stats = table.stats()
    assert stats.used == stats.admissions - stats.evictions - stats.expiries


def test_every_u64_is_a_legal_id() -> None:
    """P22."""
    table = IdTable(geometry(), 4, 1)
    ids = u64(*EDGES)
    lookup = table.map(ids, np.full(len(ids), START), watermark_ms=START)
    assert np.array_equal(lookup.rows_a, lookup.rows_b) and len(set(lookup.rows_a.tolist())) == len(EDGES)
    assert sorted(table.live(START)[1].tolist()) == sorted(EDGES)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(keys, st.integers(0, 90_000)), max_size=60), st.randoms(use_true_random=False), st.integers(1, 3)
)
def test_the_order_of_a_batch_does_not_matter(
    batch: list[tuple[int, int]], shuffler: random.Random, admit: int
) -> None:
    """P7, admission and eviction included."""
    shuffled = list(batch)
    shuffler.shuffle(shuffled)
    tables = []
    for version in (batch, shuffled):
        table = IdTable(geometry(8, 4, admit=admit), 4, 1)
        table.map(u64(*range(20, 30)), np.full(10, START - 50_000), watermark_ms=START)
        ids, times = u64(*(k for k, _ in version)), at(*(START - ago for _, ago in version))
        lookup = table.map(ids, times, watermark_ms=START)
        tables.append(
            (table.state(), dict(zip(ids.tolist(), lookup.rows_a.tolist(), strict=True)), lookup.fresh.tolist())
        )
    (state, rows, fresh), (other, other_rows, other_fresh) = tables
    assert rows == other_rows and fresh == other_fresh
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_an_expired_id_is_a_miss_at_once_and_is_not_admitted_again_by_an_old_event() -> None:
    table = IdTable(geometry(ttl=10.0), 4, 1)
    row = int(table.map(u64(7), at(START), watermark_ms=START).rows_a[0])
    assert table.lookup(u64(7), watermark_ms=START + 10_000).rows_a[0] == row
    gone = table.lookup(u64(7), watermark_ms=START + 10_001)
    assert (int(gone.rows_a[0]), int(gone.rows_b[0])) == tuple(int(x[0]) for x in fallback_rows(u64(7), 8))
    assert len(table.live(START + 10_001)[0]) == 0
    old = table.map(u64(7), at(START), watermark_ms=START + 10_001)
    assert old.rows_a[0] < table.first_slot and len(old.fresh) == 0
    back = table.map(u64(7), at(START), watermark_ms=START)  # there is no way back for the watermark
    assert back.rows_a[0] < table.first_slot and len(back.fresh) == 0
    assert table.map(u64(7), at(START + 9_000), watermark_ms=START).fresh.tolist() == [row]
    assert table.stats() == TableStats(16, 1, 2, 0, 1, 0)


def test_a_batch_that_needs_more_than_its_buckets_never_takes_what_it_has_touched() -> None:
    table = IdTable(geometry(8, 4), 4, 1)
    first = table.map(u64(*range(8)), np.full(8, START), watermark_ms=START)
    both = table.map(u64(*range(100)), np.full(100, START + 1), watermark_ms=START)
    placed = first.rows_a >= table.first_slot
    assert np.array_equal(both.rows_a[:8][placed], first.rows_a[placed])
    stats = table.stats()
    assert stats.used == 8 and stats.unplaced == 92 and stats.evictions == 0


@pytest.mark.parametrize("half_life", [1.0, 3_600.0, 1e9])
def test_scores_follow_the_decayed_count_and_do_not_overflow(half_life: float) -> None:
    """P20; times up to the end of int64 are only clipped."""
    table = IdTable(geometry(1, 1, ttl=1e9, half_life=half_life), 4, 1)
    r = np.random.default_rng(0)
    times = START + np.sort(r.integers(0, int(half_life * 20_000), 300))
    for time in times.tolist():
        table.map(u64(1), at(time), watermark_ms=START)
    ages = (times[-1] - times) / (half_life * 1000)
    wanted = np.log2(np.exp2(-ages).sum()) + times[-1] / (half_life * 1000)
    assert int(table.state()["score"][0]) / 2**20 == pytest.approx(wanted, abs=2e-3)
    table.map(u64(1), at(2**63 - 1), watermark_ms=START)
    assert int(table.state()["score"][0]) > 0


def test_hot_keys_outlive_cold_ones_with_a_long_half_life_and_recent_ones_with_a_short_one() -> None:
    for half_life, survivor in ((1e6, 1), (1.0, 2)):
        table = IdTable(geometry(2, 2, ttl=1e5, half_life=half_life), 4, 1)
        table.map(np.full(50, 1, np.uint64), np.full(50, START), watermark_ms=START)
        table.map(u64(2), at(START + 60_000), watermark_ms=START)
        table.map(u64(3), at(START + 61_000), watermark_ms=START)
        assert set(table.live(START)[1].tolist()) == {survivor, 3}


def test_admission_waits_for_the_count_and_never_refuses_one_that_has_it() -> None:
    """P9 through the table."""
    table = IdTable(geometry(64, 8, admit=3), 4, 1)
    ids = u64(*range(10))
    for _ in range(2):
        assert len(table.map(ids, np.full(10, START), watermark_ms=START).fresh) == 0
    assert len(table.map(ids, np.full(10, START), watermark_ms=START).fresh) == 10
    assert len(table.map(u64(77, 77, 77), np.full(3, START), watermark_ms=START).fresh) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=80), max_size=12))
def test_the_sketch_never_counts_too_little(steps: list[list[int]]) -> None:
    sketch, truth = Sketch(16), dict.fromkeys(range(401), 0)
    for step in steps:
        for key in step:
            truth[key] += 1
        ids, times = np.unique(np.array(step, np.uint64), return_counts=True)
        estimates = sketch.count(ids, times)
        if sketch.counted == 0:  # halved
            truth = dict.fromkeys(range(401), 0)
        assert all(estimate >= truth[int(key)] for key, estimate in zip(ids, estimates, strict=True))


def test_deltas_make_a_follower_equal() -> None:
    """P11: what changed since the last mark, applied, gives the same vector for every id, known or not."""
    rules = geometry(32, 4, ttl=100.0)
    trainer, scorer = IdTable(rules, 4, 1), IdTable(rules, 4, 99)
    r = np.random.default_rng(2)
    ids = np.arange(60, dtype=np.uint64)
    mark, now = trainer.mark(), START
    scorer.put_rows(trainer.rows(trainer.snapshot_rows(now)))
    for _ in range(40):
        now += 15_000
        seen = r.choice(ids, 12)
        lookup = trainer.map(seen, np.full(12, now - 3_000), watermark_ms=now)
        learned = np.unique(np.concatenate([lookup.rows_a, lookup.rows_b]))
        trainer.weight[learned] += torch.from_numpy(r.normal(size=(len(learned), 4)).astype(np.float32))
        trainer.touch(learned)
        part, mark = trainer.rows(trainer.changed_since(mark)), trainer.mark()
        scorer.put_rows(part)
        for table in (trainer, scorer.copy()):
            assert torch.equal(
                table.vectors(table.lookup(ids, watermark_ms=now)),
                trainer.vectors(trainer.lookup(ids, watermark_ms=now)),
            )
        assert all(np.array_equal(a, b) for a, b in zip(trainer.live(now), scorer.live(now), strict=True))
        fresh = IdTable(rules, 4, 7)
        fresh.put_rows(trainer.rows(trainer.snapshot_rows(now)))
        both = (t.vectors(t.lookup(ids, watermark_ms=now)) for t in (fresh, trainer))
        assert torch.equal(*both)
    assert trainer.stats().evictions and trainer.stats().expiries


def test_only_what_changed_is_in_a_delta() -> None:
    table = IdTable(geometry(), 4, 1)
    mark = table.mark()
    assert table.changed_since(mark).tolist() == []
    lookup = table.map(u64(5), at(START), watermark_ms=START)
    table.touch(at(1))
    assert table.changed_since(mark).tolist() == [1, *lookup.fresh.tolist()]
    assert table.changed_since(table.mark()).tolist() == []


@pytest.mark.parametrize("admit", [1, 2])
def test_a_table_goes_on_from_its_state_as_if_nothing_had_happened(admit: int) -> None:
    r = np.random.default_rng(4)
    batches = [
        (r.integers(0, 90, 20).astype(np.uint64), START + i * 20_000 - r.integers(0, 30_000, 20)) for i in range(20)
    ]
    whole = IdTable(geometry(32, 4, admit=admit), 4, 1)
    rows = []
    for i, (ids, times) in enumerate(batches):
        if i == 10:
            half = IdTable(whole.settings, 4, 55)
            half.load_state(whole.state())
        rows.append(whole.map(ids, times, watermark_ms=START + i * 20_000))
    for i, (ids, times) in enumerate(batches[10:], 10):
        again = half.map(ids, times, watermark_ms=START + i * 20_000)
        assert np.array_equal(again.rows_a, rows[i].rows_a) and np.array_equal(again.fresh, rows[i].fresh)
    one, two = whole.state(), half.state()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert whole.stats() == half.stats()


def test_a_state_of_another_geometry_is_refused() -> None:
    with pytest.raises(ConfigError, match="another geometry"):
        IdTable(geometry(32, 4), 4, 1).load_state(IdTable(geometry(16, 4), 4, 1).state())


def test_rows_that_cannot_belong_to_the_table_are_refused_and_change_nothing() -> None:
    table = IdTable(geometry(), 4, 1)
    lookup = table.map(u64(5, 6), at(START, START), watermark_ms=START)
    good, before = table.rows(lookup.fresh), table.state()
    elsewhere = [row for row in range(table.first_slot, len(table.weight)) if row not in lookup.fresh]
    foreign = [r for r in elsewhere if (r - table.first_slot) // 4 not in [int(b[0]) for b in buckets(u64(5), 4)]]
    for bad in (
        good | {"rows": torch.tensor([0, 5])},
        good | {"rows": torch.tensor([5, 10**6])},
        good | {"rows": torch.tensor([12, 12])},
        good | {"weight": torch.zeros(2, 3)},
        good | {"keys": good["keys"][:1]},
        table.rows(lookup.fresh[:1]) | {"rows": torch.tensor(foreign[:1]), "keys": torch.tensor([5])},
    ):
        with pytest.raises(DataError):
            table.put_rows(bad)
    assert all(torch.equal(before[name], value) for name, value in table.state().items())


def test_fallback_vectors_are_equal_for_equal_seeds_and_the_padding_row_is_zero() -> None:
    a, b, c = (IdTable(geometry(), 4, seed) for seed in (1, 1, 2))
    ids = u64(*range(20))
    same = [t.vectors(t.lookup(ids, watermark_ms=0)) for t in (a, b, c)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    assert not a.weight[0].any() and same[0].any(1).all()


def test_whitening_is_a_bijection_that_spreads_sequential_ids() -> None:
    assert int(fmix64(u64(1))[0]) == 0xB456BCFC34C2CB2C  # the published finaliser
    assert len(np.unique(fmix64(np.arange(100_000, dtype=np.uint64)))) == 100_000
    first, second = buckets(np.arange(100_000, dtype=np.uint64), 256)
    assert (first != second).all()
    assert np.bincount(first, minlength=256).max() < 500  # 390 on average
