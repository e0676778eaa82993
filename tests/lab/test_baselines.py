"""The baselines against what they promise, worked out by hand."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgr.lab.baselines import Catalogue, Target
from streamgr.lab.baselines.popularity import SHRINK, Popularity
from streamgr.lab.baselines.recency import Recency

DAY = 86_400_000


def acted(user: str, item: str, time_ms: int) -> Target:
    return Target(user, item, time_ms, shown=False, labels=frozenset())


def shown(item: str, time_ms: int, *labels: str, user: str = "u") -> Target:
    return Target(user, item, time_ms, shown=True, labels=frozenset(labels))


def test_the_catalogue_ranks_with_ties_against_and_grows() -> None:
    catalogue = Catalogue(-math.inf)
    assert catalogue.rank("a") == -1
    for n in range(600):
        catalogue.put(str(n), n // 2)
    assert (catalogue.rank("599"), catalogue.rank("598"), catalogue.rank("0")) == (2, 2, 600)
    catalogue.put("0", 1e9)
    assert (catalogue.rank("0"), len(catalogue)) == (1, 600)


def test_popularity_counts_positives_that_fade() -> None:
    popularity = Popularity(["click"], half_life_seconds=86_400)
    for item, time in (("old", 0), ("old", 0), ("old", 0), ("new", 2 * DAY)):
        popularity.learn(acted("u", item, time))
    # three of two half-lives ago count 0.75 now: fewer than one
    assert popularity.rank(acted("u", "new", 2 * DAY)) == 1
    assert popularity.rank(acted("u", "old", 2 * DAY)) == 2
    popularity.learn(acted("u", "old", 2 * DAY))
    assert popularity.rank(acted("u", "old", 2 * DAY)) == 1
    assert popularity.rank(acted("u", "never", 2 * DAY)) == -1


def test_popularity_knows_items_that_nobody_wanted_but_ranks_them_last() -> None:
    popularity = Popularity(["click"])
    popularity.learn(shown("dull", 0))
    popularity.learn(shown("good", 0, "click"))
    assert (popularity.rank(shown("good", 1)), popularity.rank(shown("dull", 1))) == (1, 2)


def test_popularity_shrinks_an_items_rate_to_the_base_rate() -> None:
    popularity = Popularity(["click", "like"], half_life_seconds=86_400)
    assert popularity.probabilities(shown("a", 0)) == {"click": 0.5, "like": 0.5}
    for _ in range(2000):
        popularity.learn(shown("b", 0))
        popularity.learn(shown("c", 0, "click"))
    p = popularity.probabilities(shown("a", 0))
    assert p is not None
    assert p["click"] == pytest.approx(0.5, abs=0.01)
    assert p["like"] == pytest.approx(0.0, abs=0.05)
    popularity.learn(shown("a", 0, "click"))
    once = popularity.probabilities(shown("a", 0))
    faded = popularity.probabilities(shown("a", DAY))
    assert once is not None and faded is not None
    assert once["click"] == pytest.approx((1 + SHRINK * p["click"]) / (1 + SHRINK), abs=1e-3)
    assert faded["click"] == pytest.approx((0.5 + SHRINK * p["click"]) / (0.5 + SHRINK), abs=1e-3)
    assert popularity.probabilities(acted("u", "a", 0)) is None


def test_recency_puts_own_items_first() -> None:
    recency = Recency(own_items=2)
    for user, item, time in (("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("v", "d", 9), ("v", "e", 2)):
        recency.learn(acted(user, item, time))
    # u: own c, b (a has left the list), then the others by their last action: d at 9, e at 2, a at 1
    assert [recency.rank(acted("u", item, 10)) for item in "cbdea"] == [1, 2, 3, 4, 5]
    # a stranger: d c, then b and e at the same time (ties count against), a
    assert [recency.rank(acted("w", item, 10)) for item in "dcbea"] == [1, 2, 4, 4, 5]
    assert recency.rank(acted("u", "never", 10)) == -1


def test_recency_learns_of_an_impression_only_what_was_wanted() -> None:
    recency = Recency()
    recency.learn(shown("wanted", 1, "click"))
    recency.learn(shown("ignored", 2))
    assert (recency.rank(shown("wanted", 3)), recency.rank(shown("ignored", 3))) == (1, 2)
    assert recency.probabilities(shown("wanted", 3)) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("uv"), st.sampled_from("abcdef")), max_size=25), st.sampled_from("uv"))
def test_recency_ranks_are_a_permutation_and_popularity_orders_by_count(rows: list[tuple[str, str]], user: str) -> None:
    recency, popularity = Recency(own_items=3), Popularity(["click"], half_life_seconds=1e9)
    for time, (who, item) in enumerate(rows):
        recency.learn(acted(who, item, time))
        popularity.learn(acted(who, item, 0))
    counts = Counter(item for _, item in rows)
    assert sorted(recency.rank(acted(user, item, 99)) for item in counts) == list(range(1, len(counts) + 1))
    for item, count in counts.items():
        assert popularity.rank(acted(user, item, 0)) == sum(other >= count for other in counts.values())
