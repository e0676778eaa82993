"""The join of served scores with outcomes, against a plain twin that sees everything at once."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from streamgr.events import FIRST_ACTION, IMPRESSION, PROFILE, Event
from streamgr.monitor.outcomes import CANARY, JOINED, Judged, Outcomes, Score

KINDS = ("click", "like")
WINDOW, SERVE, GRACE = 960, 300, 200  # multiples of the distance of two moments: their edges are met
END = 10_000_000


def twin(scores: list[Score], events: list[tuple[Event, int]]) -> Counter[tuple[int, int, float, frozenset[str]]]:
    """(version, shown at, p of click, labels), by the words of the rule."""
    shown = [(e, at) for e, at in events if e.kind == IMPRESSION]
    found: Counter[tuple[int, int, float, frozenset[str]]] = Counter()
    for event, at in shown:
        served = [
            s for s in scores if s.user == event.user and event.item in s.p and s.time_ms <= at <= s.time_ms + SERVE
        ]
        if not served:
            continue
        labels = set()
        for action, _ in events:
            if action.kind < FIRST_ACTION or (action.user, action.item) != (event.user, event.item):
                continue
            joins = [
                e
                for e, _ in shown
                if (e.user, e.item) == (action.user, action.item)
                and 0 <= action.time - e.time < WINDOW
                and (not action.request or e.request == action.request)
            ]
            if joins and max(joins, key=lambda e: (e.time, e.event_id)) is event:
                labels.add(KINDS[action.kind - FIRST_ACTION])
        score = max(served, key=lambda s: (s.time_ms, s.version))
        found[score.version, at, score.p[event.item]["click"], frozenset(labels)] += 1
    return found


@dataclass(frozen=True)
class Stream:
    scores: list[Score]
    events: list[tuple[Event, int]]
    order: list[int]  # how late each of them arrives, ms


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    users, items = st.sampled_from("uv"), st.sampled_from("abc")
    moments = st.integers(0, 40).map(lambda n: 1_000 + n * 60)
    scores = [
        Score(draw(users), at, version, {item: {"click": draw(st.floats(0.01, 0.99)), "like": 0.1} for item in "abc"})
        for version, at in enumerate(draw(st.lists(moments, max_size=6)))
    ]
    events = []
    for n, at in enumerate(draw(st.lists(moments, max_size=14))):
        kind = draw(st.sampled_from((IMPRESSION, IMPRESSION, FIRST_ACTION, FIRST_ACTION + 1)))
        event = Event(kind, draw(users), draw(items), f"e{n:02}", at, request=draw(st.sampled_from(("", "r", "s"))))
        events.append((event, at))
    late = draw(st.lists(st.integers(0, GRACE - 1), min_size=20, max_size=20))
    return Stream(scores, events, late)


def joined(stream: Stream, step: int) -> list[Judged]:
    """Everything fed in the order of arrival, settled every `step` ms on the way."""
    outcomes = Outcomes(KINDS, WINDOW, SERVE, GRACE)
    arrivals = [(s.time_ms + stream.order[n], s) for n, s in enumerate(stream.scores)]
    arrivals += [(at + stream.order[6 + n], (e, at)) for n, (e, at) in enumerate(stream.events)]
    found: list[Judged] = []
    now = 0
    for when, what in sorted(arrivals, key=lambda pair: pair[0]):
        while now + step <= when:
            now += step
            found += outcomes.settle(now)
        if isinstance(what, Score):
            outcomes.score(what)
        else:
            outcomes.event(*what, partition=0)
            outcomes.event(*what, partition=0)  # a record that is read again changes nothing
    found += outcomes.settle(END)
    assert outcomes.held == 0 and not outcomes._users and not outcomes._due, "something is held for ever"
    return found


@settings(max_examples=120, deadline=None)
@given(streams(), st.sampled_from((50, 170, 900)))
def test_any_order_of_arrival_gives_what_the_twin_sees(stream: Stream, step: int) -> None:
    found = Counter((j.version, j.at_ms, j.p["click"], j.labels) for j in joined(stream, step))
    assert found == twin(stream.scores, stream.events)


def test_it_counts_what_became_of_every_scored_item() -> None:
    before = {outcome: JOINED.labels(outcome)._value.get() for outcome in ("positive", "negative", "not_shown")}
    outcomes = Outcomes(KINDS, WINDOW, SERVE, GRACE)
    outcomes.score(Score("u", 1_000, 7, {item: {"click": 0.5} for item in "abcd"}))
    outcomes.event(Event(IMPRESSION, "u", "a", "1", 1_050), 1_050, 0)
    outcomes.event(Event(IMPRESSION, "u", "b", "2", 1_050), 1_050, 0)
    outcomes.event(Event(FIRST_ACTION, "u", "a", "3", 1_500), 1_500, 0)
    assert outcomes.settle(1_050 + WINDOW + GRACE - 1) == [], "decided before the grace was over"
    assert [j.labels for j in outcomes.settle(END)] == [{"click"}, set()]
    after = {outcome: JOINED.labels(outcome)._value.get() - n for outcome, n in before.items()}
    assert after == {"positive": 1, "negative": 1, "not_shown": 2}


def test_the_window_ends_before_its_end_and_an_answer_is_shown_up_to_its_last_moment() -> None:
    for shown, acted, wanted in (
        (1_000, WINDOW - 1, [{"click"}]),
        (1_000, WINDOW, [set()]),
        (1_000 + SERVE, 0, [{"click"}]),
        (1_001 + SERVE, 0, []),
        (999, 0, []),
    ):
        outcomes = Outcomes(KINDS, WINDOW, SERVE, GRACE)
        outcomes.score(Score("u", 1_000, 7, {"a": {"click": 0.5}}))
        outcomes.event(Event(IMPRESSION, "u", "a", "1", shown), shown, 0)
        outcomes.event(Event(FIRST_ACTION, "u", "a", "2", shown + acted), shown + acted, 0)
        assert [j.labels for j in outcomes.settle(END)] == wanted, (shown, acted)


def test_what_no_score_was_sampled_for_is_let_go_after_the_grace() -> None:
    outcomes = Outcomes(KINDS, WINDOW, SERVE, GRACE)
    for n in range(1_000):
        outcomes.event(Event(IMPRESSION, "always here", "a", f"e{n}", n * 10), n * 10, 0)
        outcomes.event(Event(FIRST_ACTION, "always here", "a", f"c{n}", n * 10 + 1), n * 10 + 1, 0)
        assert outcomes.settle(n * 10) == []
        assert len(outcomes._due) <= GRACE / 10 + 1 and outcomes.held <= 2 * (2 * GRACE / 10 + 1)


def test_canaries_and_profiles_are_nobodys_outcomes() -> None:
    outcomes = Outcomes(KINDS, WINDOW, SERVE, GRACE)
    outcomes.score(Score(f"{CANARY}1", 0, 1, {"a": {"click": 0.5}}))
    outcomes.event(Event(IMPRESSION, f"{CANARY}1", "a", "1", 10), 10, 0)
    outcomes.event(Event(PROFILE, "u", "", "2", 10), 10, 0)
    assert outcomes.settle(END) == [] and outcomes.held == 0


def test_above_its_bound_it_lets_the_oldest_go_and_says_so() -> None:
    before = JOINED.labels("dropped")._value.get()
    outcomes = Outcomes(KINDS, WINDOW, SERVE, GRACE, held_events=10)
    for n in range(30):
        outcomes.score(Score(f"u{n}", 1_000, 1, {"a": {"click": 0.5}}))
        outcomes.event(Event(IMPRESSION, f"u{n}", "a", f"{n}", 1_001), 1_001 + n, 0)
    outcomes.settle(1_100)
    assert outcomes.held <= 10
    assert JOINED.labels("dropped")._value.get() - before == 20
    assert len(outcomes.settle(END)) == 10
