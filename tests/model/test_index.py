"""The index against its oracle, and what follows from its rules (P1-P7, P20-P22 of the design note)."""

import random
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamgr.model import decay
from streamgr.model.admission import Sketch
from streamgr.model.hashing import fallback_rows, first_buckets, fmix64, second_buckets, tags
from streamgr.model.index import COLUMNS, EMPTY, Index
from tests.model import table_oracle
from tests.model.table_oracle import Oracle

START = 1_700_000_000_000
LIVES = [60_000, 20_000, 200_000]
HALF_LIVES = [1_000, 15_000, 3_600_000, 1 << 42]
EDGES = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2, 0x9E3779B97F4A7C15]
UNIVERSE = [*EDGES, *range(2, 200)]

Token = tuple[int, int, int]  # key, how long ago, field


def u64(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def i64(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def build(slots: int, width: int, *, half_life: int = 15_000, admit_min: int = 1, pin_depth: int = 0) -> Index:
    sketch = Sketch(slots) if admit_min > 1 else None
    return Index(
        slots, width, lives_ms=LIVES, half_life_ms=half_life, sketch=sketch, admit_min=admit_min, pin_depth=pin_depth
    )


def columns(batch: list[Token], now: int) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint8]]:
    keys, times, fields = ([token[i] for token in batch] for i in range(3))
    return u64(*keys), now - i64(*times), np.array(fields, np.uint8)


def same(one: Index, two: Index) -> bool:
    a, b = one.state(), two.state()
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def agree(index: Index, oracle: Oracle, now: int) -> None:
    """Every key, every slot and every count."""
    where = index.find(u64(*UNIVERSE), now).tolist()
    assert where == [oracle.find(key, now) for key in UNIVERSE]
    assert (len(index), index.total, index.batch) == (oracle.slots, oracle.total or decay.NEVER, oracle.batches)
    assert asdict(index.tally) == {name: getattr(oracle, name) for name in asdict(index.tally)}
    held = np.flatnonzero(index.until_ms != EMPTY).tolist()
    assert held == sorted(oracle.held)
    for slot in held:
        found = (int(index.keys[slot]), int(index.until_ms[slot]), int(index.score[slot]), int(index.field[slot]))
        assert (*found, int(index.pin[slot])) == tuple(asdict(oracle.held[slot]).values())
    for field in range(3):
        assert index.live(now, field).tolist() == [
            s for s in held if oracle.live(s, now) and oracle.held[s].field == field
        ]


def hold(index: Index, now: int) -> None:
    """P1, P3, independently of the oracle."""
    live = index.live(now)
    keys = index.keys[live]
    assert len(np.unique(keys)) == len(keys)
    first, second = index.homes(keys)
    assert np.all((live // index.width == first) | (live // index.width == second))
    assert index.tally.admissions - index.tally.evictions >= len(live)
    assert np.array_equal(index.find(keys, now), live)


tokens = st.tuples(st.sampled_from(UNIVERSE), st.integers(0, 70_000), st.integers(0, 2))
steps = st.one_of(
    st.none(),  # growth
    st.tuples(st.lists(tokens, max_size=50), st.sampled_from([0, 100, 5_000, 30_000])),
    st.tuples(st.lists(tokens, min_size=20, max_size=60), st.sampled_from([0, 100])),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(steps, min_size=1, max_size=8),
    st.sampled_from([(8, 8), (16, 8), (64, 8), (16, 16), (32, 16), (32, 32), (64, 32)]),
    st.sampled_from(HALF_LIVES),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_the_index_is_its_rules(
    steps: list[tuple[list[Token], int] | None], shape: tuple[int, int], half_life: int, pin_depth: int, admit: int
) -> None:
    """P1-P6, P22: many keys in few slots, three fields with lives of their own, growth in between."""
    index = build(*shape, half_life=half_life, pin_depth=pin_depth, admit_min=admit)
    sketch = Sketch(shape[0]) if admit > 1 else None
    oracle, now = Oracle(*shape, LIVES, half_life, admit, pin_depth, sketch), START
    for step in steps:
        if step is None:
            if len(index) < 256:
                index.grow()
                oracle.grow()
        else:
            batch, jump = step
            now += jump
            before = index.keys.copy(), index.until_ms.copy(), index.pin.copy()
            mapped = index.map(*columns(batch, now), watermark_ms=now)
            wanted = oracle.map([(key, now - ago, field) for key, ago, field in batch], now)
            assert mapped.slots.tolist() == [wanted[key] for key, _, _ in batch]
            placed = mapped.slots[mapped.slots >= 0]
            assert np.array_equal(index.keys[placed], columns(batch, now)[0][mapped.slots >= 0])  # P2
            assert np.array_equal(index.keys[mapped.fresh], mapped.fresh_keys)
            hands = (before[0] != index.keys) | (before[1] == EMPTY) & (index.until_ms != EMPTY)
            assert set(np.flatnonzero(hands)) <= set(mapped.fresh.tolist())
            assert np.all(before[2][mapped.fresh] < index.batch - pin_depth)  # P4
        hold(index, now)
        agree(index, oracle, now)
    assert index.find(u64(*UNIVERSE), now + max(LIVES) + 70_001).tolist() == [-1] * len(UNIVERSE)  # P6


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("half_life", HALF_LIVES)
def test_the_index_is_its_rules_under_a_long_and_heavy_stream(width: int, half_life: int) -> None:
    """As above with hundreds of keys a batch, most of them old acquaintances; evictions, expiries and growth happen."""
    r = np.random.default_rng(width)
    index = build(4 * width, width, half_life=half_life, pin_depth=1)
    oracle, now = Oracle(4 * width, width, LIVES, half_life, 1, 1), START
    for step in range(24):
        now += int(r.integers(0, 9_000))
        keys = (r.zipf(1.2, 3 * width) % len(UNIVERSE)).tolist()
        batch = [(UNIVERSE[k], int(r.integers(0, 25_000)), k % 3) for k in keys]
        mapped = index.map(*columns(batch, now), watermark_ms=now - 2_000)
        wanted = oracle.map([(key, now - ago, field) for key, ago, field in batch], now - 2_000)
        assert mapped.slots.tolist() == [wanted[key] for key, _, _ in batch]
        agree(index, oracle, now - 2_000)
        if step == 16:
            index.grow()
            oracle.grow()
    assert oracle.evictions and oracle.stale and oracle.admissions - oracle.evictions > len(index.live(now - 2_000))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(tokens, max_size=50), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    st.integers(1, 3),
    st.integers(0, 1),
)
def test_the_order_of_a_batch_does_not_matter(
    batches: list[list[Token]], shuffler: random.Random, admit: int, pin_depth: int
) -> None:
    """P7, all else included: admission, eviction, keys that come with several fields."""
    one, two = (build(16, 8, admit_min=admit, pin_depth=pin_depth) for _ in range(2))
    for n, batch in enumerate(batches):
        now = START + 8_000 * n
        shuffled = list(range(len(batch)))
        shuffler.shuffle(shuffled)
        a = one.map(*columns(batch, now), watermark_ms=now)
        b = two.map(*columns([batch[i] for i in shuffled], now), watermark_ms=now)
        assert a.slots[shuffled].tolist() == b.slots.tolist()
        assert np.array_equal(a.fresh, b.fresh) and np.array_equal(a.fresh_keys, b.fresh_keys)
        assert same(one, two)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(UNIVERSE), st.integers(1, 9)), max_size=50), st.integers(1, 3))
def test_where_the_repeats_of_an_id_stand_does_not_matter(counts: list[tuple[int, int]], admit: int) -> None:
    """P7: a key n times in a row is a key n times in between others; what counts is how often and how late."""
    together = [(key, ago, 0) for key, count in counts for ago in range(count)]
    apart = [(key, ago, 0) for ago in reversed(range(9)) for key, count in counts if ago < count]
    one, two = (build(16, 8, admit_min=admit) for _ in range(2))
    for index, batch in ((one, together), (two, apart)):
        index.map(u64(*range(20, 30)), np.full(10, START - 9_000), 0, watermark_ms=START)
        index.map(*columns(batch, START), watermark_ms=START)
    assert same(one, two)


def test_an_expired_id_is_a_miss_at_once_and_an_old_event_does_not_bring_it_back() -> None:
    """P6."""
    index = build(16, 8)
    slot = int(index.map(u64(7), i64(START), 0, watermark_ms=START).slots[0])
    last = START + LIVES[0]
    assert index.find(u64(7), last).tolist() == index.live(last).tolist() == [slot]
    assert index.find(u64(7), last + 1).tolist() == [-1] and not len(index.live(last + 1))
    for watermark in (last + 1, START):  # there is no way back for the watermark
        assert index.map(u64(7), i64(START), 0, watermark_ms=watermark).slots.tolist() == [-1]
    assert index.tally.stale == 2
    assert len(index.map(u64(7), i64(START + 1), 0, watermark_ms=START).fresh) == 1
    assert (index.tally.admissions, index.tally.evictions) == (2, 0)


def test_what_expires_while_it_is_pinned_is_a_miss_and_returns_to_another_slot() -> None:
    index = build(8, 8, pin_depth=1)
    (slot,) = index.map(u64(7), i64(START), 1, watermark_ms=START).slots
    later = START + LIVES[1] + 1
    (again,) = index.map(u64(7), i64(later), 1, watermark_ms=later).slots
    assert again != slot
    assert index.find(u64(7), later).tolist() == [again] and index.live(later).tolist() == [again]
    assert index.find(u64(7), START).tolist() in ([slot], [again])
    index.grow()
    assert len(index.live(later)) == 1 and index.find(u64(7), later).tolist() == index.live(later).tolist()


def test_a_batch_that_needs_more_than_there_is_never_takes_what_is_pinned() -> None:
    """P4: three batches on their way; only the fourth may take the first one's slots."""
    index = build(8, 8, pin_depth=2)
    for batch in range(4):
        slots = index.map(u64(*range(4 * batch, 4 * batch + 4)), i64(*[START] * 4), 0, watermark_ms=START).slots
        assert np.count_nonzero(slots >= 0) == (4, 4, 0, 4)[batch]
    assert (index.tally.evictions, index.tally.unplaced, len(index.live(START))) == (4, 4, 8)


def test_before_any_watermark_there_is_room() -> None:
    """The lowest of all watermarks finds free slots and evicts nobody."""
    index = build(16, 8)
    index.map(u64(5, 6), i64(0, -5), 0, watermark_ms=EMPTY)
    assert len(index.live(EMPTY)) == 2 and index.tally.evictions == 0


def test_the_ends_of_time_are_only_clipped() -> None:
    index = build(8, 8, half_life=1_000)
    index.map(u64(1, 2), i64(2**63 - 1, -(2**62)), 0, watermark_ms=-(2**63) + 5)
    assert (index.find(u64(1, 2), 2**63 - 1) >= 0).tolist() == [True, False]
    index.map(u64(1), i64(2**63 - 1), 0, watermark_ms=0)
    assert 0 < index.score.max() < index.total < 2**62


def test_hot_keys_outlive_cold_ones_with_a_long_half_life_and_recent_ones_with_a_short_one() -> None:
    """P5, end to end: from LFU to LRU by one knob."""
    for half_life, survivor in ((1 << 42, 1), (1_000, 2)):
        index = build(8, 8, half_life=half_life)
        index.map(np.full(50, 1, np.uint64), np.full(50, START), 0, watermark_ms=START)
        index.map(np.repeat(u64(*range(3, 9)), 99), np.full(594, START + 30_000), 0, watermark_ms=START)
        index.map(u64(2), i64(START + 20_000), 0, watermark_ms=START)
        index.map(u64(9), i64(START + 31_000), 0, watermark_ms=START)
        assert set(index.keys[index.live(START)].tolist()) & {1, 2} == {survivor}


# --- what it draws, and how often things come


@pytest.mark.parametrize(("slots", "held"), [(64, 50), (4096, 30)])  # by rejection alone; from the list as well
def test_draws_are_live_keys_of_the_field_and_even(slots: int, held: int) -> None:
    index = build(slots, 8)
    keys = np.arange(3 * held, dtype=np.uint64)
    index.map(keys, np.full(3 * held, START), (keys % 2).astype(np.uint8), watermark_ms=START)
    index.map(keys[: held // 2], np.full(held // 2, START + 30_000), 0, watermark_ms=START)
    for field, watermark in ((0, START), (0, START + 61_000), (1, START), (1, START + 50_001), (2, START)):
        live = index.live(watermark, field)
        drawn = index.draw(20_000, field, watermark, np.random.default_rng(5))
        assert np.array_equal(drawn, index.draw(20_000, field, watermark, np.random.default_rng(5)))
        if not len(live):
            assert not len(drawn)
            continue
        assert len(drawn) == 20_000 and set(drawn.tolist()) <= set(live.tolist())
        counts, expected = np.bincount(drawn, minlength=slots)[live], 20_000 / len(live)
        chi2, freedom = ((counts - expected) ** 2 / expected).sum(), len(live) - 1
        assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)
    assert len(index.live(START + 50_001, 1)) == 0 < len(index.live(START + 61_000, 0)) < len(index.live(START, 0))


@pytest.mark.parametrize("half_life", [1_000, 60_000, 3_600_000, 1 << 42])
def test_a_share_is_the_decayed_share_of_all_tokens(half_life: int) -> None:
    """P20: against the sums themselves."""
    index = Index(64, 16, lives_ms=[1 << 50], half_life_ms=half_life)
    r = np.random.default_rng(1)
    counts, every, then = np.zeros(40), 0.0, START
    for _ in range(400):
        now = then + int(r.integers(0, 3 * min(half_life, 1 << 34) // 20))
        keys = r.zipf(1.3, 50) % 40
        index.map(keys.astype(np.uint64), np.full(50, now), 0, watermark_ms=now)
        fade = 0.5 ** ((now - then) / half_life)
        counts, every, then = counts * fade + np.bincount(keys, minlength=40), every * fade + 50, now
    seen = np.flatnonzero(counts > 1e-3)
    slots = index.find(seen.astype(np.uint64), then)
    np.testing.assert_allclose(index.share(slots), (counts / every)[seen], rtol=1e-3)
    assert np.all(index.share(np.setdiff1d(np.arange(64), index.live(then))) == 0)


def test_shares_follow_a_distribution_that_flips() -> None:
    """P21: within a few half lives the estimate has left the old distribution and found the new one."""
    index = Index(1024, 32, lives_ms=[1 << 50], half_life_ms=60_000)
    r = np.random.default_rng(3)
    p = 1 / np.arange(1, 201) ** 1.1
    p /= p.sum()
    error = []
    for truth in (p, p[::-1]):
        for step in range(480):  # 8 half lives
            now = START + 1_000 * (step + 480 * (truth is not p))
            index.map(r.choice(200, 500, p=truth).astype(np.uint64), np.full(500, now), 0, watermark_ms=now)
            if step in (0, 60, 479):
                share = index.share(index.find(np.arange(200, dtype=np.uint64), now))
                error.append(np.abs(share - truth).sum() / 2)
    stationary, flipped, a_half_life_later, converged = error[2], *error[3:]
    assert stationary < 0.05 and converged < 0.05  # total variation; 43 000 tokens count
    assert flipped > 0.5 and a_half_life_later == pytest.approx(flipped / 2, rel=0.1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3_600_000), st.integers(1, 500)), min_size=1, max_size=60),
    st.sampled_from(HALF_LIVES),
)
def test_a_score_is_the_log_of_the_decayed_count(events: list[tuple[int, int]], half_life: int) -> None:
    """P20: in any order of the events, within 2^-12 and the roundings."""
    score = decay.NEVER
    for ago, count in events:
        seen = decay.at(i64(START - ago), half_life) + decay.times(i64(count))
        both, swapped = decay.add(i64(score), seen), decay.add(seen, i64(score))
        assert both == swapped
        assert both[0] == (table_oracle.add(score, int(seen[0])) if score > decay.NEVER else seen[0])
        score = int(both[0])
    count = sum(n * 0.5 ** (ago / half_life) for ago, n in events)
    score -= int(decay.at(i64(START), half_life)[0])
    if count > 1e-100:
        assert score / 2**20 == pytest.approx(np.log2(count), abs=2**-12 + len(events) * 2**-19)


# --- growth, state, hashes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(tokens, max_size=60), min_size=1, max_size=4), st.sampled_from([(8, 8), (32, 8), (32, 16)]))
def test_growth_displaces_nobody(batches: list[list[Token]], shape: tuple[int, int]) -> None:
    index = build(*shape)
    for n, batch in enumerate(batches):
        now = START + 10_000 * n
        index.map(*columns(batch, now), watermark_ms=now)
    live, old = index.live(now), {name: getattr(index, name).copy() for name in COLUMNS}
    keys, shares, tally = index.keys[live], index.share(live), asdict(index.tally)
    moved = index.grow()
    assert len(moved) == shape[0] and len(index) == 2 * shape[0] and len(np.unique(moved)) == len(moved)
    assert np.array_equal(index.find(keys, now), moved[live])
    assert np.array_equal(index.live(now), np.sort(moved[live]))
    assert np.array_equal(index.share(moved[live]), shares) and asdict(index.tally) == tally
    for name in COLUMNS:
        assert np.array_equal(getattr(index, name)[moved], old[name])
    assert np.all(index.until_ms[np.setdiff1d(np.arange(len(index)), moved)] == EMPTY)
    hold(index, now)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(tokens, max_size=40), min_size=2, max_size=6), st.integers(1, 2), st.booleans())
def test_an_index_goes_on_from_its_state(batches: list[list[Token]], admit: int, grown: bool) -> None:
    whole = build(16, 8, admit_min=admit, pin_depth=1)
    half = build(16, 8, admit_min=admit, pin_depth=1)
    for n, batch in enumerate(batches):
        now = START + 9_000 * n
        mapped = whole.map(*columns(batch, now), watermark_ms=now)
        if n == len(batches) // 2:
            if grown:
                whole.grow()
            half.load_state(whole.state())
        elif n > len(batches) // 2:
            assert np.array_equal(half.map(*columns(batch, now), watermark_ms=now).slots, mapped.slots)
    assert same(whole, half)


def test_the_hashes_are_those_of_the_design_and_grow_by_a_bit() -> None:
    assert int(fmix64(u64(1))[0]) == 0xB456BCFC34C2CB2C  # the published finaliser
    keys = np.concatenate([np.arange(50_000, dtype=np.uint64), u64(*EDGES)])
    white = fmix64(keys)
    assert len(np.unique(white)) == len(np.unique(keys))
    assert [int(w) for w in white[:200]] == [table_oracle.fmix64(k) for k in range(200)]
    assert tags(white).min() >= 1 and tags(white).max() <= 255
    for count in (2, 256, 1 << 20):
        first, second = first_buckets(white, count), second_buckets(white, count)
        assert np.all(first != second) and max(first.max(), second.max()) < count
        assert np.array_equal(first, first_buckets(white, 2 * count) % count)
        assert np.array_equal(second, second_buckets(white, 2 * count) % count)
    spread = np.bincount(first_buckets(white, 256), minlength=256) + np.bincount(second_buckets(white, 256))
    assert spread.max() < 520  # 391 on average, twice a binomial's 14 apart
    a, b = fallback_rows(keys, 64)
    assert a.min() == 1 and a.max() == 32 and b.min() == 33 and b.max() == 64
