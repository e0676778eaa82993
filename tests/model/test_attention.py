from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgr.events import History
from streamgr.model import attention, attention_blocks, jagged
from streamgr.model.tokens import Layout, Tokens
from streamgr.model.tokens import tokenize as lay_out

from .histories import ACTIONS, random_history

POSITIONS, TIMES, HEADS, DIM = 16, 12, 2, 4
SHAPE = attention.Shape(POSITIONS, TIMES)
SHAPES = st.builds(
    attention.Shape, st.just(POSITIONS), st.just(TIMES), st.sampled_from([0, 1, 3, 50]), st.integers(0, 9)
)


def tokenize(histories: list[History]) -> Tokens:
    return lay_out(histories, Layout(ACTIONS))


def batch(lengths: list[int], seed: int = 0) -> tuple[Tokens, list[Tensor]]:
    """Tokens and O(1) values for q, k, v, position and time bias: small ones would hide a wrong kernel."""
    tokens = tokenize([random_history(n, seed + i) for i, n in enumerate(lengths)])
    g = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(len(tokens), HEADS, DIM, generator=g) for _ in range(3)]
    return tokens, [*qkv, torch.randn(POSITIONS, generator=g), torch.randn(TIMES, generator=g)]


def by_hand(tokens: Tokens, q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor) -> Tensor:
    """The formula of the module docstring, pair by pair."""
    out = torch.zeros_like(v)
    for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        for i in range(start, end):
            for j in range(start, end):
                seen = j - start < tokens.visible[i]
                if not seen and i != j:
                    continue
                p = 0 if i == j else min(int(tokens.visible[i]) - (j - int(start)), POSITIONS - 1)
                elapsed = torch.tensor([int(tokens.query_times[i] - tokens.times[j])])
                bias = position[p] + time[int(attention.time_bucket(elapsed, TIMES))]
                for h in range(HEADS):
                    out[i, h] += torch.nn.functional.silu(q[i, h] @ k[j, h] + bias) * v[j, h]
    return out


def run(kind: str, tokens: Tokens, values: Sequence[Tensor | None], shape: attention.Shape = SHAPE) -> Tensor:
    q, k, v, position, time = values
    assert q is not None and k is not None and v is not None
    if kind == "jagged":
        return attention_blocks.attend(q, k, v, position, time, attention_blocks.plan(tokens, shape))
    return attention.reference(q, k, v, position, time, attention.pairs(tokens, shape))


@pytest.mark.parametrize("kind", ["padded", "jagged"])
def test_attention_is_its_formula(kind: str) -> None:
    tokens, values = batch([7, 1, 12])
    torch.testing.assert_close(run(kind, tokens, values), by_hand(tokens, *values), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(0, 10_000), SHAPES, st.booleans())
@example([200, 0, 1, 130], 1, SHAPE, True)
@example([200, 0, 1, 130], 1, attention.Shape(POSITIONS, TIMES, 20, 5), False)
def test_jagged_equals_padded_forward_and_backward(
    lengths: list[int], seed: int, shape: attention.Shape, biased: bool
) -> None:
    """Ties in time, requests whose items see less than their place, windows, with biases and without; tiles of one
    row and of many, plans kept and plans made again."""
    tokens, values = batch(lengths, seed)
    if not len(tokens):
        return
    weights = torch.randn(len(tokens), HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    results = []
    for kind, sizes in (("padded", None), ("jagged", (64, 1024, 1 << 20)), ("jagged", (5, 7, 100 * (seed % 3)))):
        leaves = [x.clone().requires_grad_() for x in (values if biased else values[:3])]
        rows, columns, kept = sizes or (1, 1, 0)
        with patch.multiple(attention_blocks, ROWS=rows, COLUMNS=columns, PLAN_BYTES=kept):
            out = run(kind, tokens, leaves if biased else [*leaves, None, None], shape)
        (out * weights).sum().backward()  # type: ignore[no-untyped-call]
        results.append([out.detach(), *(x.grad for x in leaves)])
    for padded, *jagged_ones in zip(*results, strict=True):
        for mine in jagged_ones:
            assert padded is not None and mine is not None
            scale = max(1.0, float(padded.abs().max()))
            torch.testing.assert_close(mine / scale, padded / scale, rtol=1e-5, atol=1e-5)


def test_nothing_attends_to_nothing() -> None:
    tokens, values = batch([0, 0])
    assert run("jagged", tokens, values).shape == (0, HEADS, DIM)


def test_a_window_makes_the_plan_of_a_long_sequence_small() -> None:
    """Pairs that are laid out grow with n * window, not with n * n; the causal half costs half."""
    tokens = tokenize([random_history(4096, 0, requests=1 << 40)])

    def pairs(shape: attention.Shape) -> int:
        (block,) = attention_blocks.plan(tokens, shape).blocks
        return sum(tile.bias.numel() for tile in block.tiles if tile.bias is not None)

    assert pairs(SHAPE) < 0.52 * 4096**2
    assert pairs(attention.Shape(POSITIONS, TIMES, 256, 16)) < 4096 * (256 + 16 + 4 * attention_blocks.ROWS)


def test_a_plan_is_kept_up_to_its_bytes_only() -> None:
    tokens, values = batch([300, 200])
    with patch.object(attention_blocks, "PLAN_BYTES", 100_000):
        plan = attention_blocks.plan(tokens, SHAPE)
    kept = [tile.bias is not None for block in plan.blocks for tile in block.tiles]
    assert any(kept) and not all(kept)
    q, k, v, position, time = values
    assert torch.equal(attention_blocks.attend(q, k, v, position, time, plan), run("jagged", tokens, values))


def test_a_sequence_is_the_same_in_any_company_and_order() -> None:
    """Blocks of other sizes and neighbours of other lengths: padding and composition change nothing."""
    lengths = [40, 3, 17, 90, 1, 41]
    tokens, values = batch(lengths)
    whole = run("jagged", tokens, values)
    for i, length in enumerate(lengths):
        alone, mine = tokenize([random_history(length, i)]), slice(int(tokens.offsets[i]), int(tokens.offsets[i + 1]))
        out = run("jagged", alone, [*(x[mine] for x in values[:3]), *values[3:]])
        torch.testing.assert_close(out, whole[mine], rtol=1e-5, atol=1e-5)


def test_what_is_masked_weighs_exactly_nothing() -> None:
    """Bits, not tolerances: even huge keys and values behind the mask leave no trace."""
    tokens, values = batch([30])
    hidden = int(tokens.visible.max()) + 1
    out = run("jagged", tokens, values)
    later = torch.arange(len(tokens)) >= hidden
    for x in values[1:3]:
        x[later] *= 1e6
    assert torch.equal(run("jagged", tokens, values)[~later], out[~later])


def test_the_same_input_gives_the_same_bits_on_any_number_of_threads() -> None:
    tokens, values = batch([50, 60, 3, 200, 199])
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, threads, threads):
        torch.set_num_threads(count)
        leaves = [x.clone().requires_grad_() for x in values]
        out = run("jagged", tokens, leaves)
        out.square().sum().backward()  # type: ignore[no-untyped-call]
        runs.append([out, *(x.grad for x in leaves if x.grad is not None)])
    torch.set_num_threads(threads)
    assert len(runs[0]) == 6
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_time_buckets_tell_milliseconds_from_years() -> None:
    second, minute, hour, day, year = 1000, 60_000, 3_600_000, 86_400_000, 31_557_600_000
    elapsed = torch.tensor([-5, 0, 31, 32, second, minute, hour, day, year, 7 * year, 2**62])
    assert attention.time_bucket(elapsed, 64).tolist() == [0, 0, 0, 1, 8, 19, 31, 40, 57, 63, 63]
    ordered = attention.time_bucket(torch.logspace(0, 12, 5_000, dtype=torch.float64).long(), 64)
    assert torch.equal(ordered, ordered.sort().values) and np.unique(ordered.numpy()).tolist() == list(range(64))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 1 << 17))
def test_blocks_hold_every_token_once_within_the_budget(lengths: list[int], pairs: int) -> None:
    offsets = np.cumsum([0, *lengths])
    made = list(jagged.blocks(offsets, pairs))
    tokens = np.concatenate([np.zeros(0, np.int64), *(b.tokens[b.real] for b in made)])
    assert np.sort(tokens).tolist() == list(range(int(offsets[-1])))
    for block in made:
        b, n = block.tokens.shape
        assert b == 1 or b * n * n <= pairs
        assert block.tokens.max() < offsets[-1]
        assert block.real.sum(1).min() * jagged.PADDING + 4 >= n
