"""The kernels of `attention` on a GPU: forward, and backward in three parts, none with an atomic.

    forward    a tile of rows goes over the tiles of keys that it sees, and keeps its output in registers
    rows       the same walk for dq
    keys       a tile of keys goes over the tiles of rows that see it, for dk and dv
    biases     the walk of `rows` once more, all heads at each tile, for the gradients of both bias tables

So each number is written by one program, which adds it up in one order: same input, same bits. What `biases` computes
once more (two matrix products) is the price of that, and buys something: a bias is the same for all heads, so the heads
are summed first and a tile is spread over the buckets once, not once a head.

That spreading uses what the buckets are. Time goes on along a sequence, and buckets are octaves: a tile far from the
diagonal holds one or two of them, so each bucket between the tile's least and greatest is one masked sum. Positions
are diagonals: row i holds each at most once, at column visible[i] - p, so TILE of them are gathered side by side and
summed over the rows; the last bucket, open, is a masked sum.

A token's own pair (j == i) is in no tile: it is added row by row, where rows and keys of one tile meet. Scores,
weights and sums are float32, whatever comes in; float32 comes in to matrix products as three of TF32 each, which keep
its precision. d that is no power of two is padded with zeros in registers.

Nothing here depends on the order or the number of programs, save that each of `biases` takes every STRIDE-th item.
"""

import triton
import triton.language as tl

MILLISECONDS = tl.constexpr(1 / 64)  # attention.TIME_UNIT_MS
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _load(x, token, inside, head, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[n, WIDTH] of x[T, H, d]: the rows of n tokens, one head of them."""
    column = tl.arange(0, WIDTH)
    at = ((token * HEADS + head) * DIM)[:, None] + column[None, :]
    return tl.load(x + at, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _store(x, values, token, inside, head, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    at = ((token * HEADS + head) * DIM)[:, None] + column[None, :]
    tl.store(x + at, values.to(x.dtype.element_ty), mask=inside[:, None] & (column < DIM)[None, :])


@triton.jit
def _time_bucket(asked, stamped, times):
    """`attention.time_bucket` of their difference. Dividing by 64 rounds nothing: a fused add gives the same bits."""
    elapsed = tl.maximum(asked - stamped, 0).to(tl.float32)
    bits = (elapsed * MILLISECONDS + 1.0).to(tl.int32, bitcast=True)
    return tl.minimum((bits >> 22) - 254, times - 1)


@triton.jit
def _seen(row, column, visible, length, window, prefix):
    """Whether each row sees each column, itself apart."""
    distance = visible - column
    near = (distance <= window) | (column < prefix)
    return (distance > 0) & near & (column != row) & (column < length)


@triton.jit
def _biased(scores, seen, p, t, position, time, BIASED: tl.constexpr):
    if BIASED:
        scores += tl.load(position + p, mask=seen, other=0.0).to(tl.float32)
        scores += tl.load(time + t, mask=seen, other=0.0).to(tl.float32)
    return scores


@triton.jit
def _slope(scores):
    """The derivative of SiLU."""
    sigmoid = 1.0 / (1.0 + tl.exp(-scores))
    return sigmoid * (1.0 + scores * (1.0 - sigmoid))


@triton.jit
def _own(q, k, asked, stamped, inside, position, time, times, BIASED: tl.constexpr):
    """The score of each token with itself; q and k float32 [n, WIDTH]."""
    t = _time_bucket(asked, stamped, times)
    return _biased(tl.sum(q * k, 1), inside, t * 0, t, position, time, BIASED)


@triton.jit
def _row_work(work, item):
    """start, length, first row; then the tiles of keys: 0 to `ahead`, and `begin` to `end`."""
    at = work + item * 6
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def forward(
    q, k, v, out, position, time, visible, asked, stamped, work, positions, times, window, prefix,
    BIASED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out[i] of every token: a tile of rows of one head a program."""
    head = tl.program_id(0) % HEADS
    start, length, first, ahead, begin, end = _row_work(work, tl.program_id(0) // HEADS)
    lane = tl.arange(0, TILE)
    row = first + lane
    inside = row < length
    token = start.to(tl.int64) + row
    q_rows = _load(q, token, inside, head, HEADS, DIM, WIDTH)
    row_visible = tl.load(visible + token, mask=inside, other=0)[:, None]
    row_asked = tl.load(asked + token, mask=inside, other=0)
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(ahead + end - begin):
        column = tl.where(step < ahead, step, step - ahead + begin) * TILE + lane
        real = column < length
        key = start.to(tl.int64) + column
        k_tile = _load(k, key, real, head, HEADS, DIM, WIDTH)
        v_tile = _load(v, key, real, head, HEADS, DIM, WIDTH)
        column_stamped = tl.load(stamped + key, mask=real, other=0)[None, :]
        seen = _seen(row[:, None], column[None, :], row_visible, length, window, prefix)
        p = tl.minimum(row_visible - column[None, :], positions - 1)
        t = _time_bucket(row_asked[:, None], column_stamped, times)
        scores = tl.dot(q_rows, tl.trans(k_tile), input_precision=PRECISION)
        scores = _biased(scores, seen, p, t, position, time, BIASED)
        weights = tl.where(seen, scores / (1.0 + tl.exp(-scores)), 0.0)
        total = tl.dot(weights.to(v_tile.dtype), v_tile, total, input_precision=PRECISION)
    k_own = _load(k, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
    v_own = _load(v, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
    row_stamped = tl.load(stamped + token, mask=inside, other=0)
    own = _own(q_rows.to(tl.float32), k_own, row_asked, row_stamped, inside, position, time, times, BIASED)
    total += (own / (1.0 + tl.exp(-own)))[:, None] * v_own
    _store(out, total, token, inside, head, HEADS, DIM, WIDTH)


@triton.jit
def rows(
    q, k, v, g, dq, position, time, visible, asked, stamped, work, positions, times, window, prefix,
    BIASED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dq of every token, from g, the gradient of `out`."""
    head = tl.program_id(0) % HEADS
    start, length, first, ahead, begin, end = _row_work(work, tl.program_id(0) // HEADS)
    lane = tl.arange(0, TILE)
    row = first + lane
    inside = row < length
    token = start.to(tl.int64) + row
    q_rows = _load(q, token, inside, head, HEADS, DIM, WIDTH)
    g_rows = _load(g, token, inside, head, HEADS, DIM, WIDTH)
    row_visible = tl.load(visible + token, mask=inside, other=0)[:, None]
    row_asked = tl.load(asked + token, mask=inside, other=0)
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(ahead + end - begin):
        column = tl.where(step < ahead, step, step - ahead + begin) * TILE + lane
        real = column < length
        key = start.to(tl.int64) + column
        k_tile = _load(k, key, real, head, HEADS, DIM, WIDTH)
        v_tile = _load(v, key, real, head, HEADS, DIM, WIDTH)
        column_stamped = tl.load(stamped + key, mask=real, other=0)[None, :]
        seen = _seen(row[:, None], column[None, :], row_visible, length, window, prefix)
        p = tl.minimum(row_visible - column[None, :], positions - 1)
        t = _time_bucket(row_asked[:, None], column_stamped, times)
        scores = tl.dot(q_rows, tl.trans(k_tile), input_precision=PRECISION)
        scores = _biased(scores, seen, p, t, position, time, BIASED)
        ds = tl.dot(g_rows, tl.trans(v_tile), input_precision=PRECISION) * _slope(scores)
        ds = tl.where(seen, ds, 0.0)
        total = tl.dot(ds.to(k_tile.dtype), k_tile, total, input_precision=PRECISION)
    k_own = _load(k, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
    v_own = _load(v, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
    row_stamped = tl.load(stamped + token, mask=inside, other=0)
    own = _own(q_rows.to(tl.float32), k_own, row_asked, row_stamped, inside, position, time, times, BIASED)
    ds_own = tl.sum(g_rows.to(tl.float32) * v_own, 1) * _slope(own)
    _store(dq, total + ds_own[:, None] * k_own, token, inside, head, HEADS, DIM, WIDTH)


@triton.jit
def keys(
    q, k, v, g, dk, dv, position, time, visible, asked, stamped, work, positions, times, window, prefix,
    BIASED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dk and dv of every token: a tile of keys of one head a program. Pairs lie on their side here: [keys, rows]."""
    head = tl.program_id(0) % HEADS
    at = work + tl.program_id(0) // HEADS * 5  # start, length, first key; then the tiles of rows
    start, length, first, begin, end = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    lane = tl.arange(0, TILE)
    column = first + lane
    inside = column < length
    token = start.to(tl.int64) + column
    k_rows = _load(k, token, inside, head, HEADS, DIM, WIDTH)
    v_rows = _load(v, token, inside, head, HEADS, DIM, WIDTH)
    key_stamped = tl.load(stamped + token, mask=inside, other=0)
    dk_total = tl.zeros([TILE, WIDTH], tl.float32)
    dv_total = tl.zeros([TILE, WIDTH], tl.float32)
    for tile in range(begin, end):
        row = tile * TILE + lane
        real = row < length
        query = start.to(tl.int64) + row
        q_tile = _load(q, query, real, head, HEADS, DIM, WIDTH)
        g_tile = _load(g, query, real, head, HEADS, DIM, WIDTH)
        row_visible = tl.load(visible + query, mask=real, other=0)[None, :]
        row_asked = tl.load(asked + query, mask=real, other=0)[None, :]
        seen = _seen(row[None, :], column[:, None], row_visible, length, window, prefix)
        p = tl.minimum(row_visible - column[:, None], positions - 1)
        t = _time_bucket(row_asked, key_stamped[:, None], times)
        scores = tl.dot(k_rows, tl.trans(q_tile), input_precision=PRECISION)
        scores = _biased(scores, seen, p, t, position, time, BIASED)
        weights = tl.where(seen, scores / (1.0 + tl.exp(-scores)), 0.0)
        dv_total = tl.dot(weights.to(g_tile.dtype), g_tile, dv_total, input_precision=PRECISION)
        ds = tl.dot(v_rows, tl.trans(g_tile), input_precision=PRECISION) * _slope(scores)
        ds = tl.where(seen, ds, 0.0)
        dk_total = tl.dot(ds.to(q_tile.dtype), q_tile, dk_total, input_precision=PRECISION)
    q_own = _load(q, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
    g_own = _load(g, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
    key_asked = tl.load(asked + token, mask=inside, other=0)
    own = _own(q_own, k_rows.to(tl.float32), key_asked, key_stamped, inside, position, time, times, BIASED)
    ds_own = tl.sum(g_own * v_rows.to(tl.float32), 1) * _slope(own)
    _store(dk, dk_total + ds_own[:, None] * q_own, token, inside, head, HEADS, DIM, WIDTH)
    _store(dv, dv_total + (own / (1.0 + tl.exp(-own)))[:, None] * g_own, token, inside, head, HEADS, DIM, WIDTH)


@triton.jit
def _by_time(found, ds, t, seen, bucket):
    """found f32[BUCKETS] with each pair's ds added to its bucket of time; ds and t of any shape."""
    least = tl.min(tl.where(seen, t, 1 << 30))
    greatest = tl.max(tl.where(seen, t, -1))
    for b in range(least, greatest + 1):
        found += tl.where(bucket == b, tl.sum(tl.where(t == b, ds, 0.0)), 0.0)  # ds is 0 where nothing is seen
    return found


@triton.jit
def _by_position(found, ds, distance, seen, visible, origin, last, bucket, TILE: tl.constexpr):
    """found f32[BUCKETS] with each pair's ds added to its bucket of position; the tile's columns begin at `origin`."""
    least = tl.min(tl.where(seen, distance, 1 << 30))
    greatest = tl.minimum(tl.max(tl.where(seen, distance, -1)), last - 1)
    lane = tl.arange(0, TILE)
    for base in range(least, greatest + 1, TILE):
        column = visible - origin - (base + lane)[None, :]
        there = (column >= 0) & (column < TILE) & ((base + lane)[None, :] < last)
        diagonals = tl.gather(ds, tl.minimum(tl.maximum(column, 0), TILE - 1), 1)
        sums = tl.sum(tl.where(there, diagonals, 0.0), 0)
        place = bucket - base
        held = tl.gather(sums, tl.minimum(tl.maximum(place, 0), TILE - 1), 0)
        found += tl.where((place >= 0) & (place < TILE), held, 0.0)
    return found + tl.where(bucket == last, tl.sum(tl.where(distance >= last, ds, 0.0)), 0.0)


@triton.jit(do_not_specialize=["items"])
def biases(
    q, k, v, g, position_parts, time_parts, position, time, visible, asked, stamped, work, items,
    positions, times, window, prefix,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    POSITIONS: tl.constexpr, TIMES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """position_parts f32[STRIDE, positions], time_parts f32[STRIDE, times]: what each program has found."""
    position_bucket, time_bucket = tl.arange(0, POSITIONS), tl.arange(0, TIMES)
    by_position, by_time = tl.zeros([POSITIONS], tl.float32), tl.zeros([TIMES], tl.float32)
    lane = tl.arange(0, TILE)
    for item in range(tl.program_id(0), items, STRIDE):
        start, length, first, ahead, begin, end = _row_work(work, item)
        row = first + lane
        inside = row < length
        token = start.to(tl.int64) + row
        row_visible = tl.load(visible + token, mask=inside, other=0)[:, None]
        row_asked = tl.load(asked + token, mask=inside, other=0)
        for step in range(ahead + end - begin):
            origin = tl.where(step < ahead, step, step - ahead + begin) * TILE
            column = origin + lane
            real = column < length
            key = start.to(tl.int64) + column
            column_stamped = tl.load(stamped + key, mask=real, other=0)[None, :]
            seen = _seen(row[:, None], column[None, :], row_visible, length, window, prefix)
            distance = row_visible - column[None, :]
            p = tl.minimum(distance, positions - 1)
            t = _time_bucket(row_asked[:, None], column_stamped, times)
            bias = _biased(tl.zeros([TILE, TILE], tl.float32), seen, p, t, position, time, True)
            ds = tl.zeros([TILE, TILE], tl.float32)
            for head in range(HEADS):
                q_rows = _load(q, token, inside, head, HEADS, DIM, WIDTH)
                k_tile = _load(k, key, real, head, HEADS, DIM, WIDTH)
                scores = tl.dot(q_rows, tl.trans(k_tile), bias, input_precision=PRECISION)
                g_rows = _load(g, token, inside, head, HEADS, DIM, WIDTH)
                v_tile = _load(v, key, real, head, HEADS, DIM, WIDTH)
                ds += tl.dot(g_rows, tl.trans(v_tile), input_precision=PRECISION) * _slope(scores)
            ds = tl.where(seen, ds, 0.0)
            by_time = _by_time(by_time, ds, t, seen, time_bucket)
            by_position = _by_position(
                by_position, ds, distance, seen, row_visible, origin, positions - 1, position_bucket, TILE
            )
        own_ds = tl.zeros([TILE], tl.float32)
        row_stamped = tl.load(stamped + token, mask=inside, other=0)
        for head in range(HEADS):
            q_own = _load(q, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
            k_own = _load(k, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
            own = _own(q_own, k_own, row_asked, row_stamped, inside, position, time, times, True)
            g_own = _load(g, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
            v_own = _load(v, token, inside, head, HEADS, DIM, WIDTH).to(tl.float32)
            own_ds += tl.sum(g_own * v_own, 1) * _slope(own)
        by_time = _by_time(by_time, own_ds, _time_bucket(row_asked, row_stamped, times), inside, time_bucket)
        by_position += tl.where(position_bucket == 0, tl.sum(own_ds), 0.0)
    program = tl.program_id(0).to(tl.int64)
    tl.store(position_parts + program * positions + position_bucket, by_position, mask=position_bucket < positions)
    tl.store(time_parts + program * times + time_bucket, by_time, mask=time_bucket < times)
