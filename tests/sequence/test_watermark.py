"""The watermark moves by records, in steps, and never back."""

from hypothesis import given
from hypothesis import strategies as st

from streamgr.sequence.watermark import Watermark


def test_it_is_the_greatest_time_less_the_lateness_on_a_grid() -> None:
    mark = Watermark(lateness_ms=1_000, step_ms=200)
    assert not mark.reached(-(1 << 40))
    assert mark.advance(5_399)
    assert (mark.seen, mark.value) == (5_399, 4_200)
    assert not mark.advance(5_399)
    assert not mark.advance(4_000)
    assert not mark.advance(5_400 - 1 + 0)
    assert mark.advance(5_400)
    assert mark.value == 4_400
    assert mark.reached(4_400)
    assert not mark.reached(4_401)


def test_it_may_lie_before_1970() -> None:
    mark = Watermark(lateness_ms=1_000, step_ms=300)
    assert mark.advance(0)
    assert mark.value == -1_200


def test_one_wrong_date_moves_it_by_one_step_of_the_limit_at_most() -> None:
    mark = Watermark(lateness_ms=0, step_ms=1, max_step_ms=100)
    mark.advance(1_000)
    mark.advance(1_000_000)
    assert mark.value == 1_100
    assert not mark.advance(1_050)  # the others do not follow it
    mark.advance(1_101)
    assert mark.value == 1_101
    for _ in range(5):  # a real gap is crossed in as many records as it takes
        mark.advance(1_500)
    assert mark.value == 1_500


@given(st.lists(st.integers(0, 10_000)), st.integers(0, 3_000), st.integers(1, 700), st.integers(0, 900))
def test_steps_are_what_reaches_a_due_first(times: list[int], lateness: int, step: int, limit: int) -> None:
    mark = Watermark(lateness, step, limit)
    last = None
    for time in times:
        moved = mark.advance(time)
        assert moved == (mark.value != last)
        assert last is None or (mark.value is not None and mark.value >= last)
        last = mark.value
    due = 12_345
    assert mark.step_of(due) - step < due <= mark.step_of(due)
    assert mark.step_of(due) % step == 0
