"""The benchmarks measure what they say: every mapping maps, and our contestant is the product to the bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from streamgr import config
from streamgr.clock import milliseconds
from streamgr.train.learner import Learner
from tests.bench import candidates
from tests.bench.churn import Stream, prepare
from tests.bench.contestants import ENTRANTS, Recent, entrant
from tests.bench.mappings import Dict, LinearProbe, Ours, SortedSearch
from tests.bench.table import ids

TTL = 3.0


@pytest.fixture(scope="module")
def stream() -> Stream:
    return prepare("simulator", Path(), seed=1, batch_tokens=256, seconds=5.0)


def settings_for(stream: Stream) -> config.Config:
    return config.Config(
        sequence=config.Sequence(actions=stream.actions),
        model=config.Model(dim=8, layers=1, negatives=16),
        table=config.Table(slots=64, fallback_rows=8, ttl_seconds=TTL),
    )


@pytest.mark.parametrize("make", [lambda n: Ours(n, 16), Dict, SortedSearch, LinearProbe])
def test_every_mapping_maps(make) -> None:
    mapping, known = make(1024), ids(0, 700)
    first = mapping.map(np.concatenate([known, known[:50]]))
    assert len(set(first[:700].tolist())) == 700
    assert np.array_equal(first[700:], first[:50])
    saved = mapping.save()
    assert np.array_equal(mapping.find(known), first[:700])
    assert mapping.find(ids(5000, 1))[0] == -1
    mapping.map(ids(5000, 20))
    mapping.restore(saved)
    assert (mapping.find(ids(5000, 20)) == -1).all()
    assert np.array_equal(mapping.map(known), first[:700])


def test_our_contestant_is_the_product(stream: Stream) -> None:
    """Judging it on a second catalogue and taking negatives by two rows changes nothing."""
    settings = settings_for(stream)
    contestant = entrant("streamgr", settings, Recent(stream.vocabulary, milliseconds(TTL)))
    product = Learner(settings)
    for batch in stream.batches[:12]:
        ours, theirs = contestant.learn(batch)[0], product.learn(batch)[0]
        assert np.array_equal(ours.probabilities, theirs.probabilities, equal_nan=True)
        assert np.array_equal(ours.rank, theirs.rank)
    assert torch.equal(contestant.table.weight, product.table.weight)
    assert product.table.stats().evictions > 0


@pytest.mark.parametrize("name", ENTRANTS)
def test_everybody_learns(stream: Stream, name: str) -> None:
    contestant = entrant(name, settings_for(stream), Recent(stream.vocabulary, milliseconds(TTL)))
    before = contestant.table.weight.clone()
    for batch in stream.batches[:2]:
        own = contestant.has_own(batch.targets.keys)
        predictions, why_not = contestant.learn(batch)
        assert not why_not
        found = batch.targets.retrieved
        assert own.shape == contestant.common.shape == batch.targets.keys.shape
        assert (predictions.rank[found] != 0).all() and (contestant.common[found] != 0).all()
    assert not torch.equal(before, contestant.table.weight)


def test_a_static_table_fills_once(stream: Stream) -> None:
    settings = settings_for(stream)
    contestant = entrant("static + oov", settings, Recent(stream.vocabulary, milliseconds(TTL)))
    for batch in stream.batches:
        contestant.learn(batch)
    rows = contestant.table.rows(stream.vocabulary)[0]
    own = rows[rows > 1]
    assert len(stream.vocabulary) > len(own) == settings.table.slots + settings.table.fallback_rows - 1
    assert len(set(own.tolist())) == len(own) and own.max() == len(contestant.table.weight) - 1


@torch.inference_mode()
@pytest.mark.parametrize("preset", ["paper", "dlrm_v3"])
def test_the_ways_to_score_candidates_are_one_function(preset: str) -> None:
    bench = candidates.Bench(candidates.served(preset), candidates.some_history(64))
    candidates.check(bench)
    assert bench.cache.reusable(bench.model.tokens(bench.history, candidates.NOW + 5, candidates.USER)) == 63
