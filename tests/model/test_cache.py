"""However a history comes to be known, the answers are those of one pass over all of it."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgr import config
from streamgr.events import IMPRESSION, PROFILE, History
from streamgr.model import hstu, recommender
from streamgr.model.cache import Cache
from streamgr.model.recommender import Recommender
from streamgr.model.tokens import tokenize

from .histories import cut, random_history

DIM, USER = 16, 7
IDS = torch.randn(64, DIM, generator=torch.Generator().manual_seed(3))
SHAPES = {
    "paper": {},
    "dlrm_v3": {"preset": "dlrm_v3"},
    "paper, semi-local": {"local_window": 9, "global_prefix": 3},
    "dlrm_v3, semi-local": {"preset": "dlrm_v3", "local_window": 5},
    "paper, user": {"user_token": True},
    "dlrm_v3, semi-local, user": {"preset": "dlrm_v3", "local_window": 9, "global_prefix": 2, "user_token": True},
    "summed": {"tokens": "summed"},
    "dlrm_v3, summed, user": {"preset": "dlrm_v3", "tokens": "summed", "user_token": True},
}
WINDOW_MS = 120
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def model(shape: str, seed: int = 1) -> Recommender:
    """Weights and biases of a size at which a fault shows above the tolerance, and outputs of order 1."""
    settings = config.Model(
        dim=DIM, heads=2, layers=2, position_buckets=32, time_buckets=64, scaling_seqlen=32, **SHAPES[shape]
    )
    made = Recommender(settings, ["click", "like"], seed, WINDOW_MS)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.3)
    return made.eval()


MODELS = {shape: model(shape) for shape in SHAPES}


def history(n: int, seed: int) -> History:
    """With rows of the user's profile in it."""
    made = random_history(n, seed, span_ms=30 * n)
    kinds = made.kinds.copy()
    kinds[np.random.default_rng(seed).random(n) < 0.1] = PROFILE
    return History(kinds, made.items, made.times, np.where(kinds == IMPRESSION, made.requests, 0))


def vectors(keys: np.ndarray) -> Tensor:
    return IDS[torch.from_numpy((keys % 64).astype(np.int64))]


def prefilled(made: Recommender, window: History, at: int) -> Cache:
    tokens = made.tokens(window, at, USER)
    return made.prefill(tokens, at, vectors(tokens.keys))


def extended(made: Recommender, cache: Cache, window: History, at: int, *, reuse: int | None = None) -> Cache:
    tokens = made.tokens(window, at, USER)
    start = cache.reusable(tokens) if reuse is None else reuse
    return made.extend(cache, tokens, at, vectors(tokens.keys[start:]))


def assert_same(made: Recommender, found: Cache, expected: Cache) -> None:
    """All that is kept, and all that is asked of it."""
    torch.testing.assert_close(made.score(found, IDS), made.score(expected, IDS), **TOLERANCE)
    torch.testing.assert_close(made.retrieval_query(found), made.retrieval_query(expected), **TOLERANCE)
    for a, b in zip(found.kept, expected.kept, strict=True):
        torch.testing.assert_close(a.keys, b.keys, **TOLERANCE)
        torch.testing.assert_close(a.values, b.values, **TOLERANCE)
    for field in fields(found.tokens):
        assert np.array_equal(getattr(found.tokens, field.name), getattr(expected.tokens, field.name))


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_candidate_is_what_an_impression_would_be_in_one_uncached_pass(shape: str) -> None:
    """The plain twin: the history with the candidate as its last impression, transduced whole."""
    made = MODELS[shape]
    for seed in range(3):
        window = history(40, seed)
        at = int(window.times[-1]) + 1 + 977 * seed
        scores = made.score(prefilled(made, window, at), IDS[:5])
        for candidate in range(5):
            asked = History(
                np.append(window.kinds, np.uint8(IMPRESSION)),
                np.append(window.items, np.uint64(candidate)),
                np.append(window.times, at),
                np.append(window.requests, np.uint64(10**9)),
            )
            tokens = tokenize([asked], made.layout, targets=[np.array([40])], users=[USER])
            hidden = made.transduce(tokens, vectors(tokens.keys))[torch.from_numpy(tokens.targets)]
            torch.testing.assert_close(scores[candidate], made.rank(hidden)[0], **TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_history_extended_at_any_point_is_the_history_prefilled(shape: str) -> None:
    made = MODELS[shape]
    window = history(24, 1)
    at = int(window.times[-1]) + 60_000
    whole = prefilled(made, window, at)
    for n in range(25):
        began = cut(window, n)
        then = int(began.times[-1]) + 1 if n else 5
        assert_same(made, extended(made, prefilled(made, began, then), window, at), whole)


@torch.inference_mode()
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(SHAPES)), st.integers(1, 60), st.integers(0, 10**6), st.data())
def test_a_history_grown_step_by_step_is_the_history_prefilled(
    shape: str, n: int, seed: int, data: st.DataObject
) -> None:
    """Any steps, any `at` on the way, any part of the kept rows thrown away, rows appended in parts."""
    made, window = MODELS[shape], history(n, seed)
    cache = prefilled(made, cut(window, 0), 1)
    m = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recommender, "PAIRS_A_VIEW", data.draw(st.sampled_from([1, 150, 1 << 20])))
        while m < n:
            m = data.draw(st.integers(m + 1, n))
            known = cut(window, m)
            at = (int(known.times[-1]) if m else 0) + data.draw(st.integers(1, 10**8))
            tokens = made.tokens(known, at, USER)
            kept = data.draw(st.integers(0, cache.reusable(tokens)))
            cache = extended(made, cache, known, at, reuse=kept)
            assert_same(made, cache, prefilled(made, known, at))


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_another_time_moves_no_row_but_the_last(shape: str) -> None:
    """What was asked at one time answers at any other one, earlier ones included."""
    made, moved = MODELS[shape], 0
    for seed in range(4):
        window = history(30, seed)
        end = int(window.times[-1])
        cache = prefilled(made, window, end + 1)
        for at in (end + 2, end + 10**9, end + 3_000, end + 1):
            tokens = made.tokens(window, at, USER)
            both = min(len(tokens), len(cache.tokens))  # summed, time alone makes outcomes known, and tokens of them
            assert cache.reusable(tokens) >= both - (not made.layout.window_ms)
            cache = extended(made, cache, window, at)
            assert_same(made, cache, prefilled(made, window, at))
        early = made.score(prefilled(made, window, end + 1), IDS)
        moved += not torch.allclose(early, made.score(prefilled(made, window, end + 10**9), IDS), atol=1e-3)
    assert moved, "no answer depends on when it is asked for: the test says nothing"


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_what_changes_in_the_past_is_computed_again_from_there_on(shape: str) -> None:
    """An event that came late, one that went, one that is another item, a window that slid, an earlier time."""
    made = MODELS[shape]
    for seed in range(2):
        window, r = history(30, seed), np.random.default_rng(seed)
        at = int(window.times[-1]) + 500
        cache = prefilled(made, window, at)
        i = int(r.integers(1, 29))
        rows = np.arange(30)
        late = window.take(np.insert(rows, i, i))
        late.items[i] = 63
        other = window.take(rows)
        other.items[i] = 63
        earlier = cut(window, i)
        for changed, when in (
            (late, at),
            (window.take(np.delete(rows, i)), at),
            (other, at),
            (window.take(rows[5:]), at),
            (earlier, int(earlier.times[-1]) + 1),
            (cut(window, 0), at),
        ):
            tokens = made.tokens(changed, when, USER)
            if not made.layout.window_ms:  # summed, a row is not the token of the same place
                assert cache.reusable(tokens) <= i + made.settings.user_token
            assert_same(made, extended(made, cache, changed, when), prefilled(made, changed, when))


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_candidates_know_nothing_of_each_other(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any order, duplicates, and micro-batches of any size."""
    made, window = MODELS[shape], history(40, 4)
    cache = prefilled(made, window, int(window.times[-1]) + 50)
    alone = torch.cat([made.score(cache, IDS[i : i + 1]) for i in range(64)])
    chosen = torch.randint(0, 64, (200,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made.score(cache, IDS[chosen]), alone[chosen], **TOLERANCE)
    for pairs in (1, 80, 700, 3_000, 1 << 30):
        monkeypatch.setattr(hstu, "PAIRS_A_PASS", pairs)
        torch.testing.assert_close(made.score(cache, IDS[chosen]), alone[chosen], **TOLERANCE)
    assert float(alone.std()) > 0.1, "candidates score alike: the test says nothing"


@torch.inference_mode()
def test_a_request_that_goes_on_after_it_was_kept_stays_blind_to_itself() -> None:
    """Items of one request, shown one by one: none sees the others, nor what came of them, cached or not."""
    made = MODELS["paper"]
    window = history(20, 8)
    r = int(window.times[-1]) + 10
    shown = History(
        np.concatenate([window.kinds, np.array([1, 2, 1, 3, 1], np.uint8)]),
        np.concatenate([window.items, np.array([5, 5, 6, 6, 7], np.uint64)]),
        np.concatenate([window.times, r + np.array([0, 5, 10, 15, 20])]),
        np.concatenate([window.requests, np.array([900, 0, 900, 0, 900], np.uint64)]),
    )
    cache = prefilled(made, cut(shown, 21), r + 1)
    for n in range(22, 26):
        at = int(shown.times[n - 1]) + 1
        cache = extended(made, cache, cut(shown, n), at)
        assert_same(made, cache, prefilled(made, cut(shown, n), at))
    assert cache.tokens.visible[[20, 22, 24]].tolist() == [20, 20, 20]


@torch.inference_mode()
def test_the_hidden_state_of_an_action_that_was_not_the_last_is_found_again() -> None:
    made = MODELS["paper"]
    kinds = np.array([2, 1, 1, 2, 1], np.uint8)
    window = History(kinds, np.arange(1, 6, dtype=np.uint64), np.arange(5) * 100 + 1_000, np.zeros(5, np.uint64))
    cache = prefilled(made, window, 2_000)
    for n in (4, 3, 2, 1):
        before = cut(window, n)
        at = int(before.times[-1]) + 1
        assert_same(made, extended(made, cache, before, at), prefilled(made, before, at))


@torch.inference_mode()
def test_a_cache_is_a_value() -> None:
    """Extending it twice, each way, leaves it as it was."""
    made, window = MODELS["paper"], history(30, 3)
    at = int(window.times[-1]) + 1
    began = prefilled(made, cut(window, 20), int(window.times[19]) + 1)
    before = [(seen.keys.clone(), seen.values.clone()) for seen in began.kept]
    once, again = extended(made, began, window, at), extended(made, began, window, at)
    made.score(once, IDS)
    for (keys, values), seen in zip(before, began.kept, strict=True):
        assert torch.equal(keys, seen.keys) and torch.equal(values, seen.values)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(once.kept, again.kept, strict=True))
    assert once.nbytes > began.nbytes > 20 * DIM * 4 * 2 * 2


def test_more_rows_than_are_known_cannot_be_taken() -> None:
    made, window = MODELS["paper"], history(12, 3)
    at = int(window.times[-1]) + 1
    cache = prefilled(made, cut(window, 6), at)
    with pytest.raises(ValueError, match="the cache holds for the first"):
        extended(made, cache, window, at, reuse=8)
