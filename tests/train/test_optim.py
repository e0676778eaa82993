"""The row-wise optimizers against their formulae in doubles, a row at a time."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgr.config import Trainer
from streamgr.errors import ConfigError
from streamgr.train.optim import (
    BETAS,
    EPSILON,
    FALLBACK_SHARE,
    INITIAL,
    RowAdagrad,
    RowAdam,
    RowOptimizer,
    row_optimizer,
)

ROWS, SHARED, DIM, RATE = 12, 4, 3, 0.1


@dataclass
class Row:
    """One row and what is remembered of it, for either optimizer."""

    weight: list[float]
    accumulator: float = INITIAL
    touched: int = 0
    mean: list[float] = field(default_factory=lambda: [0.0] * DIM)
    square: float = 0.0
    steps: int = 0

    def reset(self) -> None:
        self.__init__(self.weight)  # type: ignore[misc]

    def adagrad(self, gradient: list[float], now: int, rate: float, half_life: float) -> None:
        fade = 0.5 ** ((now - self.touched) / half_life) if half_life else 1.0
        self.accumulator = INITIAL + fade * (self.accumulator - INITIAL) + sum(g * g for g in gradient) / DIM
        self.touched = now
        self.weight = [w - rate * g / self.accumulator**0.5 for w, g in zip(self.weight, gradient, strict=True)]

    def adam(self, gradient: list[float], _now: int, rate: float, _half_life: float) -> None:
        (b1, b2), self.steps = BETAS, self.steps + 1
        self.mean = [b1 * m + (1 - b1) * g for m, g in zip(self.mean, gradient, strict=True)]
        self.square = b2 * self.square + (1 - b2) * sum(g * g for g in gradient) / DIM
        scale = (self.square / (1 - b2**self.steps)) ** 0.5 + EPSILON
        moves = [m / (1 - b1**self.steps) / scale for m in self.mean]
        self.weight = [w - rate * move for w, move in zip(self.weight, moves, strict=True)]


def build(kind: str, half_life: float = 0.0, rows: int = ROWS) -> RowOptimizer:
    return row_optimizer(
        Trainer(table_optimizer=kind, table_learning_rate=RATE, table_half_life_steps=half_life), rows, SHARED, DIM
    )


def gradients(rows: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32))


touched = st.sets(st.integers(1, ROWS - 1), max_size=ROWS)
steps = st.lists(st.tuples(touched, touched, st.integers(1, 40)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(steps, st.sampled_from(["adagrad", "adam"]), st.sampled_from([0.0, 0.5, 20.0, 1e9]), st.integers(0, 99))
def test_a_step_is_its_formula(
    steps: list[tuple[set[int], set[int], int]], kind: str, half_life: float, seed: int
) -> None:
    """Rows come and go, some are given away before a step, the clock jumps."""
    weight, now = gradients(ROWS, seed), 0
    twin = [Row(row) for row in weight.tolist()]
    optimizer = build(kind, half_life)
    for n, (given_away, rows, jump) in enumerate(steps):
        now += jump
        gradient = gradients(len(rows), 100 * seed + n)
        optimizer.reset(torch.tensor(sorted(given_away), dtype=torch.int64))
        optimizer.step(weight, torch.tensor(sorted(rows), dtype=torch.int64), gradient, now)
        for row in given_away:
            twin[row].reset()
        for row, g in zip(sorted(rows), gradient.tolist(), strict=True):
            rate = RATE * (FALLBACK_SHARE if row <= SHARED else 1)
            (twin[row].adagrad if kind == "adagrad" else twin[row].adam)(g, now, rate, half_life)
        wanted = torch.tensor([row.weight for row in twin])
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_a_row_given_to_a_new_id_learns_as_if_it_had_always_been_its(kind: str) -> None:
    """P10: whatever the id before it has been through."""
    old, new = build(kind, 50.0), build(kind, 50.0)
    row, start = torch.tensor([7]), torch.full((ROWS, DIM), 0.5)
    weight = start.clone()
    for now in range(1, 30):
        old.step(weight, row, 10 * gradients(1, now), now)
    weight = start.clone()
    old.step(weight, row, gradients(1, 0), 30)
    inherited = weight.clone()
    old.reset(row)
    weight, fresh = start.clone(), start.clone()
    for now in range(30, 35):
        old.step(weight, row, gradients(1, now), now)
        new.step(fresh, row, gradients(1, now), now)
        assert torch.equal(weight, fresh) and not torch.equal(weight, inherited)


@pytest.mark.parametrize("half_life", [1.0, 7.0, 1e3, 1e6, 1e8])
def test_forgetting_when_touched_is_forgetting_at_every_step(half_life: float) -> None:
    """Lazily and densely; half lives of many millions of steps too, where 1/2^(1/half life) is no float32."""
    lazy = RowAdagrad(ROWS, SHARED, RATE, half_life)
    row, weight, now, dense = torch.tensor([9]), torch.zeros(ROWS, DIM), 0, 0.0
    for n, gap in enumerate((1, 3, 1, int(half_life), 2, int(3 * half_life) + 1)):
        gradient, now = gradients(1, n), now + gap
        for _ in range(min(gap, 1000)):  # in as many equal parts
            dense *= 0.5 ** (gap / min(gap, 1000) / half_life)
        dense += float(gradient.square().mean())
        lazy.step(weight, row, gradient, now)
        assert float(lazy.state["accumulator"][9]) - INITIAL == pytest.approx(dense, rel=1e-4)


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_shared_rows_learn_at_a_quarter_of_the_rate_and_others_not_at_all(kind: str) -> None:
    weight = torch.ones(ROWS, DIM)
    build(kind).step(weight, torch.tensor([SHARED, SHARED + 1]), gradients(1, 1).expand(2, DIM), 1)
    moved = 1 - weight
    torch.testing.assert_close(4 * moved[SHARED], moved[SHARED + 1], rtol=1e-4, atol=1e-6)
    assert moved[SHARED].any() and torch.equal(torch.nonzero(moved.any(1)).flatten(), torch.tensor([4, 5]))


def test_what_is_forgotten_is_counted_from_the_last_touch_even_if_forgetting_began_later() -> None:
    """A trainer that is started again with a half life goes on from what it has."""
    before, weight, row = RowAdagrad(ROWS, SHARED, RATE), torch.zeros(ROWS, DIM), torch.tensor([9])
    for now in range(1, 1001):
        before.step(weight, row, torch.ones(1, DIM), now)
    after = RowAdagrad(ROWS, SHARED, RATE, half_life_steps=100.0)
    after.load_state(before.state)
    after.step(weight, row, torch.ones(1, DIM), 1001)
    assert float(after.state["accumulator"][9]) == pytest.approx(INITIAL + 1000 * 0.5**0.01 + 1, rel=1e-4)


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_rows_take_what_is_remembered_along_when_the_table_grows(kind: str) -> None:
    small, weight = build(kind, 30.0), gradients(ROWS, 1)
    every = torch.arange(1, ROWS)
    for now in range(1, 6):
        small.step(weight, every, gradients(ROWS - 1, now), now)
    large = build(kind, 30.0)
    large.load_state(small.state)
    own = torch.arange(SHARED + 1, ROWS)
    moved = torch.from_numpy(np.random.default_rng(3).permutation(2 * len(own))[: len(own)]) + SHARED + 1
    rows = SHARED + 1 + 2 * len(own)
    large.grow(rows, own, moved)
    where = torch.cat([torch.arange(SHARED + 1), moved])
    grown = torch.zeros(rows, DIM)
    grown[where] = weight
    fresh = torch.from_numpy(np.setdiff1d(np.arange(rows), where.numpy()))
    blank = build(kind, 30.0, rows)
    for name, column in large.state.items():
        assert torch.equal(column[where], small.state[name])
        assert torch.equal(column[fresh], blank.state[name][fresh])
    gradient = gradients(ROWS - 1, 7)
    small.step(weight, every, gradient, 6)
    large.step(grown, where[1:], gradient, 6)
    assert torch.equal(grown[where], weight) and not grown[fresh].any()


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_an_optimizer_goes_on_from_its_state(kind: str) -> None:
    whole, half = build(kind, 10.0), build(kind, 10.0)
    weight = gradients(ROWS, 1)
    for now in range(1, 10):
        rows = torch.tensor([1, 2 + now % 5, 8])
        if now == 5:
            half.load_state(whole.state)
            other = weight.clone()
        whole.step(weight, rows, gradients(3, now), now)
        if now >= 5:
            half.step(other, rows, gradients(3, now), now)
    assert torch.equal(weight, other)
    assert all(torch.equal(column, half.state[name]) for name, column in whole.state.items())


def test_the_state_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="accumulator, touched, not mean, square, steps"):
        build("adam").load_state(build("adagrad").state)


def test_the_settings_name_the_optimizer() -> None:
    assert isinstance(build("adagrad"), RowAdagrad) and isinstance(build("adam"), RowAdam)
