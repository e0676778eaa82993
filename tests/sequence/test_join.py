"""Joins by hand: which impression an action belongs to, and which labels a target gets."""

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from streamgr.events import IMPRESSION, PROFILE
from streamgr.sequence import join
from streamgr.sequence.tail import DECIDED, EVER, LATE, ORGANIC, SHOWN, Tail, Token, ranks

CLICK, LIKE = 2, 3
RANK = ranks(["click", "like"])
WINDOW = 100


def tail(*rows: tuple[int, int, str, int, int]) -> Tail:
    """Rows of (time, kind, id, item, request), in any order; all are open."""
    built = Tail()
    for time, kind, event_id, item, request in rows:
        state = SHOWN if kind == IMPRESSION else ORGANIC
        i = built.place(time, kind, event_id, RANK)
        assert i >= 0
        if i == len(built):
            built.append(time, kind, event_id, item, request, 0, state)
        else:
            built.insert(i, Token(time, kind, event_id, item, request, 0, state))
    return built


def joins(t: Tail) -> dict[str, str]:
    found = {}
    for i, kind in enumerate(t.kinds):
        if kind >= CLICK:
            j = join.find(t, i, t.times[i] - WINDOW, t.items[i], t.requests[i])
            found[t.ids[i]] = t.ids[j] if j >= 0 else ""
    return found


def test_an_action_joins_the_latest_impression_of_its_item_within_the_window() -> None:
    t = tail(
        (10, IMPRESSION, "i1", 7, 1),
        (20, IMPRESSION, "i2", 7, 2),
        (20, IMPRESSION, "i3", 7, 3),  # the same time: the greater id is later
        (30, IMPRESSION, "i4", 8, 4),
        (19, CLICK, "before i2", 7, 0),
        (20, CLICK, "at i2", 7, 0),
        (25, LIKE, "of request 1", 7, 1),
        (109, LIKE, "the last of request 1", 7, 1),
        (110, LIKE, "too late for request 1", 7, 1),
        (119, CLICK, "in time", 7, 0),
        (120, CLICK, "too late", 7, 0),
        (5, CLICK, "too early", 7, 0),
        (40, CLICK, "no such item", 9, 0),
        (40, CLICK, "no such request", 7, 9),
    )
    assert joins(t) == {
        "before i2": "i1",
        "at i2": "i3",
        "of request 1": "i1",
        "the last of request 1": "i1",
        "too late for request 1": "",
        "in time": "i3",
        "too late": "",
        "too early": "",
        "no such item": "",
        "no such request": "",
    }


def test_targets_are_what_falls_due_with_the_kinds_that_joined() -> None:
    t = tail(
        (10, IMPRESSION, "i1", 7, 1),
        (11, IMPRESSION, "i2", 8, 1),
        (12, IMPRESSION, "i3", 7, 2),
        (50, CLICK, "c1", 7, 1),
        (60, LIKE, "l1", 7, 1),
        (61, CLICK, "c2", 8, 0),
        (70, LIKE, "organic", 5, 0),
        (111, CLICK, "c3", 7, 2),
    )
    names = {i: event_id for i, event_id in enumerate(t.ids)}

    def found(after: int, upto: int, behind: int | None = None) -> list[tuple[str, int]]:
        now = join.targets(t, after, upto, WINDOW, behind=behind, oldest=EVER)
        assert now.impressions == sum(t.kinds[row] == IMPRESSION for row in now.rows)
        assert now.rows == sorted(now.rows)
        return [(names[row], labels) for row, labels in zip(now.rows, now.labels, strict=True)]

    assert found(0, 70) == [("organic", 0b10)]
    assert found(70, 110) == [("i1", 0b11)]
    assert found(70, 110) == []  # decided
    t.states[t.ids.index("organic")] = ORGANIC  # as if it had come behind the watermark
    assert found(110, 111) == [("i2", 0b01)]
    assert found(111, 200, behind=70) == [("i3", 0b01), ("organic", 0b10)]
    assert found(200, 300) == []
    t.states[t.ids.index("i1")] = SHOWN
    t.states[t.ids.index("l1")] = LATE
    assert found(109, 110) == [("i1", 0b01)]


@given(
    st.lists(st.tuples(st.sampled_from([PROFILE, IMPRESSION, CLICK, LIKE]), st.integers(0, 5)), max_size=60),
    st.sets(st.integers(0, 5)),
    st.data(),
)
def test_actions_are_picked_the_same_by_numpy_and_by_the_plain_loop(
    rows: list[tuple[int, int]], wanted: set[int], data: st.DataObject
) -> None:
    t = Tail()
    for time, (kind, item) in enumerate(rows):
        t.append(time, kind, f"e{time}", item, 0, 0, DECIDED)
    begin = data.draw(st.integers(0, len(rows)))
    end = data.draw(st.integers(begin, len(rows)))
    plain = join._acted(t, begin, end, wanted)
    with mock.patch.object(join, "FEW", -1):
        assert join._acted(t, begin, end, wanted) == plain
    assert plain == [r for r in range(begin, end) if t.kinds[r] in (CLICK, LIKE) and t.items[r] in wanted]


def test_what_was_decided_or_late_is_no_target_even_at_first() -> None:
    t = tail((10, IMPRESSION, "i1", 7, 1), (11, IMPRESSION, "i2", 7, 1))
    t.states[0], t.states[1] = DECIDED, LATE
    assert join.targets(t, -1, 1 << 40, WINDOW, behind=None, oldest=EVER).rows == []


def test_an_impression_that_is_out_of_the_sequence_is_joined_no_more() -> None:
    t = tail((10, IMPRESSION, "i1", 7, 1), (50, CLICK, "c1", 7, 1))
    assert join.targets(t, 0, 60, WINDOW, behind=None, oldest=11).labels == [0b01]  # organic


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=700),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(-1, 700),
)
def test_the_search_over_bytes_finds_what_a_plain_one_does(
    shown: list[tuple[int, int]], item: int, request: int, after: int
) -> None:
    """Items that overlap in their bytes, farther back than one block of the search."""
    alike = [0x0101010101010101, 0x0100000000000000, 0x0001010101010101, 0x0000000000000001]
    t = Tail()
    for time, (i, r) in enumerate(shown):
        t.append(time, IMPRESSION if i != r else CLICK, f"e{time}", alike[i], r, 0, DECIDED)
    plain = [
        row
        for row in range(len(t))
        if t.times[row] > after and t.kinds[row] == IMPRESSION and t.items[row] == alike[item]
        and (not request or t.requests[row] == request)
    ]  # fmt: skip
    assert join.find(t, len(t), after, alike[item], request) == max(plain, default=-1)


def test_examples_are_cut_where_targets_span_more_than_half_a_window() -> None:
    rows = [3, 4, 6, 7, 11, 12, 30]
    assert [rows[chunk] for chunk in join.chunks(rows, 8)] == [[3, 4, 6], [7], [11, 12], [30]]
    assert [rows[chunk] for chunk in join.chunks(rows[:2], 1)] == [[3], [4]]
    assert [rows[chunk] for chunk in join.chunks(rows, 0)] == [rows]  # targets alone, whatever they span
    assert [len(range(1000)[chunk]) for chunk in join.chunks(list(range(1000)), 30_000)] == [256, 256, 256, 232]
    assert list(join.chunks([], 8)) == []


def test_a_tail_keeps_order_through_inserts_extension_and_trim() -> None:
    t = tail((10, LIKE, "b", 1, 0), (10, CLICK, "z", 1, 0), (10, IMPRESSION, "b", 1, 0), (10, IMPRESSION, "a", 1, 0))
    assert t.ids == ["a", "b", "z", "b"]  # impressions, then actions by kind name, then ids
    assert t.place(10, CLICK, "z", RANK) == -1 - 2
    assert t.place(10, CLICK, "y", RANK) == 2
    assert t.place(9, CLICK, "z", RANK) == 0
    assert t.place(11, IMPRESSION, "a", RANK) == 4
    assert t.since == EVER
    assert t.covers(0, 99)
    t.since = 10
    t.extend_back(
        [(5, RANK[CLICK], "o", CLICK, 2, 0, 0, DECIDED, ()), (4, RANK[LIKE], "p", LIKE, 2, 0, 0, DECIDED, ())], 3
    )
    assert (t.ids, list(t.times), t.since) == (["p", "o", "a", "b", "z", "b"], [4, 5, 10, 10, 10, 10], 3)
    assert t.covers(3)
    assert not t.covers(2)
    assert t.covers(10, 2)
    assert not t.covers(10, 3)
    t.trim(4)  # never within a millisecond
    assert (t.ids, t.since) == (["a", "b", "z", "b"], 10)
    assert len({len(c) for c in (t.times, t.kinds, t.items, t.requests, t.appends, t.states, t.ids)}) == 1


def test_ranks_follow_the_kinds_names_not_their_bits() -> None:
    assert ranks(["like", "click"]) == [0, 1, 3, 2]
