import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from streamgr.events import FIRST_ACTION, IMPRESSION
from streamgr.model.tokens import Layout
from streamgr.sequence.examples import Example
from streamgr.train.batch import assemble
from streamgr.train.learner import Learner
from streamgr.train.stochastic import shorten
from tests.train.kit import example, settings

LONGEST = 256


def long_example(n: int, seed: int = 0) -> Example:
    """n rows of slates of four and clicks; the last two slates' impressions are targets, but for one of each."""
    rng = np.random.default_rng(seed)
    events = []
    for k in range(n):
        kind = IMPRESSION if k % 5 < 4 else FIRST_ACTION
        events.append((kind, f"i{rng.integers(30)}", 1000 + 10 * k, k // 5 + 1 if kind == IMPRESSION else 0))
    targets = [k for k in range(n - 10, n) if k % 5 in (1, 2, 3)]
    return example((1, 0), events=events, targets=targets, labels=[k % 2 for k in range(len(targets))])


def test_short_histories_and_alpha_two_are_learned_whole() -> None:
    rng = np.random.default_rng(1)
    whole = long_example(100)
    assert shorten(whole, 2.0, LONGEST, rng) is whole
    few = long_example(30)
    assert int(LONGEST**0.8) == 84 and shorten(few, 1.6, LONGEST, rng) is few


def test_a_long_history_is_learned_from_about_its_root() -> None:
    rng, whole = np.random.default_rng(2), long_example(LONGEST)
    made = [shorten(whole, 1.6, LONGEST, rng) for _ in range(400)]
    kept = [m for m in made if m is whole]
    assert 0.05 < len(kept) / 400 < 0.2  # N^1.6 / N^2 = .109
    for short in (m for m in made if m is not whole):
        assert len(short.history) == 84
        assert short.history.items[short.target_index].tolist() == whole.history.items[whole.target_index].tolist()
        assert short.history.times[short.target_index].tolist() == whole.history.times[whole.target_index].tolist()
        assert (np.diff(short.history.times) > 0).all() and set(short.history.times) <= set(whole.history.times)


def test_the_request_of_a_target_keeps_its_time_and_the_draw_prefers_the_new() -> None:
    rng, whole = np.random.default_rng(3), long_example(LONGEST)
    layout, before = Layout(2), assemble([whole], Layout(2))
    asked = before.tokens.query_times[before.targets.token]
    drawn = np.zeros(LONGEST)
    for _ in range(300):
        short = shorten(whole, 1.6, LONGEST, rng)
        batch = assemble([short], layout)
        assert batch.tokens.query_times[batch.targets.token].tolist() == asked.tolist()
        drawn[(short.history.times - 1000) // 10] += 1
    assert drawn[: LONGEST // 3].sum() < drawn[LONGEST // 3 : 2 * LONGEST // 3].sum()


@pytest.mark.parametrize("tokens", ["interleaved", "summed"])
def test_what_is_judged_is_the_whole_and_what_is_learned_is_not(tmp_path: Path, tokens: str) -> None:
    def learner(alpha: float) -> Learner:
        plain = settings(tmp_path, stochastic_length=alpha)
        sequence = msgspec.structs.replace(plain.sequence, history_length=LONGEST)
        model = msgspec.structs.replace(plain.model, tokens=tokens)
        return Learner(msgspec.structs.replace(plain, sequence=sequence, model=model))

    whole, short = learner(2.0), learner(1.5)
    batch = assemble([long_example(LONGEST, seed) for seed in range(3)], whole.model.layout)
    one, other = whole.learn(batch), short.learn(batch)
    np.testing.assert_allclose(one[0].probabilities, other[0].probabilities, atol=1e-6)
    assert one[1] == other[1] == ""
    assert not torch.equal(whole.model.stack.layers[0].uvqk, short.model.stack.layers[0].uvqk)
    again = learner(1.5)
    again.learn(batch)
    for (name, value), mine in zip(short.state().items(), again.state().values(), strict=True):
        assert torch.equal(value, mine), name
    assert dataclasses.asdict(one[0])["live"] == other[0].live
