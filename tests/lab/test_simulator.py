"""The simulated world: seeded, honest, and such that there is something to learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgr.config import Feed
from streamgr.lab.simulator import Shown, World

START = 1_700_000_000_000


def _visits(world: World, seconds: float, every_ms: int = 40) -> list[tuple[int, str, list[Shown]]]:
    visits = []
    for now in range(START, START + round(seconds * 1000), every_ms):
        world.advance(now)
        user = world.visitor()
        visits.append((now, user, world.show(user, world.slate(world.candidates(40), 1.0), now)))
    return visits


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_world(seed: int) -> None:
    feed = Feed(users=20, live_items=30, seed=seed)
    assert _visits(World(feed, START), 5) == _visits(World(feed, START), 5)


def test_another_seed_gives_another_world() -> None:
    assert _visits(World(Feed(seed=1), START), 2) != _visits(World(Feed(seed=2), START), 2)


def test_items_live_as_long_as_they_should_and_make_room_for_others() -> None:
    feed = Feed(live_items=50, item_life_seconds=(20.0, 60.0))
    world, seen = World(feed, START), {}
    for now in range(START, START + 130_000, 100):
        world.advance(now)
        assert len(world.live()) == 50
        seen |= {item: world.item(item) for item in world.live()}
        assert all(world.item(item).dies_ms > now for item in world.live())
    lives = [(item.dies_ms - item.born_ms) / 1000 for item in seen.values()]
    assert min(lives) >= 19.9 and max(lives) <= 60.0 and max(lives) - min(lives) > 30
    assert world.born == len(seen) > 50 + 100, "a generation dies within a minute"


def test_clicks_come_as_often_as_the_oracle_says() -> None:
    """Calibration: over groups of similar probability, what happens is what was foretold."""
    shown = [one for _, _, slate in _visits(World(Feed(users=80), START), 120) for one in slate]
    for kind in ("click", "like"):
        p = np.array([one.p[kind] for one in shown])
        y = np.array([any(k == kind for k, _ in one.actions) for one in shown])
        for group in np.array_split(np.argsort(p), 5):
            sigma = math.sqrt(float((p[group] * (1 - p[group])).sum()))
            assert abs(float(y[group].sum() - p[group].sum())) < 4.5 * sigma


def test_actions_come_in_order_and_within_the_limit() -> None:
    feed = Feed(act_within_seconds=1.2)
    acted = [(now, one) for now, _, slate in _visits(World(feed, START), 60) for one in slate if one.actions]
    assert any(len(one.actions) == 2 for _, one in acted)
    for now, one in acted:
        kinds, times = zip(*one.actions, strict=True)
        assert kinds in (("click",), ("click", "like"))
        assert now < times[0] <= times[-1] < now + 1200
        assert list(times) == sorted(times)


def test_later_places_are_clicked_less() -> None:
    world = World(Feed(users=1, live_items=1, slate=1, item_life_seconds=(1e6, 1e6)), START)
    item = world.live()
    places = world.show("u0", item * 10, START)
    assert [one.position for one in places] == list(range(10))
    untouched = [one.p["click"] for one in places if one.p["click"] <= places[0].p["click"]]
    assert untouched[-1] < untouched[0]


def test_users_and_items_differ_enough_to_be_worth_learning() -> None:
    """Items explain a good part, so frozen weights go stale; users another, so popularity cannot win."""
    visits = _visits(World(Feed(users=80), START), 40)
    p = np.array([one.p["click"] for _, _, slate in visits for one in slate])
    users = np.array([user for _, user, slate in visits for _ in slate])
    items = np.array([one.item_id for _, _, slate in visits for one in slate])

    def explained(by: np.ndarray) -> float:  # type: ignore[type-arg]
        means = {key: float(p[by == key].mean()) for key in set(by.tolist())}
        return float(np.var([means[key] for key in by.tolist()]) / np.var(p))

    assert explained(items) > 0.2 and explained(users) > 0.2
    assert explained(items) < 0.6, "popularity alone must not do"


@pytest.mark.parametrize("explore", [0.0, 1.0])
def test_a_slate_is_the_head_of_the_ranking_unless_it_explores(explore: float) -> None:
    world = World(Feed(slate=10), START)
    ranking = world.candidates(40)
    slate = world.slate(ranking, explore)
    assert len(set(slate)) == 10 and set(slate) <= set(ranking)
    assert (slate == ranking[:10]) == (explore == 0.0)


def test_a_short_ranking_gives_a_short_slate() -> None:
    assert len(World(Feed(slate=10, live_items=3), START).slate(["i0", "i1", "i2"], 0.5)) == 3
