"""The digest of a table's state: nothing changes without it, and nothing but the state decides it."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgr import config
from streamgr.model.table import IdTable
from streamgr.weights.digest import BLOCK, StateDigest, row_hashes
from tests.model.table_oracle import MASK, fmix64

START = 1_700_000_000_000
ROWS = 40


def part(rows: list[int], dim: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Rows as `IdTable.rows` gives them, made of anything."""
    r = np.random.default_rng(seed)
    n = len(rows)
    return {
        "rows": torch.tensor(rows, dtype=torch.int64),
        "keys": torch.from_numpy(r.integers(-(2**63), 2**63, n)),
        "until_ms": torch.from_numpy(r.integers(-(2**63), 2**63, n)),
        "field": torch.from_numpy(r.integers(0, 3, n).astype(np.uint8)),
        "weight": torch.from_numpy(r.normal(size=(n, dim)).astype(np.float32)).to(torch.bfloat16),
    }


def plain(part: dict[str, Tensor]) -> list[int]:
    """The formula, in Python's integers."""
    hashes = []
    for i in range(len(part["rows"])):
        row, key, until, field = (int(part[name][i]) & MASK for name in ("rows", "keys", "until_ms", "field"))
        raw = part["weight"][i].view(torch.uint8).numpy().tobytes()
        words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]
        inner = fmix64((key + row * 0x9E3779B97F4A7C15) & MASK)
        inner += until * 0xC2B2AE3D27D4EB4F + field * 0x165667B19E3779F9
        inner += sum(fmix64(word) * (fmix64(n) | 1) for n, word in enumerate(words, 1))
        hashes.append(fmix64(inner & MASK))
    return hashes


@pytest.mark.parametrize("dim", [1, 4, 5, 64])
def test_it_is_its_formula(dim: int) -> None:
    some = part([1, 2, 7, 39], dim)
    assert row_hashes(some).tolist() == plain(some)
    digest = StateDigest(ROWS)
    digest.replace(some["rows"].numpy(), row_hashes(some))
    assert digest.text == f"{sum(plain(some)) & MASK:016x}"


def test_rows_in_blocks_are_the_same_rows() -> None:
    many = part(list(range(1, 2 * BLOCK + 5)), 4)
    one = {name: column[BLOCK + 1 : BLOCK + 3] for name, column in many.items()}
    assert row_hashes(many)[BLOCK + 1 : BLOCK + 3].tolist() == row_hashes(one).tolist()


def flips(some: dict[str, Tensor]) -> Iterator[None]:
    """Each bit of some rows flipped, one after the other (of their numbers the lower half: no table has more rows)."""
    for name, column in some.items():
        flat = column.view(-1).view(torch.uint8)
        for at in range(len(flat)):
            for bit in range(8 if name != "rows" or at % 8 < 4 else 0):
                flat[at] ^= 1 << bit
                yield
                flat[at] ^= 1 << bit


@pytest.mark.parametrize("dim", [1, 4, 5])
def test_every_bit_of_a_row_is_in_it(dim: int) -> None:
    some = part([3, 4], dim)
    before = int(row_hashes(some).sum())
    sums = [int(row_hashes(some).sum()) for _ in flips(some)]
    assert len(sums) == 8 * 2 * (4 + 8 + 8 + 1 + 2 * dim)
    assert before not in sums and len(set(sums)) == len(sums)


def test_two_bits_of_a_vector_do_not_cancel() -> None:
    """Any two, and above all not the signs of two components, each the top bit of a word of eight bytes."""
    some = part([3], dim=12)
    bits = np.unpackbits(some["weight"].view(torch.uint8).numpy())
    one, two = np.triu_indices(len(bits))
    many = np.repeat(bits[None], len(one), 0)
    many[np.arange(len(one)), one] ^= 1
    many[np.arange(len(one)), two] ^= 1  # the same one again: as it was
    weight = torch.from_numpy(np.packbits(many, 1)).view(torch.bfloat16)
    changed = {name: column.expand(len(one)) for name, column in some.items() if name != "weight"}
    hashes = row_hashes({name: column.contiguous() for name, column in changed.items()} | {"weight": weight})
    assert np.all(hashes[one == two] == row_hashes(some))
    assert len(np.unique(hashes)) == 1 + np.count_nonzero(one < two) == 1 + 192 * 191 // 2


def test_two_rows_that_swap_anything_are_told_apart() -> None:
    """A sum needs no order of the rows, yet each row's place is in its term."""
    some = part([3, 4])
    sums = {int(row_hashes(some).sum())}
    for name in some:
        sums.add(int(row_hashes(some | {name: some[name].flip(0)}).sum()))
    assert len(sums) == 1 + len(some) - (1 if some["field"][0] == some["field"][1] else 0)
    backwards = {name: column.flip(0) for name, column in some.items()}
    assert int(row_hashes(backwards).sum()) == int(row_hashes(some).sum())


def test_no_rows_change_nothing() -> None:
    """A version of a quiet table is empty, and its digest its parent's."""
    digest = StateDigest(ROWS)
    digest.replace(np.array([3, 4]), row_hashes(part([3, 4])))
    before, none = digest.text, part([])
    assert row_hashes(none).tolist() == []
    assert digest.replace(none["rows"].numpy(), row_hashes(none)).tolist() == []
    assert digest.text == before


changes = st.lists(st.tuples(st.sets(st.integers(1, ROWS - 1), max_size=12), st.integers(0, 10**6)), max_size=12)


@settings(max_examples=80, deadline=None)
@given(changes, st.randoms(use_true_random=False))
def test_what_is_kept_is_what_would_be_computed_and_undoing_restores_it(
    changes: list[tuple[set[int], int]], shuffler: object
) -> None:
    """P12, P15: incremental == recomputed; k undone in reverse give back every sum on the way."""
    digest, state, past = StateDigest(ROWS), {}, []
    for rows, seed in changes:
        order = list(rows)
        shuffler.shuffle(order)  # type: ignore[attr-defined]
        some = part(order, seed=seed)
        before = digest.text
        held = digest.replace(some["rows"].numpy(), row_hashes(some))
        past.append((before, some["rows"].numpy(), held))
        state |= dict(zip(order, plain(some), strict=True))
        assert digest.text == f"{sum(state.values()) & MASK:016x}"
        assert int(digest.hashes.sum()) == sum(state.values()) & MASK
    for before, rows, held in reversed(past):
        digest.replace(rows, held)
        assert digest.text == before
    assert digest.text == "0" * 16 and not digest.hashes.any()


def test_a_follower_of_deltas_has_the_trainers_digest_and_a_lost_row_shows() -> None:
    """P12 on a real table: inserts, updates, evictions, expiries; then a snapshot after growth."""
    rules = config.Table(slots=32, bucket_width=8, fallback_rows=8, ttl_seconds=60.0)
    trainer = IdTable(rules, 4, 1)
    published, applied, lossy = (StateDigest(len(trainer.weight)) for _ in range(3))
    r, now, mark = np.random.default_rng(1), START, trainer.mark()
    first = trainer.rows(trainer.snapshot_rows(now))
    for digest in (published, applied, lossy):
        digest.replace(first["rows"].numpy(), row_hashes(first))
    for version in range(20):
        now += 100_000 if version % 5 == 4 else 10_000
        lookup = trainer.map(r.integers(0, 60, 25).astype(np.uint64), np.full(25, now), watermark_ms=now)
        trainer.weight[lookup.rows_a] += 0.5
        delta, mark = trainer.rows(trainer.changed_since(mark)), trainer.mark()
        published.replace(delta["rows"].numpy(), row_hashes(delta))
        applied.replace(delta["rows"].numpy(), row_hashes(delta))
        lost = slice(0, None) if version != 10 else slice(0, -1)
        lossy.replace(delta["rows"].numpy()[lost], row_hashes(delta)[lost])
        assert published.text == applied.text
        assert (lossy.text == published.text) == (version < 10) or version > 10
    assert trainer.stats().evictions and trainer.stats().expiries
    every = np.flatnonzero(published.hashes)
    assert published.text == f"{int(row_hashes(trainer.rows(every)).sum(dtype=np.uint64)):016x}"
    trainer.grow()
    snapshot = trainer.rows(trainer.snapshot_rows(now))
    for digest in (published, applied):
        digest.clear(len(trainer.weight))
        digest.replace(snapshot["rows"].numpy(), row_hashes(snapshot))
    assert published.text == applied.text == f"{sum(plain(snapshot)) & MASK:016x}"
