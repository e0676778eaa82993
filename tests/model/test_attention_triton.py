"""The attention on a GPU against its formula: forward and every gradient, masks of all kinds, bits that repeat.

Inputs are of order 1: with small ones an output of zeros would pass. The measure of a bfloat16 kernel is the error that
the formula itself makes in bfloat16, both against float32: at most twice that forward, five times backward.

There need be no GPU: Triton's interpreter runs the kernels here, and that they compile as well is a test of its own.
With one, the last test runs all of this on it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgr import config
from streamgr.errors import ConfigError
from streamgr.model import attention, attention_blocks
from streamgr.model.attention import Shape
from streamgr.model.hstu import Stack
from streamgr.model.tokens import Layout, Tokens, tokenize

from .histories import ACTIONS, random_history
from .interpreter import DEVICE, attention_triton, interpreting

NAMES = ("out", "dq", "dk", "dv", "dposition", "dtime")
TILE = 16
SMALL = Shape(16, 12)


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpreting():
        yield


@dataclass(frozen=True)
class Case:
    """lengths: of the sequences; a span of a minute has a dozen time buckets, one of a year most of 64."""

    lengths: tuple[int, ...]
    heads: int = 2
    dim: int = 16
    shape: Shape = SMALL
    biased: bool = True
    span_ms: int = 60_000
    requests: int | None = None  # of a history; 1: all its items are one request's
    tile: int = TILE
    seed: int = 0

    @property
    def tokens(self) -> Tokens:
        histories = [
            random_history(n, self.seed + i, span_ms=self.span_ms, requests=self.requests)
            for i, n in enumerate(self.lengths)
        ]
        return tokenize(histories, Layout(ACTIONS))


CASES = {
    "paper": Case((7, 1, 40)),
    "no bias": Case((7, 1, 40), biased=False),
    "semi-local": Case((70, 20), heads=1, shape=Shape(64, 12, local_window=10, global_prefix=5)),
    "a window without a prefix": Case((50,), heads=1, dim=8, shape=Shape(64, 12, local_window=7)),
    "one request": Case((45,), heads=1, requests=1),
    "length 1": Case((1, 1, 1)),
    "empty sequences": Case((0, 20, 0, 0, 3, 0)),
    "a year": Case((60,), heads=1, dim=8, shape=Shape(200, 64), span_ms=31_557_600_000, tile=32),
    "one bucket of each": Case((20,), heads=1, shape=Shape(1, 1)),
    "heads of 25": Case((30,), heads=1, dim=25),
    "heads of 50": Case((20,), heads=2, dim=50),
    "heads of 64": Case((33,), heads=1, dim=64, tile=32),
}
HALVES = ["paper", "no bias", "semi-local", "one request", "a year", "heads of 25", "heads of 64"]


def values(case: Case, n: int) -> list[Tensor]:
    """q, k, v, the two bias tables, and the gradient that comes in; of order 1."""
    g = torch.Generator().manual_seed(case.seed)
    made = [torch.randn(n, case.heads, case.dim, generator=g) for _ in range(4)]
    biases = [torch.randn(count, generator=g) for count in (case.shape.positions, case.shape.times)]
    return [*made[:3], *biases, made[3]]


def results(kind: str, case: Case, given: list[Tensor], tokens: Tokens) -> list[Tensor]:
    """Output and gradients in float32, by one of the twins."""
    device = DEVICE if kind == "triton" else "cpu"
    leaves = [x.detach().to(device).requires_grad_() for x in given[:5]]
    q, k, v, position, time = leaves
    biases = (position, time) if case.biased else (None, None)
    if kind == "triton":
        plan = attention_triton.plan(tokens, case.shape, DEVICE, case.tile)
        out = attention_triton.attend(q, k, v, *biases, plan)
    else:
        out = attention.reference(q, k, v, *biases, attention.pairs(tokens, case.shape))
    assert out.dtype == q.dtype and out.shape == v.shape
    out.backward(given[5].to(device))  # type: ignore[no-untyped-call]
    found = [out.detach(), *(x.grad for x in leaves if x.grad is not None)]
    assert len(found) == (6 if case.biased else 4)
    return [x.cpu().float() for x in found]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(found, exact, strict=True)]


def agree(found: list[Tensor], exact: list[Tensor]) -> None:
    """float32: to 1e-5 of the largest value; of 1 where all are small, since their terms are of order 1."""
    for name, error, x in zip(NAMES, errors(found, exact), exact, strict=False):
        assert error <= 1e-5 * max(1.0, float(x.abs().max())), name


def agree_in_half(found: list[Tensor], rounded: list[Tensor], exact: list[Tensor]) -> None:
    """bfloat16: to twice the error of the formula forward, five times backward."""
    for name, mine, its in zip(NAMES, errors(found, exact), errors(rounded, exact), strict=False):
        assert mine <= (2 if name == "out" else 5) * its, name


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_formula(name: str) -> None:
    case = CASES[name]
    tokens = case.tokens
    given = values(case, len(tokens))
    agree(results("triton", case, given, tokens), results("reference", case, given, tokens))


@pytest.mark.parametrize("name", HALVES)
def test_in_bfloat16_it_errs_no_more_than_the_formula(name: str) -> None:
    case = CASES[name]
    tokens = case.tokens
    half = [x.bfloat16() for x in values(case, len(tokens))]
    exact = results("reference", case, [x.float() for x in half], tokens)
    agree_in_half(results("triton", case, half, tokens), results("reference", case, half, tokens), exact)


def test_the_measures_can_fail() -> None:
    """An output of zeros, a gradient left out, one value a little off: each is found."""
    case = CASES["paper"]
    tokens = case.tokens
    given = values(case, len(tokens))
    exact = results("reference", case, given, tokens)
    rounded = results("reference", case, [x.bfloat16() for x in given], tokens)
    for i in range(6):
        wrong = [x.clone() for x in exact]
        wrong[i].zero_()
        with pytest.raises(AssertionError, match=NAMES[i]):
            agree(wrong, exact)
        with pytest.raises(AssertionError, match=NAMES[i]):
            agree_in_half(wrong, rounded, exact)
        wrong[i] = exact[i].clone()
        wrong[i].view(-1)[-1] += 1e-3 * exact[i].abs().max()
        with pytest.raises(AssertionError, match=NAMES[i]):
            agree(wrong, exact)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(0, 37), min_size=1, max_size=3),
    st.sampled_from([8, 16, 25]),
    st.sampled_from([(0, 0), (1, 0), (9, 4), (20, 40)]),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_any_mask_at_all(lengths: list[int], dim: int, local: tuple[int, int], anything: bool, seed: int) -> None:
    """`anything`: tokens that see any number of leading ones, themselves and later ones among them."""
    case = Case(tuple(lengths), heads=1, dim=dim, shape=Shape(24, 12, *local), seed=seed)
    tokens = case.tokens
    if anything:
        n = np.repeat(np.diff(tokens.offsets), np.diff(tokens.offsets))
        tokens = replace(tokens, visible=np.random.default_rng(seed).integers(0, n + 1))
    if len(tokens):
        given = values(case, len(tokens))
        agree(results("triton", case, given, tokens), results("reference", case, given, tokens))


def test_the_same_input_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a program takes several items, as in a long batch."""
    monkeypatch.setattr(attention_triton, "STRIDE", 3)
    case = Case((40, 17), heads=1)
    tokens = case.tokens
    given = values(case, len(tokens))
    first, second = (results("triton", case, given, tokens) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    agree(first, results("reference", case, given, tokens))


def test_a_sequence_is_the_same_in_any_company() -> None:
    """To the bit: no tile holds tokens of two sequences."""
    case = Case((20, 3, 33), heads=1)
    tokens = case.tokens
    given = values(case, len(tokens))
    whole = results("triton", case, given, tokens)
    for i, (start, end) in enumerate(pairwise(tokens.offsets)):
        alone = tokenize([random_history(case.lengths[i], i)], Layout(ACTIONS))
        part = [x[start:end] if j not in (3, 4) else x for j, x in enumerate(given)]
        for mine, all_of_them in zip(results("triton", case, part, alone)[:4], whole[:4], strict=True):
            assert torch.equal(mine, all_of_them[start:end])


def test_only_tiles_that_are_seen_are_work() -> None:
    """Of n tokens the causal half; of a long history with a window a band; of one request's targets nothing."""

    def tiles(tokens: Tokens, shape: Shape) -> tuple[int, int]:
        rows, keys = attention_triton.work(tokens, shape, TILE)
        assert np.array_equal(np.sort(rows[:, 0] + rows[:, 2]), np.sort(keys[:, 0] + keys[:, 2]))
        costs = rows[:, 3] + rows[:, 5] - rows[:, 4], keys[:, 4] - keys[:, 3]
        assert all((np.diff(cost) <= 0).all() and (cost >= 0).all() for cost in costs)
        return int(costs[0].sum()), int(costs[1].sum())

    n = 20 * TILE
    tokens = Case((n,)).tokens
    assert tiles(replace(tokens, visible=np.arange(n)), Shape(8, 8)) == (210, 210)
    assert tiles(replace(tokens, visible=np.arange(n)), Shape(8, 8, local_window=TILE)) == (39, 39)
    prefix = Shape(8, 8, local_window=TILE, global_prefix=TILE)
    assert tiles(replace(tokens, visible=np.arange(n)), prefix)[0] == 39 + 18
    targets = np.where(np.arange(n) < 5 * TILE, np.arange(n), 5 * TILE)
    assert tiles(replace(tokens, visible=targets), Shape(8, 8)) == (15 + 15 * 5,) * 2
    assert tiles(replace(tokens, visible=np.zeros(n, np.int64)), Shape(8, 8)) == (0, 0)


@pytest.mark.parametrize("preset", ["paper", "dlrm_v3"])
@pytest.mark.parametrize("local", [(0, 0), (6, 3)])
def test_padded_jagged_and_triton_are_one_stack(preset: str, local: tuple[int, int]) -> None:
    """Two layers of each published kind, on the same weights, to 1e-5; gradients of the weights too."""
    model = config.Model(
        preset=preset,  # type: ignore[arg-type]
        dim=32,
        position_buckets=24,
        time_buckets=16,
        scaling_seqlen=8,
        local_window=local[0],
        global_prefix=local[1],
    )
    shape, tokens = Shape.of(model), Case((19, 0, 5, 1)).tokens
    x = torch.randn(len(tokens), model.dim, generator=torch.Generator().manual_seed(1))
    twins = {
        "padded": (attention.reference, attention.pairs(tokens, shape)),
        "jagged": (attention_blocks.attend, attention_blocks.plan(tokens, shape)),
        "triton": (attention_triton.attend, attention_triton.plan(tokens, shape, DEVICE, TILE)),
    }
    found = {}
    for name, (attend, plan) in twins.items():
        device = DEVICE if name == "triton" else "cpu"
        stack = Stack(model, torch.Generator().manual_seed(1), attend).to(device)
        hidden, _ = stack(x.to(device), plan)
        hidden.square().sum().backward()
        found[name] = [hidden.detach().cpu(), *(p.grad.cpu() for p in stack.parameters() if p.grad is not None)]
    for name in ("jagged", "triton"):
        for mine, padded in zip(found[name], found["padded"], strict=True):
            assert float((mine - padded).abs().max()) <= 1e-5 * max(1.0, float(padded.abs().max())), name


def test_bad_input_has_a_name() -> None:
    tokens = Case((3,)).tokens
    with pytest.raises(ConfigError, match=r"model\.position_buckets: 10000 .* too many"):
        attention_triton.plan(tokens, Shape(10_000, 8), DEVICE)
    q = torch.zeros(3, 1, 256, device=DEVICE)
    with pytest.raises(ConfigError, match=r"model\.heads: heads of 256 channels are too wide"):
        attention_triton.attend(q, q, q, None, None, attention_triton.plan(tokens, Shape(8, 8), DEVICE))


def test_no_tokens_at_all() -> None:
    tokens, q = Case((0, 0)).tokens, torch.zeros(0, 1, 8, device=DEVICE, requires_grad=True)
    out = attention_triton.attend(q, q, q, None, None, attention_triton.plan(tokens, Shape(8, 8), DEVICE))
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert len(out) == 0 and q.grad is not None and len(q.grad) == 0


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """To machine code of an A100 and an H100, without one; in a process of its own that does not interpret."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    argv = [sys.executable, "-m", "tests.model.compile_attention"]
    run = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    made = [line.split() for line in run.stdout.splitlines()]
    assert {line[0] for line in made} == attention_triton.LAUNCHES.keys() and len(made) == 8
    for _, architecture, _, _, code, shared, _ in made:
        assert int(code) > 5_000 and int(shared) <= {"80": 99, "90": 227}[architecture] << 10


@pytest.mark.skipif(DEVICE != "cpu", reason="this is the run on the GPU")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the kernels were interpreted")
def test_all_of_this_on_a_gpu() -> None:
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"STREAMGR_TEST_DEVICE": "cuda"}
    run = subprocess.run([sys.executable, "-m", "pytest", __file__], env=environ, text=True, check=False)
    assert run.returncode == 0
