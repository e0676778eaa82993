"""Whatever layout, preset and mask: what is trained is what is served, and no target sees what came of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgr import config
from streamgr.events import FIRST_ACTION, IMPRESSION, PROFILE, History
from streamgr.model.recommender import Recommender
from streamgr.model.rows import Rows
from streamgr.model.tokens import Layout, Tokens, request_times, tokenize

from .histories import ACTIONS, acted_history, cut

WINDOW = 200
DIM = 16
USER = 77
VARIANTS = {
    "interleaved": {},
    "summed": {"tokens": "summed"},
    "with the user": {"user_token": True},
    "summed, with the user": {"tokens": "summed", "user_token": True},
    "dlrm_v3": {"preset": "dlrm_v3"},
    "dlrm_v3, summed": {"preset": "dlrm_v3", "tokens": "summed"},
    "semi-local": {"local_window": 5, "global_prefix": 2},
    "semi-local dlrm_v3, summed, with the user": {
        "preset": "dlrm_v3", "tokens": "summed", "user_token": True, "local_window": 4,
    },
}  # fmt: skip
IDS = torch.randn(128, DIM, generator=torch.Generator().manual_seed(3))


def model(variant: str, seed: int = 1) -> Recommender:
    """A model whose biases and weights are large enough for a fault to show above the tolerance."""
    made = Recommender(
        config.Model(dim=DIM, heads=2, layers=2, position_buckets=24, scaling_seqlen=16, **VARIANTS[variant]),
        ["click", "like"],
        seed,
        WINDOW,
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
    return made


def vectors(tokens: Tokens) -> Tensor:
    return IDS[torch.from_numpy(tokens.keys.astype(np.int64))]


def trained(made: Recommender, window: History, targets: np.ndarray) -> tuple[Tensor, Tensor]:
    """Logits and queries of targets, in one pass over the window."""
    tokens = tokenize([window], made.layout, targets=[targets], users=[USER])
    hidden = made.transduce(tokens, vectors(tokens))
    return made.rank(hidden[torch.from_numpy(tokens.targets)]), made.queries(hidden, torch.from_numpy(tokens.queries))


def served(made: Recommender, window: History, row: int) -> tuple[Tensor, Tensor]:
    """The same of one target, as the scorer would have answered at its request time."""
    r = int(request_times(window)[row])
    tokens = made.tokens(cut(window, int(np.searchsorted(window.times, r, "left"))), r, USER)
    candidate = IDS[[int(window.items[row])]]
    cache = made.prefill(tokens, r, vectors(tokens))
    return made.score(cache, candidate)[0], made.retrieval_query(cache)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_trained_is_what_is_served(variant: str) -> None:
    made, checked, acted = model(variant), 0, 0
    for seed in range(3):
        window = acted_history(40, seed, window_ms=WINDOW)
        targets = np.flatnonzero(window.kinds != PROFILE)
        logits, queries = trained(made, window, targets)
        for place, row in enumerate(targets.tolist()):
            answer, query = served(made, window, row)
            if window.kinds[row] == IMPRESSION:
                torch.testing.assert_close(logits[place], answer, rtol=2e-5, atol=2e-5)
                checked += 1
            torch.testing.assert_close(queries[place], query, rtol=2e-5, atol=2e-5)
            acted += int(bool((window.kinds[:row] >= FIRST_ACTION).any()))
    assert checked > 30 and acted > 30


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_target_sees_its_request_or_what_comes_after(variant: str) -> None:
    """Everything from the request time on may change, but for the targets themselves."""
    made = model(variant)
    for seed in range(4):
        window = acted_history(30, seed, window_ms=WINDOW)
        shown = np.flatnonzero(window.kinds == IMPRESSION)
        row = int(shown[len(shown) // 2])
        r = int(request_times(window)[row])
        after = (window.times >= r) & (np.arange(30) != row) & (window.kinds != IMPRESSION)
        items = np.where(after, window.items % 6 + 1, window.items)
        kinds = np.where(after & (window.kinds >= FIRST_ACTION), 5 - window.kinds, window.kinds).astype(np.uint8)
        other = History(kinds, items, window.times, window.requests)
        mine, theirs = (trained(made, h, np.array([row])) for h in (window, other))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sequence_is_the_same_in_any_company(variant: str) -> None:
    made = model(variant)
    windows = [acted_history(n, n, window_ms=WINDOW) for n in (25, 1, 8, 40)] + [
        cut(acted_history(3, 1, window_ms=9), 0)
    ]
    chosen = [np.flatnonzero(w.kinds == IMPRESSION) for w in windows]
    tokens = tokenize(windows, made.layout, targets=chosen, users=[USER] * 5)
    hidden = made.transduce(tokens, vectors(tokens))
    together = made.rank(hidden[torch.from_numpy(tokens.targets)])
    alone = torch.cat([trained(made, w, t)[0] for w, t in zip(windows, chosen, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# --- what joins what, and what becomes of it


def joined_plainly(h: History, window_ms: int) -> list[int]:
    found = []
    for i in range(len(h)):
        mine = -1
        if h.kinds[i] >= FIRST_ACTION:
            for j in range(i):
                same = h.items[j] == h.items[i] and (not h.requests[i] or h.requests[j] == h.requests[i])
                if h.kinds[j] == IMPRESSION and same and h.times[i] - h.times[j] < window_ms:
                    mine = j
        found.append(mine)
    return found


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10_000)), min_size=1, max_size=4), st.integers(1, 400))
def test_joins_are_the_sequences_own(shapes: list[tuple[int, int]], window_ms: int) -> None:
    histories = [acted_history(n, seed, window_ms=100) for n, seed in shapes]
    rows = Rows.of(histories)
    expected = [
        j + int(start) if j >= 0 else -1
        for h, start in zip(histories, rows.offsets, strict=False)
        for j in joined_plainly(h, window_ms)
    ]
    assert rows.joined(window_ms).tolist() == expected


def test_an_impression_and_its_first_actions_are_one_token_when_its_outcome_is_known() -> None:
    shown, click, like = IMPRESSION, FIRST_ACTION, FIRST_ACTION + 1
    events = [  # kind, item, time
        (PROFILE, 90, 0), (shown, 1, 10), (shown, 2, 20), (click, 1, 30), (like, 1, 30), (like, 1, 40), (click, 3, 50),
        (shown, 4, 60), (shown, 1, 250),
    ]  # fmt: skip
    kinds, items, times = (np.array(column) for column in zip(*events, strict=True))
    h = History(kinds.astype(np.uint8), items.astype(np.uint64), times.astype(np.int64), np.zeros(9, np.uint64))
    layout = Layout(ACTIONS, window_ms=100)
    tokens = tokenize([h], layout, targets=[np.array([7, 8])])
    s, c, k, passed = 1 << IMPRESSION, 1 << click, 1 << like, 1 << IMPRESSION | 1 << layout.passed
    assert tokens.keys.tolist() == [90, 1, 1, 3, 2, 4, 4, 1]
    assert tokens.times.tolist() == [0, 30, 40, 50, 119, 159, 60, 250]
    assert tokens.marks.tolist() == [1, s | c | k, k, c, passed, passed, s, s]
    assert tokens.targets.tolist() == [6, 7] and tokens.visible.tolist() == [0, 1, 2, 3, 4, 5, 4, 6]
    assert tokens.queries.tolist() == [3, 3]
    assert len(tokenize([h], Layout(ACTIONS))) == 9
