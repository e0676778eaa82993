import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamgr.events import IMPRESSION, PROFILE, History
from streamgr.model.table import FEATURE, ITEM, USER
from streamgr.model.tokens import Layout, request_times, tokenize, visible

from .histories import ACTIONS, random_history

PLAIN = Layout(ACTIONS)


def history(*events: tuple[int, int, int]) -> History:
    """Events as (kind, time, request)."""
    kinds, times, requests = zip(*events, strict=True) if events else ((), (), ())
    return History(
        np.array(kinds, np.uint8),
        np.arange(len(kinds), dtype=np.uint64),
        np.array(times, np.int64),
        np.array(requests, np.uint64),
    )


def plain(h: History) -> tuple[list[int], list[int]]:
    """The rules of the module docstring, one token at a time: request times, visible counts."""
    times, seen = [], []
    for i in range(len(h)):
        r = int(h.times[i])
        if h.kinds[i] == IMPRESSION and h.requests[i]:
            same = (h.kinds == IMPRESSION) & (h.requests == h.requests[i])
            r = int(h.times[same].min())
        times.append(r)
        seen.append(int(np.searchsorted(h.times, r, "left")) if h.kinds[i] == IMPRESSION else i)
    return times, seen


def test_items_of_a_request_see_neither_each_other_nor_what_came_of_them() -> None:
    h = history((1, 10, 0), (2, 20, 0), (1, 30, 7), (2, 31, 7), (1, 32, 7), (1, 40, 0))
    assert visible(h).tolist() == [0, 1, 2, 3, 2, 5]
    assert request_times(h).tolist() == [10, 20, 30, 31, 30, 40]


def test_an_impression_does_not_see_an_action_of_the_same_millisecond() -> None:
    assert visible(history((1, 10, 0), (1, 20, 0), (2, 20, 0))).tolist() == [0, 1, 2]
    assert visible(history((2, 10, 0), (2, 20, 0), (1, 20, 0))).tolist() == [0, 1, 1]


def test_an_action_asks_at_the_time_of_the_next_token_and_the_last_one_at_its_own_or_at() -> None:
    h = history((2, 10, 0), (2, 20, 0), (1, 30, 5), (1, 33, 5), (2, 40, 0))
    assert tokenize([h], PLAIN).query_times.tolist() == [20, 30, 30, 30, 40]
    assert tokenize([h], PLAIN, at=[99]).query_times.tolist() == [20, 30, 30, 30, 99]


def test_at_does_not_move_a_last_impression() -> None:
    assert tokenize([history((1, 10, 3), (1, 12, 3))], PLAIN, at=[99]).query_times.tolist() == [10, 10]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10_000)), min_size=1, max_size=5))
def test_a_batch_is_the_plain_rule_on_each_of_its_histories(shapes: list[tuple[int, int]]) -> None:
    histories = [random_history(n, seed, span_ms=200) for n, seed in shapes]
    tokens = tokenize(histories, PLAIN)
    assert tokens.offsets.tolist() == np.cumsum([0, *(len(h) for h in histories)]).tolist()
    for h, start in zip(histories, tokens.offsets, strict=False):
        mine = slice(int(start), int(start) + len(h))
        r, seen = plain(h)
        items = h.kinds == IMPRESSION
        assert tokens.visible[mine].tolist() == seen
        assert tokens.query_times[mine][items].tolist() == np.array(r, np.int64)[items].tolist()
        following = np.append(h.times[1:], h.times[-1:])
        assert tokens.query_times[mine][~items].tolist() == following[~items].tolist()
        assert request_times(h).tolist() == r
        for column, wanted in (
            (tokens.keys, h.items),
            (tokens.marks, 1 << h.kinds.astype(np.int64)),
            (tokens.times, h.times),
        ):
            both: tuple[NDArray[np.generic], NDArray[np.generic]] = (column[mine], wanted)
            assert np.array_equal(*both)


def test_the_first_token_a_target_does_not_see_stands_at_its_request_time() -> None:
    """Why serving with `at = r` and training agree on the query time of the last visible action."""
    for seed in range(50):
        h = random_history(40, seed, span_ms=300)
        first = visible(h)[h.kinds == IMPRESSION]
        assert np.array_equal(h.times[first], request_times(h)[h.kinds == IMPRESSION])


def test_nothing_gives_an_empty_batch() -> None:
    assert len(tokenize([], PLAIN)) == 0
    assert tokenize([history(), history()], PLAIN).offsets.tolist() == [0, 0, 0]


def test_a_feature_is_a_token_of_its_own_field_that_items_of_its_moment_do_not_see() -> None:
    h = history((PROFILE, 10, 0), (1, 20, 0), (PROFILE, 30, 0), (1, 30, 0), (2, 30, 0))
    tokens = tokenize([h], PLAIN)
    assert tokens.fields.tolist() == [FEATURE, ITEM, FEATURE, ITEM, ITEM]
    assert tokens.visible.tolist() == [0, 1, 2, 2, 4]
    assert tokens.query_times.tolist() == [20, 20, 30, 30, 30]
    assert tokens.provisional.tolist() == [True, False, True, False, True]


def test_the_user_comes_first_and_is_seen_by_all() -> None:
    histories = [history((1, 10, 0), (2, 20, 0), (1, 30, 0)), history(), history((2, 5, 0))]
    plain = tokenize(histories, PLAIN, targets=[np.array([0, 2]), np.array([], int), np.array([0])])
    layout = Layout(ACTIONS, user_token=True)
    tokens = tokenize(histories, layout, targets=[np.array([0, 2]), np.array([], int), np.array([0])], users=[7, 8, 9])
    assert tokens.offsets.tolist() == [0, 4, 5, 7]
    first = tokens.offsets[:-1]
    assert tokens.keys[first].tolist() == [7, 8, 9] and tokens.fields[first].tolist() == [USER] * 3
    assert tokens.marks[first].tolist() == [1 << layout.user] * 3 and tokens.visible[first].tolist() == [0, 0, 0]
    assert tokens.seen_times[first].tolist() == [30, 0, 5]
    rest = np.setdiff1d(np.arange(len(tokens)), first)
    assert tokens.visible[rest].tolist() == (plain.visible + 1).tolist()
    assert (plain.targets.tolist(), plain.queries.tolist()) == ([0, 2, 3], [-1, 1, -1])
    assert (tokens.targets.tolist(), tokens.queries.tolist()) == ([1, 3, 6], [-1, 2, -1])
