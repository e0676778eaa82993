import pytest

from streamgr.errors import DataError
from streamgr.events import IMPRESSION
from streamgr.sequence.examples import BEFORE_ALL, encode
from streamgr.train.lane import LaneState
from tests.train.kit import MemorySource, example, progress, reader, stream

THREE = ((IMPRESSION, "a", 1, 0), (IMPRESSION, "b", 2, 0), (IMPRESSION, "c", 3, 0))


def log(watermarks: list[int]) -> list[bytes]:
    """One example of three tokens a watermark."""
    positions = [(10 * n, 0) for n in range(len(watermarks))]
    prevs = [BEFORE_ALL, *positions]
    return [
        encode(example(p, prev, events=THREE, watermark=w))
        for p, prev, w in zip(positions, prevs, watermarks, strict=False)
    ]


def steps(source: MemorySource, *, strict: bool, turns: int = 200, **changes: object) -> list[list]:
    """What each step learns, as (partition, position)."""
    r = reader(source, **changes)
    if strict:
        r.stop_at_end()
    found = []
    for _ in range(turns):
        r.poll(0)
        while (formed := r.form()) is not None:
            found.append([(p, e.position) for p, e in formed.examples])
            r.learned(formed)
    return found


def test_strict_steps_do_not_depend_on_how_records_arrive() -> None:
    logs = stream(3, 20)
    runs = [steps(MemorySource(logs, chunk), strict=True, batch_tokens=100) for chunk in (1, 5, 1000)]
    assert runs[0] == runs[1] == runs[2]
    learned = sorted(each for step in runs[0] for each in step)
    assert learned == sorted((p, (10 * n, 0)) for p in range(3) for n in range(20))


def test_a_step_keeps_its_token_budget_and_whole_examples() -> None:
    found = steps(MemorySource([log([1, 2, 3, 4, 5])], 100), strict=False, batch_tokens=7)
    assert [len(step) for step in found] == [2, 2, 1]
    assert steps(MemorySource([log([1, 2])], 100), strict=False, batch_tokens=2) == [[(0, (0, 0))], [(0, (10, 0))]]


def test_a_step_is_ordered_by_partition_then_position() -> None:
    found = steps(MemorySource([log([5, 9]), log([1, 7])], 100), strict=False, batch_tokens=100)
    assert found == [[(0, (0, 0)), (0, (10, 0)), (1, (0, 0)), (1, (10, 0))]]


def test_a_partition_far_ahead_waits_for_one_that_still_has_records() -> None:
    source = MemorySource([log([1_000]), log([90_000])], 1)
    r = reader(source)
    source.paused.add(0)  # partition 0's record is there, but has not come yet
    r.poll(0)
    assert r.form() is None
    source.paused.clear()
    r.poll(0)
    formed = r.form()
    assert formed is not None
    assert [p for p, _ in formed.examples] == [0, 1]  # partition 0 first; then it is at its end and holds nobody back


@pytest.mark.parametrize(("reached", "waits"), [(85_000, False), (70_000, True)])
def test_progress_says_how_far_a_partition_without_examples_is(reached: int, waits: bool) -> None:
    source = MemorySource([[encode(progress(5, watermark=reached)), *log([99_000])], log([90_000])], 1)
    r = reader(source)  # lets a partition be 10 s ahead
    r.poll(0)
    r.poll(0)  # partition 0's example has not come yet
    assert (r.form() is None) == waits


def test_recorded_steps_are_formed_again() -> None:
    logs = stream(3, 20)
    r = reader(MemorySource(logs, 4), batch_tokens=100)
    ends, found = [], []
    for _ in range(60):
        r.poll(0)
        if (formed := r.form()) is not None:
            ends.append(r.ends(formed))
            found.append([(p, e.position) for p, e in formed.examples])
            r.learned(formed)
    again = reader(MemorySource(logs, 1000), batch_tokens=100)
    replayed = []
    for end in ends:
        while (formed := again.form_recorded(end)) is None:
            again.poll(0)
        replayed.append([(p, e.position) for p, e in formed.examples])
        again.learned(formed)
    assert replayed == found
    assert {p: lane.state.mark for p, lane in again.lanes.items()} == {p: (190, 0) for p in range(3)}


def test_a_recorded_step_that_the_topic_cannot_give_is_an_error() -> None:
    r = reader(MemorySource([log([1, 2])], 100))
    r.poll(0)
    with pytest.raises(DataError, match=r"ends a step at \(30, 0\), but after \(10, 0\) the topic has nothing"):
        r.form_recorded({0: (30, 0)})


def test_an_unreadable_record_names_its_place() -> None:
    r = reader(MemorySource([[*log([1]), b"garbage"]], 100))
    with pytest.raises(DataError, match=r"streamgr.examples\[0\]@1: not an example"):
        r.poll(0)


def test_a_lane_with_many_steps_waiting_is_not_fetched() -> None:
    source = MemorySource([log(list(range(30))), log([90])], 100)
    r = reader(source, batch_tokens=8)  # 90 tokens wait: more than 8 steps
    r.poll(0)
    r.poll(0)
    assert source.paused == {0}
    for paused in (True, False):
        while r.lanes[0].queued_tokens > (30 if paused else 0):
            r.learned(r.form())
        r.poll(0)
        assert bool(source.paused) == paused


def test_a_topic_with_fewer_partitions_than_the_checkpoint_is_refused() -> None:
    with pytest.raises(DataError, match=r"partitions \[4\]"):
        reader(MemorySource([[]]), {4: LaneState()})


def test_accept_loss_starts_where_the_log_starts() -> None:
    source = MemorySource([log([1, 2, 3])])
    source.bounds = lambda topic, partition: (1, 3)
    r = reader(source, {0: LaneState(next_offset=0)}, accept_loss=True)
    assert (source.positions, r.jumped) == ({0: 1}, False)
    source.bounds = lambda topic, partition: (2, 3)
    r = reader(source, {0: LaneState(next_offset=1, mark=(0, 0))}, accept_loss=True)
    assert (source.positions, r.jumped) == ({0: 2}, True)
    r.poll(0)
    formed = r.form()
    assert formed is not None
    assert [e.position for _, e in formed.examples] == [(20, 0)]
