"""The frozen model: the real served weights, asked as a scorer would ask them, whatever comes after."""

import numpy as np
import pytest
import torch

from streamgr.events import FIRST_ACTION, IMPRESSION, History, item_key
from streamgr.lab.observer import FrozenModel
from streamgr.serve.model import LiveWeights
from tests.serve.kit import ACTIONS, NOW, Weights, log_and_clock, settings
from tests.train.kit import example

ITEMS = [f"i{n}" for n in range(12)]
CLICK = FIRST_ACTION
EVENTS = [
    (IMPRESSION, "i1", NOW - 9000, 1),
    (IMPRESSION, "i2", NOW - 9000, 1),
    (CLICK, "i2", NOW - 8500, 1),
    (IMPRESSION, "i3", NOW - 5000, 2),
    (IMPRESSION, "never admitted", NOW - 5000, 2),
    (CLICK, "i3", NOW - 4500, 2),
]


@pytest.fixture
def live() -> LiveWeights:
    log, clock = log_and_clock()
    live = LiveWeights(ACTIONS, clock, log)
    weights = Weights(settings())
    weights.learn(ITEMS)
    assert live.install(weights.publish())
    return live


def test_it_answers_as_the_scorer_would_at_the_time_of_the_request(live: LiveWeights) -> None:
    one = example((5, 0), events=EVENTS[:5], targets=[3, 4], labels=[1, 1])
    with live.lease() as served:
        answers = FrozenModel(served).answer([one])
        seen = History(*(column[:3] for column in _columns(one.history)))
        recommender = served.copy.recommender
        with torch.inference_mode():
            tokens = recommender.tokens(seen, NOW - 5000, 0)
            known, _ = served.vectors(seen.items)
            asked, cold = served.vectors(one.history.items[3:5])
            cache = recommender.prefill(tokens, NOW - 5000, known)
            p = torch.sigmoid(recommender.score(cache, asked)).numpy()
            query = recommender.retrieval_query(cache)
            weight = served.copy.table.weight[served.rows]
            similar = (torch.nn.functional.normalize(weight, dim=1) @ query).numpy()
    assert cold.tolist() == [False, True]
    for event, expected in zip(one.target_events, p, strict=True):
        given = answers[event].p
        assert given is not None
        np.testing.assert_allclose([given[action] for action in ACTIONS], expected, atol=1e-5)
    place = served.keys.tolist().index(item_key("i3"))
    assert answers[one.target_events[0]].rank == 1 + int((similar > similar[place]).sum())
    assert answers[one.target_events[1]].rank == -1, "an item that these weights never knew is missed"


def test_a_target_without_engagement_is_not_searched_for(live: LiveWeights) -> None:
    one = example((5, 0), events=EVENTS[:5], targets=[3], labels=[0])
    organic = example((6, 0), events=EVENTS, targets=[5], labels=[0])
    with live.lease() as served:
        answers = FrozenModel(served).answer([one, organic])
    assert answers[one.target_events[0]].rank is None and answers[one.target_events[0]].p is not None
    assert answers[organic.target_events[0]].rank is not None and answers[organic.target_events[0]].p is None


def _columns(history: History) -> tuple[np.ndarray, ...]:  # type: ignore[type-arg]
    return history.kinds, history.items, history.times, history.requests
