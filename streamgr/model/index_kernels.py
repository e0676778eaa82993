"""The kernels of the ID table's index on a GPU: `hashing`, `decay`, lookup and placing, in the words of `index`.

Uint64 arithmetic, no atomics, nothing from the GPU's maths library (logarithms come as tables). A kernel either reads
the columns or writes slots that no other lane writes, so neither the order nor the number of its programs shows.

A group of eight slots is one [BLOCK, 8] tile, and a bucket a loop over its groups. The eight tags are read as one word,
which a row of the tile takes apart: that is 8 bytes a bucket of 8 where the keys themselves were 64, and the tags of
8 M slots stay in the L2 of an H100. Only where a tag agrees does a lane read a key, and only where the key agrees its
life: a lookup costs about three sectors of 32 bytes however wide the bucket. The second bucket is read by those that
missed in the first.

Every scalar is passed as i64 and none is specialised, so each kernel is compiled once a bucket width.
"""

import triton
import triton.language as tl

from streamgr.model import decay, hashing, index

LANES = tl.constexpr(index.GROUP)
EMPTY = tl.constexpr(index.EMPTY)
FOREVER = tl.constexpr(index.FOREVER)
SIGN = tl.constexpr(-(1 << 63))
SECOND = tl.constexpr(int(hashing.SECOND))
ONES = tl.constexpr(0x0101010101010101)
FRACTION = tl.constexpr(decay.FRACTION)
STEP = tl.constexpr(decay.STEP)
LATEST_MS = tl.constexpr(decay.LATEST_MS)
FARTHEST = tl.constexpr(len(decay.SOFTPLUS) - 1)

# What `touch` finds of a key, at the last event of its run: it had a slot, wants one, is too old, has no such field.
HIT, WANTED, STALE, UNKNOWN = (tl.constexpr(fate) for fate in range(1, 5))


# --- hashing


@triton.jit
def _fmix64(h):
    h ^= h >> 33
    h *= 0xFF51AFD7ED558CCD
    h ^= h >> 33
    h *= 0xC4CEB9FE1A85EC53
    return h ^ (h >> 33)


@triton.jit
def _white(key):
    return _fmix64(key.to(tl.uint64, bitcast=True))


@triton.jit
def _tag(white):
    return tl.maximum(white >> 56, 1)


@triton.jit
def _first(white, buckets):
    return ((white >> 32) & (buckets - 1).to(tl.uint64)).to(tl.int64)


@triton.jit
def _second(white, buckets):
    apart = (_fmix64(white ^ SECOND) >> 32) | 1
    return (((white >> 32) ^ apart) & (buckets - 1).to(tl.uint64)).to(tl.int64)


# --- decay


@triton.jit
def _seen(newest, count, half_life_ms, counts, mask):
    """The score of `count` events of which the newest is so old."""
    time = tl.minimum(tl.maximum(newest, 0), LATEST_MS)
    whole = time // half_life_ms
    part = ((time - whole * half_life_ms) << FRACTION) // half_life_ms
    return (whole << FRACTION) + part + tl.load(counts + count, mask=mask, other=0)


@triton.jit
def _add(old, seen, softplus, mask):
    gap = tl.minimum(tl.abs(old - seen) >> STEP, FARTHEST)
    return tl.maximum(old, seen) + tl.load(softplus + gap, mask=mask, other=0)


@triton.jit
def _after(time, life):
    return tl.minimum(time, -life + FOREVER) + life  # the tensor first: the interpreter knows no constexpr before one


# --- lookup


@triton.jit
def _search(key, pattern, bucket, wanted, words, keys, until_ms, oldest, GROUPS: tl.constexpr):
    """The slot of each key in one bucket, -1 without. No byte of a pattern is 0, so a word of zeros never agrees."""
    lane = tl.arange(0, LANES)
    slot = tl.full(bucket.shape, -1, tl.int64)
    for group in tl.static_range(GROUPS):
        at = bucket * GROUPS + group
        word = tl.load(words + at, mask=wanted, other=0).to(tl.uint64, bitcast=True) ^ pattern
        agree = ((word[:, None] >> (lane * 8)[None, :]) & 0xFF) == 0
        slots = (at * LANES)[:, None] + lane[None, :]
        agree &= tl.load(keys + slots, mask=agree, other=0) == key[:, None]
        agree &= tl.load(until_ms + slots, mask=agree, other=EMPTY) >= oldest
        first = tl.min(tl.where(agree, lane[None, :], LANES), axis=1)
        slot = tl.where(first < LANES, at * LANES + first, slot)
    return slot


@triton.jit
def _find(key, wanted, words, keys, until_ms, buckets, oldest, GROUPS: tl.constexpr):
    white = _white(key)
    pattern = _tag(white) * ONES
    slot = _search(key, pattern, _first(white, buckets), wanted, words, keys, until_ms, oldest, GROUPS)
    missed = wanted & (slot < 0)
    other = _search(key, pattern, _second(white, buckets), missed, words, keys, until_ms, oldest, GROUPS)
    return tl.where(missed, other, slot)


@triton.jit(do_not_specialize=["n", "buckets", "oldest"])
def find(
    wanted, slots, words, keys, until_ms, n: tl.int64, buckets: tl.int64, oldest: tl.int64,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """slots[i] = the slot of wanted[i], or -1."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(wanted + i, mask=i < n, other=0)
    tl.store(slots + i, _find(key, i < n, words, keys, until_ms, buckets, oldest, GROUPS), mask=i < n)


@triton.jit(do_not_specialize=["n"])
def whiten(keys, white, n: tl.int64, BLOCK: tl.constexpr):
    """white[i] = fmix64(keys[i])."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + i, mask=i < n, other=0)
    tl.store(white + i, _white(key).to(tl.int64, bitcast=True), mask=i < n)


@triton.jit(do_not_specialize=["n", "buckets", "watermark", "batch", "half_life_ms"])
def touch(
    ordered, order, starts, times, fields, held, fates,
    words, keys, until_ms, score, field, pin, lives, softplus, counts,
    n: tl.int64, buckets: tl.int64, watermark: tl.int64, batch: tl.int64, half_life_ms: tl.int64,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Look each key of a batch up once, and touch its slot.

    The batch comes sorted by key, then time: ordered[p] is the key (sign bit flipped) of event order[p], and its run
    begins at starts[p]. The last event of a run, its newest, speaks for it: fates[p] says what became of the key (0
    for the other events), held[starts[p]] its slot.
    """
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = p < n
    flipped = tl.load(ordered + p, mask=inside, other=0)
    following = tl.load(ordered + p + 1, mask=p + 1 < n, other=0)
    speaks = inside & ((p + 1 == n) | (flipped != following))
    event = tl.load(order + p, mask=speaks, other=0)
    start = tl.load(starts + p, mask=speaks, other=0)
    newest = tl.load(times + event, mask=speaks, other=0)
    kind = tl.load(fields + event, mask=speaks, other=0)

    slot = _find(flipped ^ SIGN, speaks, words, keys, until_ms, buckets, tl.maximum(watermark, EMPTY + 1), GROUPS)
    hit = speaks & (slot >= 0)
    life = tl.load(lives + tl.load(field + slot, mask=hit, other=0), mask=hit, other=0)
    until = tl.maximum(tl.load(until_ms + slot, mask=hit, other=0), _after(newest, life))
    tl.store(until_ms + slot, until, mask=hit)
    seen = _seen(newest, p - start + 1, half_life_ms, counts, hit)
    old = tl.load(score + slot, mask=hit, other=0)
    tl.store(score + slot, _add(old, seen, softplus, hit), mask=hit)
    tl.store(pin + slot, (batch + tl.zeros_like(slot)).to(tl.int32), mask=hit)

    life = tl.load(lives + kind, mask=speaks, other=0)
    fate = tl.where(_after(newest, tl.maximum(life, 0)) >= watermark, WANTED, STALE)
    fate = tl.where(slot >= 0, HIT, tl.where(life >= 0, fate, UNKNOWN))
    tl.store(fates + p, tl.where(speaks, fate, 0).to(tl.uint8), mask=inside)
    tl.store(held + start, slot, mask=speaks)


# --- placing


@triton.jit
def _room(bucket, until_ms, score, pin, watermark, pinned_from, GROUPS: tl.constexpr):
    """Of a bucket: its free slots as bits, how many, its lowest unpinned score (FOREVER without), whose bit that is."""
    lane = tl.arange(0, LANES)
    free_bits = tl.zeros(bucket.shape, tl.int64)
    room = tl.zeros(bucket.shape, tl.int32)
    lowest = tl.full(bucket.shape, FOREVER, tl.int64)
    lowest_bit = tl.zeros(bucket.shape, tl.int64)
    one = tl.full(bucket.shape, 1, tl.int64)
    for group in tl.static_range(GROUPS):
        slots = ((bucket * GROUPS + group) * LANES)[:, None] + lane[None, :]
        pinned = tl.load(pin + slots) >= pinned_from
        free = (tl.load(until_ms + slots) < watermark) & ~pinned
        cost = tl.where(pinned, FOREVER, tl.load(score + slots))
        bits = one[:, None] << (lane + group * LANES)[None, :]
        free_bits += tl.sum(tl.where(free, bits, 0), axis=1)
        room += tl.sum(free.to(tl.int32), axis=1)
        low = tl.min(cost, axis=1)
        where = tl.min(tl.where(cost == low[:, None], lane[None, :], LANES), axis=1)
        lowest_bit = tl.where(low < lowest, one << (where + group * LANES), lowest_bit)
        lowest = tl.minimum(lowest, low)
    return free_bits, room, lowest, lowest_bit


@triton.jit(do_not_specialize=["n", "buckets", "watermark", "pinned_from"])
def turn(
    waiting, new, bucket, choices,
    until_ms, score, pin,
    n: tl.int64, buckets: tl.int64, watermark: tl.int64, pinned_from: tl.int64,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """To which bucket each waiting key turns, and which slots there are to be had, as bits.

    These are the free ones, or the one of the lowest score; none where both buckets are pinned, then bucket[i] is
    `buckets`.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(new + tl.load(waiting + i, mask=i < n, other=0))
    white = _white(key)
    first, second = _first(white, buckets), _second(white, buckets)
    free_1, room_1, low_1, bit_1 = _room(first, until_ms, score, pin, watermark, pinned_from, GROUPS)
    free_2, room_2, low_2, bit_2 = _room(second, until_ms, score, pin, watermark, pinned_from, GROUPS)
    some = (room_1 > 0) | (room_2 > 0)
    turns = tl.where(some, room_2 > room_1, low_2 < low_1)
    bits = tl.where(some, tl.where(turns, free_2, free_1), tl.where(turns, bit_2, bit_1))
    home = tl.where(bits != 0, tl.where(turns, second, first), buckets)
    tl.store(bucket + i, home.to(tl.int32), mask=i < n)
    tl.store(choices + i, bits, mask=i < n)


@triton.jit(do_not_specialize=["n", "watermark", "batch", "half_life_ms"])
def claim(
    waiting, turns, bucket, starts, choices, left, new, newest, count, kind, taken, evicted,
    tag, keys, until_ms, score, field, pin, lives, counts,
    n: tl.int64, watermark: tl.int64, batch: tl.int64, half_life_ms: tl.int64,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Who turned to a bucket as its r-th key takes the r-th of the slots to be had there; left[turn] = 1: again.

    Sorted by bucket, then key: bucket[i] is that of turns[i], its first key is at starts[i].
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = tl.load(turns + i, mask=inside, other=0)
    who = tl.load(waiting + at, mask=inside, other=0)
    bits = tl.load(choices + at, mask=inside, other=0)
    rank = i - tl.load(starts + i, mask=inside, other=0)

    lane = tl.arange(0, LANES)
    column = tl.full(i.shape, -1, tl.int32)
    passed = tl.zeros(i.shape, tl.int64)
    for group in tl.static_range(GROUPS):
        columns = lane + group * LANES
        bit = (bits[:, None] >> columns[None, :]) & 1
        nth = passed[:, None] + tl.cumsum(bit, axis=1)
        mine = (bit == 1) & (nth == rank[:, None] + 1)
        column = tl.maximum(column, tl.max(tl.where(mine, columns[None, :], -1), axis=1))
        passed += tl.sum(bit, axis=1)
    wins = inside & (column >= 0)
    tl.store(left + at, ((bits != 0) & ~wins).to(tl.uint8), mask=inside)

    slot = tl.load(bucket + i, mask=inside, other=0).to(tl.int64) * (GROUPS * LANES) + column
    tl.store(taken + who, slot, mask=wins)
    tl.store(evicted + who, (tl.load(until_ms + slot, mask=wins, other=0) >= watermark).to(tl.uint8), mask=wins)
    key = tl.load(new + who, mask=wins, other=0)
    time = tl.load(newest + who, mask=wins, other=0)
    kinds = tl.load(kind + who, mask=wins, other=0)
    seen = _seen(time, tl.load(count + who, mask=wins, other=0), half_life_ms, counts, wins)
    tl.store(keys + slot, key, mask=wins)
    tl.store(tag + slot, _tag(_white(key)).to(tl.uint8), mask=wins)
    tl.store(until_ms + slot, _after(time, tl.load(lives + kinds, mask=wins, other=0)), mask=wins)
    tl.store(score + slot, seen, mask=wins)
    tl.store(field + slot, kinds, mask=wins)
    tl.store(pin + slot, (batch + tl.zeros_like(slot)).to(tl.int32), mask=wins)
