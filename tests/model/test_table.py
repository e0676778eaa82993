"""The ID table: its vectors, what of it changes hands, what goes over the wire. The index has tests of its own."""

import random
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from streamgr import config
from streamgr.errors import ConfigError, DataError
from streamgr.model.hashing import fallback_rows, first_buckets, fmix64, second_buckets
from streamgr.model.index import EMPTY
from streamgr.model.table import FEATURE, ITEM, USER, WIRE, IdTable, TableStats, mean, served

START = 1_700_000_000_000
DIM = 5
EDGES = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2, 0x9E3779B97F4A7C15]
UNIVERSE = np.array([*EDGES, *range(2, 90)], np.uint64)


def geometry(slots: int = 32, width: int = 8, ttl: float = 100.0, admit: int = 1, **more: float) -> config.Table:
    return config.Table(
        slots=slots, bucket_width=width, fallback_rows=8, ttl_seconds=ttl, admit_min=admit, max_slots=4 * slots, **more
    )


def u64(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def at(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def bits(vectors: Tensor) -> list[list[int]]:
    """f32 as what it is made of, so that equal means to the bit."""
    return vectors.contiguous().view(torch.int32).tolist()


def predicted(table: IdTable, now: int) -> list[list[int]]:
    return bits(table.vectors(table.lookup(UNIVERSE, watermark_ms=now)))


def same(one: IdTable, two: IdTable) -> bool:
    a, b = one.state(), two.state()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class World:
    """A trainer's table through traffic that admits, evicts, expires, learns and (if told) grows."""

    def __init__(self, seed: int, slots: int = 32, admit: int = 1) -> None:
        self.random = np.random.default_rng(seed)
        self.table = IdTable(geometry(slots, admit=admit, user_ttl_seconds=30.0), DIM, 1)
        self.now = START

    def step(self, seen: int = 15) -> None:
        self.now += int(self.random.choice([1_000, 15_000, 60_000]))
        keys = self.random.choice(UNIVERSE, seen)
        times = self.now - self.random.integers(0, 50_000, seen)
        fields = (keys % np.uint64(3)).astype(np.uint8)
        self.learn(self.table.map(keys, times, fields, watermark_ms=self.now).rows_a)

    def learn(self, rows: NDArray[np.int64]) -> None:
        rows = np.unique(np.concatenate([rows, self.random.integers(1, 9, 3)]))
        self.table.weight[rows] += torch.from_numpy(self.random.normal(size=(len(rows), DIM)).astype(np.float32))
        self.table.touch(rows)


# --- vectors


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_admission_changes_no_prediction(seed: int, admit: int, sizes: list[int]) -> None:
    """P2, P10: whoever was not evicted has the vector it had, to the bit; a newcomer that of its shared rows.

    Slots hold what others have learned, so one that was not overwritten would show.
    """
    world = World(seed, admit=admit)
    table = world.table
    for size in sizes:
        world.step()
        keys, times = world.random.choice(UNIVERSE, size), np.full(size, world.now)
        before = dict(zip(UNIVERSE.tolist(), predicted(table, world.now), strict=True))
        a, b = (torch.from_numpy(rows) for rows in fallback_rows(UNIVERSE, 8))
        shared = dict(zip(UNIVERSE.tolist(), bits(mean(served(table.weight[a]), served(table.weight[b]))), strict=True))
        lookup = table.map(keys, times, watermark_ms=world.now)
        after = dict(zip(UNIVERSE.tolist(), predicted(table, world.now), strict=True))
        held = set(table.live(world.now)[1].tolist())
        assert after == {key: before[key] if key in held else shared[key] for key in before}
        again = table.lookup(keys, watermark_ms=world.now)
        assert np.array_equal(again.rows_a, lookup.rows_a) and np.array_equal(again.rows_b, lookup.rows_b)
        single = lookup.rows_a == lookup.rows_b
        assert np.array_equal(single, lookup.rows_a >= table.first_slot)
        owners = dict(zip(lookup.rows_a[single].tolist(), keys[single].tolist(), strict=True))
        assert len(set(owners.values())) == len(owners)  # no two ids share a row
        assert [*zip(*(rows.tolist() for rows in fallback_rows(keys[~single], 8)), strict=True)] == [
            *zip(lookup.rows_a[~single].tolist(), lookup.rows_b[~single].tolist(), strict=True)
        ]


def test_what_is_served_is_what_goes_over_the_wire() -> None:
    world = World(3)
    for _ in range(20):
        world.step()
    table = world.table
    rows, keys = table.live(world.now)
    vectors = table.vectors(table.lookup(keys, watermark_ms=world.now))
    assert torch.equal(vectors, table.rows(rows)["weight"].float())
    assert torch.equal(vectors.to(WIRE).float(), vectors) and not torch.equal(vectors, table.weight[rows])


def test_the_gradient_goes_straight_through_the_rounding() -> None:
    a, b = torch.randn(4, DIM, requires_grad=True), torch.randn(4, DIM, requires_grad=True)
    weight = torch.randn(4, DIM)
    (mean(served(a), served(b)) * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None and b.grad is not None
    assert torch.equal(a.grad, weight / 2) and torch.equal(b.grad, weight / 2)


def test_every_u64_is_a_legal_id() -> None:
    """P22."""
    table = IdTable(geometry(), DIM, 1)
    ids = u64(*EDGES)
    lookup = table.map(ids, np.full(len(ids), START), watermark_ms=START)
    assert np.array_equal(lookup.rows_a, lookup.rows_b) and len(set(lookup.rows_a.tolist())) == len(EDGES)
    assert sorted(table.live(START)[1].tolist()) == sorted(EDGES)


def test_shared_vectors_are_equal_for_equal_seeds_and_the_padding_row_is_zero() -> None:
    a, b, c = (IdTable(geometry(), DIM, seed) for seed in (1, 1, 2))
    same = [t.vectors(t.lookup(UNIVERSE, watermark_ms=0)) for t in (a, b, c)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    assert not a.weight[0].any() and same[0].any(1).all()


def test_each_field_has_a_life_of_its_own() -> None:
    table = IdTable(geometry(ttl=100.0, user_ttl_seconds=10.0, feature_ttl_seconds=20.0), DIM, 1)
    ids, fields = u64(5, 6, 7), np.array([ITEM, USER, FEATURE], np.uint8)
    table.map(ids, np.full(3, START), fields, watermark_ms=START)
    for after, alive in ((10_000, [5, 6, 7]), (10_001, [5, 7]), (20_001, [5]), (100_000, [5]), (100_001, [])):
        assert sorted(table.live(START + after)[1].tolist()) == alive
        assert [table.live_count(START + after, f) for f in (ITEM, USER, FEATURE)] == [k in alive for k in (5, 6, 7)]
    rows, keys = table.draw(50, USER, START, np.random.default_rng(1))
    assert keys.tolist() == [6] * 50 and rows.tolist() == [int(table.live(START, USER)[0][0])] * 50
    assert len(table.draw(50, USER, START + 10_001, np.random.default_rng(1))[0]) == 0
    assert table.share(np.concatenate([[1, 8], rows[:1]])).tolist() == [0, 0, pytest.approx(1 / 3, rel=1e-3)]


def test_what_becomes_of_ids_adds_up() -> None:
    """P3: none is dropped without a name."""
    table, now, r = IdTable(geometry(16, admit=2), DIM, 1), START, np.random.default_rng(2)
    asked = found = 0
    for _ in range(40):
        now += 20_000
        keys, times = r.choice(UNIVERSE, 12), now - r.integers(0, 150_000, 12)
        asked += len(np.unique(keys))
        found += len(np.unique(keys[np.isin(keys, table.live(now)[1])]))
        table.map(keys, times, watermark_ms=now)
    s = table.stats()
    assert s.used == s.admissions - s.evictions - s.expiries == len(table.live(now)[0])
    assert asked == found + s.admissions + s.unadmitted + s.unplaced + s.stale
    assert min(s.evictions, s.expiries, s.unadmitted, s.stale) > 0
    crowd = IdTable(geometry(16), DIM, 1)
    crowd.map(np.arange(100, dtype=np.uint64), np.full(100, START), watermark_ms=START)
    assert crowd.stats() == TableStats(16, 16, 16, 0, 0, 0, 84, 0)


# --- what a follower is told


def follow(table: IdTable, part: dict[str, Tensor]) -> None:
    table.put_rows({name: column.clone() for name, column in part.items()})


def equal(trainer: IdTable, scorer: IdTable, now: int) -> None:
    """P11, P12: every id's vector, and every byte that a snapshot would hold."""
    assert predicted(trainer, now) == predicted(scorer, now)
    rows = trainer.snapshot_rows(now)
    assert np.array_equal(rows, scorer.snapshot_rows(now))
    ours, theirs = trainer.rows(rows), scorer.rows(rows)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.sampled_from(["step", "step", "step", "grow"]), min_size=4, max_size=14))
def test_deltas_make_a_follower_equal_and_a_snapshot_starts_one(seed: int, story: list[str]) -> None:
    """P11, P12: inserts, updates, evictions and expiries by delta; growth by a snapshot into a larger one."""
    world = World(seed)
    trainer, scorer = world.table, IdTable(world.table.settings, DIM, 99)
    follow(scorer, trainer.rows(trainer.snapshot_rows(world.now)))
    mark = trainer.mark()
    for act in story:
        if act == "grow" and len(trainer.index) < 128:
            trainer.grow()
            scorer = IdTable(trainer.geometry, DIM, 7)
            follow(scorer, trainer.rows(trainer.snapshot_rows(world.now)))
            mark = trainer.mark()
        else:
            world.step()
            changed = trainer.changed_since(mark)
            mark = trainer.mark()
            follow(scorer, trainer.rows(changed))
        equal(trainer, scorer, world.now)
        late = IdTable(trainer.geometry, DIM, 55)
        follow(late, trainer.rows(trainer.snapshot_rows(world.now)))
        equal(trainer, late, world.now)


def test_all_that_changed_when_a_table_grew_can_go_over_the_wire() -> None:
    """As a delta, too: what a follower of the new size is given to hold is rows that exist."""
    world = World(1)
    for _ in range(10):
        world.step()
    mark = world.table.mark()
    world.table.grow()
    changed = world.table.changed_since(mark)
    assert changed.tolist() == list(range(1, len(world.table.weight)))
    scorer = IdTable(world.table.geometry, DIM, 7)
    follow(scorer, world.table.rows(changed))
    equal(world.table, scorer, world.now)


def test_only_what_changed_is_in_a_delta() -> None:
    table = IdTable(geometry(), DIM, 1)
    mark = table.mark()
    assert table.changed_since(mark).tolist() == []
    lookup = table.map(u64(5), at(START), watermark_ms=START)
    table.touch(at(1))
    assert table.changed_since(mark).tolist() == [1, *lookup.fresh.tolist()]
    mark = table.mark()
    assert table.changed_since(mark).tolist() == []
    table.lookup(u64(5), watermark_ms=START)
    table.map(u64(6), at(START - 200_000), watermark_ms=START)  # stale
    assert table.changed_since(mark).tolist() == []
    table.map(u64(5), at(START + 1), watermark_ms=START)  # its life is longer now
    assert table.changed_since(mark).tolist() == lookup.fresh.tolist()


def test_a_delta_undone_is_the_version_before() -> None:
    """P15: what rows held, put back, is what they served."""
    world = World(4)
    scorer, past = IdTable(world.table.settings, DIM, 9), []
    follow(scorer, world.table.rows(world.table.snapshot_rows(world.now)))
    mark = world.table.mark()
    for _ in range(12):
        world.step()
        changed, now = world.table.changed_since(mark), world.now
        mark = world.table.mark()
        past.append((scorer.rows(changed), predicted(scorer, now), now, world.table.rows(changed)))
        follow(scorer, past[-1][3])
    last = predicted(scorer, world.now)
    for undo, wanted, now, _ in reversed(past):
        follow(scorer, undo)
        assert predicted(scorer, now) == wanted
    for _, _, _, delta in past:
        follow(scorer, delta)
    assert predicted(scorer, world.now) == last
    equal(world.table, scorer, world.now)


def test_rows_that_cannot_belong_to_the_table_are_refused_and_change_nothing() -> None:
    table = IdTable(geometry(64), DIM, 1)
    lookup = table.map(u64(5, 6), at(START, START), watermark_ms=START)
    good, before = table.rows(lookup.fresh), table.state()
    white = fmix64(u64(5))
    homes = {int(first_buckets(white, 8)[0]), int(second_buckets(white, 8)[0])}
    foreign = [s for s in range(64) if s // 8 not in homes]
    one = table.rows(lookup.fresh[:1])
    for bad in (
        good | {"rows": torch.tensor([0, 5])},
        good | {"rows": torch.tensor([-1, 5])},
        good | {"rows": torch.tensor([5, len(table.weight)])},
        good | {"rows": torch.tensor([12, 12])},
        good | {"weight": torch.zeros(2, DIM - 1)},
        good | {"weight": torch.zeros(1, DIM)},
        good | {"keys": good["keys"][:1]},
        good | {"until_ms": good["until_ms"][:1]},
        good | {"field": good["field"][:1]},
        good | {"field": torch.tensor([0, FEATURE + 1], dtype=torch.uint8)},
        one | {"rows": torch.tensor([foreign[0] + table.first_slot]), "keys": torch.tensor([5])},
    ):
        with pytest.raises(DataError):
            table.put_rows(bad)
        assert all(torch.equal(before[name], value) for name, value in table.state().items())
    table.put_rows(good)
    table.put_rows(one | {"rows": torch.tensor([foreign[0] + table.first_slot]), "until_ms": torch.tensor([EMPTY])})


# --- growth, checkpoints


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_growth_changes_no_prediction(seed: int, steps: int) -> None:
    """Nobody is displaced, and each row takes its vector and its share along."""
    world = World(seed)
    for _ in range(steps):
        world.step()
    table, before = world.table, predicted(world.table, world.now)
    (rows, keys), stats, old = table.live(world.now), table.stats(), table.weight.clone()
    shares = table.share(rows)
    left, arrived = table.grow()
    assert left.tolist() == list(range(table.first_slot, table.first_slot + 32))
    assert len(table.weight) == table.first_slot + 64 and len(torch.unique(arrived)) == 32
    assert torch.equal(table.weight[arrived], old[left])
    assert torch.equal(table.weight[: table.first_slot], old[: table.first_slot])
    assert predicted(table, world.now) == before
    moved = arrived.numpy()[rows - table.first_slot]
    assert np.array_equal(table.lookup(keys, watermark_ms=world.now).rows_a, moved)
    assert np.array_equal(table.share(moved), shares)
    assert table.stats() == TableStats(64, *astuple(stats)[1:])


def test_a_crowded_table_asks_to_grow_until_it_may_not() -> None:
    table, key = IdTable(geometry(64, 32), DIM, 1), 0
    for size in (64, 128, 256):
        assert len(table.index) == size
        while table.stats().used <= 3 * size // 4:
            assert not table.crowded()
            table.map(u64(key), at(START), watermark_ms=START)
            key += 1
        assert table.crowded() == (size < 256)
        if table.crowded():
            table.grow()


@pytest.mark.parametrize("admit", [1, 2])
@pytest.mark.parametrize("grown", [False, True])
def test_a_table_goes_on_from_its_state_as_if_nothing_had_happened(admit: int, grown: bool) -> None:
    whole = World(4, admit=admit)
    for _ in range(10):
        whole.step()
    if grown:
        whole.table.grow()
    half = World(4, admit=admit)
    half.table.load_state(whole.table.state())
    half.now, half.random = whole.now, np.random.default_rng(8)
    whole.random = np.random.default_rng(8)
    mark = whole.table.mark()
    assert half.table.mark() == mark
    for _ in range(10):
        whole.step()
        half.step()
        assert np.array_equal(whole.table.changed_since(mark), half.table.changed_since(mark))
    assert same(whole.table, half.table) and whole.table.stats() == half.table.stats()
    assert whole.table.stats().evictions and whole.table.stats().expiries


def test_a_state_of_another_geometry_is_refused() -> None:
    table = IdTable(geometry(32), DIM, 1)
    for other in (
        IdTable(geometry(16), DIM, 1),
        IdTable(geometry(32), DIM + 1, 1),
        IdTable(geometry(32, admit=2), DIM, 1),
        IdTable(config.Table(slots=32, bucket_width=8, fallback_rows=16), DIM, 1),
    ):
        before = table.state()
        with pytest.raises(ConfigError, match="another geometry"):
            table.load_state(other.state())
        assert all(torch.equal(before[name], value) for name, value in table.state().items())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_the_order_of_a_batch_does_not_matter(seed: int, shuffler: random.Random) -> None:
    """P7, with the weights."""
    r = np.random.default_rng(seed)
    one, two = (IdTable(geometry(16), DIM, 1) for _ in range(2))
    for n in range(4):
        keys, now = r.choice(UNIVERSE, 25), START + 30_000 * n
        times, order = now - r.integers(0, 60_000, 25), list(range(25))
        shuffler.shuffle(order)
        a = one.map(keys, times, watermark_ms=now)
        b = two.map(keys[order], times[order], watermark_ms=now)
        assert np.array_equal(a.rows_a[order], b.rows_a) and np.array_equal(a.fresh, b.fresh)
        one.weight[a.fresh] += 1.0
        two.weight[b.fresh] += 1.0
    assert same(one, two)
