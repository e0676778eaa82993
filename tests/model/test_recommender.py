from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgr import config
from streamgr.events import IMPRESSION, History
from streamgr.model import hstu
from streamgr.model.recommender import Recommender
from streamgr.model.tokens import Layout, Tokens, request_times, visible
from streamgr.model.tokens import tokenize as lay_out

from .histories import ACTIONS, cut, random_history

SETTINGS = config.Model(dim=16, heads=2, layers=2, position_buckets=32, time_buckets=64, scaling_seqlen=32)
ITEMS = torch.randn(64, SETTINGS.dim, generator=torch.Generator().manual_seed(3))


def tokenize(histories: Sequence[History]) -> Tokens:
    return lay_out(histories, Layout(ACTIONS))


def score(made: Recommender, history: History, at: int, known: Tensor, candidates: Tensor) -> Tensor:
    return made.score(made.prefill(made.tokens(history, at, 0), at, known), candidates)


def query(made: Recommender, history: History, at: int, known: Tensor) -> Tensor:
    return made.retrieval_query(made.prefill(made.tokens(history, at, 0), at, known))


def model(seed: int = 1) -> Recommender:
    """A model whose biases and weights are large enough for a fault to show above the tolerance."""
    made = Recommender(SETTINGS, ["click", "like"], seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.3)
    return made


def vectors(history: History) -> Tensor:
    return ITEMS[torch.from_numpy(history.items.astype(np.int64))]


def transduced(made: Recommender, *histories: History) -> Tensor:
    return made.transduce(tokenize(histories), torch.cat([vectors(h) for h in histories]))


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10_000), st.booleans())
def test_training_equals_serving_at_the_request_time(n: int, k: int, seed: int, spread: bool) -> None:
    """Decision 1: the item tokens of the last request == one `score` of its items after the history before it."""
    before = random_history(n, seed)
    r = int(before.times[-1]) + 1 + seed % 5_000
    times = r + np.arange(k) * (7 if spread else 0)
    asked = np.full(k, 10**9, np.uint64)
    shown = np.arange(1, k + 1, dtype=np.uint64)
    noise = random_history(5, seed + 1)  # what comes after must not matter, late items of the same request included
    window = History(
        np.concatenate([before.kinds, np.full(k, IMPRESSION, np.uint8), noise.kinds]),
        np.concatenate([before.items, shown, noise.items]),
        np.concatenate([before.times, times, noise.times - noise.times[0] + times[-1]]),
        np.concatenate([before.requests, asked, np.zeros(5, np.uint64)]),
    )
    made = model()
    trained = made.rank(transduced(made, window))[n : n + k]
    served = score(made, before, r, vectors(before), ITEMS[1 : k + 1])
    torch.testing.assert_close(trained, served, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_impression_of_a_random_history_is_served_as_it_is_trained() -> None:
    made, checked = model(), 0
    for seed in range(8):
        window = random_history(60, seed, span_ms=400)
        trained = made.rank(transduced(made, window))
        for i in np.flatnonzero(window.kinds == IMPRESSION):
            before, r = cut(window, int(visible(window)[i])), int(request_times(window)[i])
            served = score(made, before, r, vectors(before), ITEMS[[int(window.items[i])]])
            torch.testing.assert_close(trained[i], served[0], rtol=1e-5, atol=1e-5)
            checked += 1
    assert checked > 100


@torch.no_grad()
def test_a_query_is_served_as_it_is_trained() -> None:
    """The last action before r, in the whole window and in the history that the scorer has at r."""
    made, checked = model(), 0
    for seed in range(8):
        window = random_history(40, seed, span_ms=400)
        hidden = transduced(made, window)
        for i in range(len(window)):
            r = int(request_times(window)[i])
            before = cut(window, int(np.searchsorted(window.times, r, "left")))
            acted = np.flatnonzero(before.kinds != IMPRESSION)
            trained = made.queries(hidden, torch.tensor([acted[-1] if len(acted) else -1]))[0]
            served = query(made, before, r, vectors(before))
            torch.testing.assert_close(trained, served, rtol=1e-5, atol=1e-5)
            checked += bool(len(acted))
    assert checked > 100


@torch.no_grad()
def test_the_future_changes_nothing_but_through_the_next_timestamp() -> None:
    """Change event m in item, kind and time: no token before it moves, except the action just before it (its query
    time) — and whoever sees that action already stands at or after m."""
    made = model()
    for seed in range(6):
        window = random_history(40, seed, span_ms=100_000, requests=1)
        base = transduced(made, window)
        for m in range(1, 40, 3):
            changed = History(window.kinds.copy(), window.items.copy(), window.times.copy(), window.requests)
            changed.items[m] = changed.items[m] % 49 + 1
            changed.kinds[m] = IMPRESSION if changed.kinds[m] != IMPRESSION else 2
            changed.times[m:] += 86_400_000
            moved = ~torch.isclose(base, transduced(made, changed), rtol=0, atol=1e-6).all(1)
            assert moved[m]
            allowed = {m - 1} if window.kinds[m - 1] != IMPRESSION else set()
            assert set(moved[:m].nonzero().squeeze(1).tolist()) <= allowed
            late = History(changed.kinds, changed.items, window.times, window.requests)
            kept = torch.isclose(base, transduced(made, late), rtol=0, atol=1e-6).all(1)
            assert kept[:m].all() and not kept[m]


@torch.no_grad()
def test_a_random_leak_does_not_show() -> None:
    """The outcomes of a request, which no past tells, leave the logits of its items untouched."""
    made = model()
    window = random_history(30, 5)
    r = int(window.times[-1]) + 1
    logits = []
    for kind in (2, 3):
        after = History(
            np.concatenate([window.kinds, np.array([1, 1, kind, kind], np.uint8)]),
            np.concatenate([window.items, np.array([7, 8, 7, 8], np.uint64)]),
            np.concatenate([window.times, np.array([r, r + 5, r + 6, r + 7])]),
            np.concatenate([window.requests, np.array([999, 999, 0, 0], np.uint64)]),
        )
        logits.append(made.rank(transduced(made, after)[30:32]))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_sequence_is_the_same_in_any_batch() -> None:
    made = model()
    histories = [random_history(n, n) for n in (33, 1, 5, 60, 34)]
    alone = [transduced(made, h) for h in histories]
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        together = transduced(made, *(histories[i] for i in order))
        torch.testing.assert_close(together, torch.cat([alone[i] for i in order]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_candidates_are_blind_to_each_other_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made, history = model(), random_history(20, 1)
    at = int(history.times[-1]) + 50
    whole = score(made, history, at, vectors(history), ITEMS)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(score(made, history, at, vectors(history), ITEMS[shuffled]), whole[shuffled])
    monkeypatch.setattr(hstu, "PAIRS_A_PASS", 7 * SETTINGS.heads * len(history))
    torch.testing.assert_close(score(made, history, at, vectors(history), ITEMS), whole)


@torch.no_grad()
def test_a_user_without_history_is_answered() -> None:
    made, nobody = model(), cut(random_history(1, 0), 0)
    none = torch.zeros(0, SETTINGS.dim)
    logits = score(made, nobody, 1_000, none, ITEMS[:3])
    assert logits.shape == (3, ACTIONS) and torch.isfinite(logits).all()
    start = made.queries(torch.zeros(0, SETTINGS.dim), torch.tensor([-1]))[0]
    assert torch.equal(query(made, nobody, 1_000, none), start)
    assert float(start.norm()) == pytest.approx(1)
    assert score(made, nobody, 1_000, none, none).shape == (0, ACTIONS)
    assert made.transduce(tokenize([]), none).shape == (0, SETTINGS.dim)


def test_a_history_that_reaches_the_request_is_refused() -> None:
    history = random_history(5, 0)
    with pytest.raises(ValueError, match="it would leak"):
        score(model(), history, int(history.times[-1]), vectors(history), ITEMS[:2])


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = Recommender(SETTINGS, ["click", "like"], 5)
    torch.manual_seed(2)
    again, other = Recommender(SETTINGS, ["click", "like"], 5), Recommender(SETTINGS, ["click", "like"], 6)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_learning_is_repeatable_to_the_bit_and_learns() -> None:
    def learned() -> tuple[list[float], list[Tensor]]:
        made = Recommender(SETTINGS, ["click", "like"], 1)
        optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
        history = random_history(60, 2)
        items = torch.from_numpy(np.flatnonzero(history.kinds == IMPRESSION))
        labels = torch.stack([items % 2, (items % 3 == 0).long()], 1).float()
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            logits = made.rank(transduced(made, history)[items])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        return losses, [p.detach() for p in made.parameters()]

    losses, weights = learned()
    again, same = learned()
    assert losses == again and all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert losses[-1] < losses[0] * 0.9
