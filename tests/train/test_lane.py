import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgr.errors import OutputsMissing
from streamgr.sequence.examples import BEFORE_ALL
from streamgr.train.lane import Lane, LaneState
from tests.train.kit import example, progress


def drain(lane: Lane) -> list[tuple[int, int]]:
    learned = []
    lane.settle()
    while lane.queue:
        waiting = lane.pop()
        lane.learned(waiting)
        learned.append(waiting.output.position)
        lane.settle()
    return learned


def chain(positions: list[tuple[int, int]], **facts: object) -> list:
    return [example(p, prev, **facts) for p, prev in zip(positions, [BEFORE_ALL, *positions], strict=False)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_every_example_is_learned_once_however_often_the_sequencer_starts_again(gaps, data) -> None:
    positions = [(sum(gaps[: i + 1]) + i, i % 3) for i in range(len(gaps))]
    all_ = chain(positions)
    arriving = list(all_)
    for _ in range(data.draw(st.integers(0, 3))):  # a crash: the tail is written again
        start = data.draw(st.integers(0, len(all_)))
        arriving += all_[start:]
    lane = Lane("t", 0, LaneState())
    for offset, each in enumerate(arriving):
        lane.arrive(offset, each)
    assert drain(lane) == positions


def test_a_missing_predecessor_is_an_error_that_names_the_place_and_the_remedy() -> None:
    lane = Lane("t", 3, LaneState())
    first, _, third = chain([(5, 0), (6, 0), (7, 0)])
    lane.arrive(40, first)
    with pytest.raises(OutputsMissing, match=r"t\[3\]@41: .*\(7, 0\) follows \(6, 0\).*\(5, 0\).*accept_loss"):
        lane.arrive(41, third)


def test_accept_loss_goes_on_over_the_gap() -> None:
    lane = Lane("t", 0, LaneState(), accept_loss=True)
    assert lane.arrive(0, example((7, 0), (6, 0)))
    assert drain(lane) == [(7, 0)]


def test_marks_start_again_with_a_new_incarnation_and_go_on_with_a_changed_setting() -> None:
    lane = Lane("t", 0, LaneState())
    old = chain([(5, 0), (90, 0)])
    changed = example((95, 0), (90, 0), fingerprint="changed")
    recreated = chain([(3, 0), (4, 0)], fingerprint="recreated")
    for offset, each in enumerate([*old, changed, *recreated, *recreated]):
        lane.arrive(offset, each)
    assert drain(lane) == [(5, 0), (90, 0), (95, 0), (3, 0), (4, 0)]
    assert lane.state.mark == (4, 0)


def test_the_horizon_waits_for_the_last_output_of_a_record() -> None:
    lane = Lane("t", 0, LaneState())
    a, b, c = chain([(5, 0), (5, 1), (8, 0)])
    lane.arrive(0, a)
    drain(lane)
    assert (lane.state.source_next, lane.state.horizon_ms) == (5, -1)
    lane.arrive(1, b)
    drain(lane)
    assert lane.state.horizon_ms == -1
    lane.arrive(2, c)  # of a later record: record 5 is complete, and learned
    lane.settle()
    assert (lane.state.source_next, lane.state.horizon_ms) == (6, 10_005)


def test_progress_moves_the_horizon_only_after_the_examples_before_it() -> None:
    lane = Lane("t", 0, LaneState())
    lane.arrive(0, example((5, 0)))
    lane.arrive(1, progress(9, watermark=7_000, append_ms=10_008))
    lane.settle()
    assert lane.state.horizon_ms == -1
    drain_one = lane.pop()
    lane.learned(drain_one)
    lane.settle()
    assert (lane.state.source_next, lane.state.horizon_ms, lane.state.watermark_ms) == (9, 10_008, 7_000)
    assert lane.state.next_offset == 2
