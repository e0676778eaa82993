"""Examples into steps: which examples are learned together, and in which order.

Partitions are merged by watermark: the lane whose next example has the lowest watermark goes first, and a lane that is
more than `trainer.max_skew_seconds` ahead of one that still has records to come waits for it (decision 6). What has
been taken is learned in the order (partition, position), so that a step is a function of its end positions alone,
however the records happened to arrive. There are three ways to end a step:

    live       with what is there, at most `trainer.batch_tokens`
    strict     only full ones, merged without regard to arrival: the whole is a function of the topic (`--until-end`)
    recorded   exactly where the step log says (recovery after a crash)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from streamgr.clock import Clock
from streamgr.errors import DataError, RetentionPassed
from streamgr.events import Record
from streamgr.sequence.examples import BEFORE_ALL, Example, Position, decode
from streamgr.train.lane import Lane, LaneState, Waiting

MANY_STEPS, FEW_STEPS = 8, 2  # of tokens waiting in a lane: stop fetching, fetch again
END_SECONDS = 0.5  # how long an end offset may be believed when a lane waits for another


class Source(Protocol):
    """What is needed of `streamgr.kafka.consumer.Consumer`."""

    def partitions(self, topic: str) -> list[int]: ...

    def bounds(self, topic: str, partition: int) -> tuple[int, int]: ...

    def assign(self, positions: Mapping[tuple[str, int], int]) -> None: ...

    def poll(self, max_records: int = 1000, timeout: float = 0.05) -> list[Record]: ...

    def pause(self, topic: str, partitions: Iterable[int]) -> None: ...

    def resume(self, topic: str, partitions: Iterable[int]) -> None: ...

    def commit(self, positions: Mapping[tuple[str, int], int]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Formed:
    """The outputs of one step, in learning order, each with its partition."""

    outputs: list[tuple[int, Waiting]]

    @property
    def examples(self) -> list[tuple[int, Example]]:
        """(partition, example), partitions ascending, then position."""
        return [(p, w.output) for p, w in self.outputs if isinstance(w.output, Example)]


class ExamplesReader:
    """Reads all partitions of the examples topic from the checkpoint's own positions."""

    def __init__(
        self,
        source: Source,
        topic: str,
        states: Mapping[int, LaneState],
        *,
        clock: Clock,
        batch_tokens: int,
        max_skew_ms: int,
        accept_loss: bool = False,
    ) -> None:
        """`states`: what the checkpoint knows; partitions that are new start at the first record held."""
        self._source, self._topic, self._clock = source, topic, clock
        self._budget, self._max_skew_ms = batch_tokens, max_skew_ms
        self.lanes: dict[int, Lane] = {}
        self.jumped = False  # `accept_loss` let a known position pass over records that are gone
        for partition in source.partitions(topic):
            state = states.get(partition)
            if state is None or accept_loss:
                state = state or LaneState()
                low = source.bounds(topic, partition)[0]
                self.jumped |= 0 < state.next_offset < low
                state.next_offset = max(state.next_offset, low)
            self.lanes[partition] = Lane(topic, partition, state, accept_loss=accept_loss)
        if gone := sorted(set(states) - set(self.lanes)):
            raise DataError(
                f"the checkpoint knows partitions {gone} that the topic does not have",
                where=topic,
                remedy="the topic was recreated smaller: restore it, or remove the trainer's state directory",
            )
        self._taken: list[tuple[int, Waiting]] = []
        self._taken_tokens = 0
        self._marks: dict[int, Position] = {}
        self._paused: set[int] = set()
        self._ends: dict[int, tuple[int, float]] = {}  # end offset, and when it was asked for
        self._last: dict[int, int] | None = None  # strict: the end as it stood at the start
        source.assign({(topic, p): lane.state.next_offset for p, lane in self.lanes.items()})

    def stop_at_end(self) -> None:
        """From now on strict, and up to the end of the topic as it stands now."""
        self._last = {p: self._source.bounds(self._topic, p)[1] for p in self.lanes}

    def poll(self, timeout: float) -> int:
        """Fetch and queue; returns how many records came. Raises `OutputsMissing`, `DataError`, `RetentionPassed`."""
        self._hold_back()
        try:
            records = self._source.poll(1000, timeout)
        except RetentionPassed as error:
            remedy = "restore the topic; or go on without them: start once with trainer.accept_loss = true"
            raise RetentionPassed(error.what, where=error.where, remedy=remedy) from None
        for record in records:
            lane = self.lanes[record.partition]
            if self._last is not None and record.offset >= self._last[record.partition]:
                continue
            try:
                output = decode(record.value or b"")
            except DataError as error:
                where = f"{record.topic}[{record.partition}]@{record.offset}"
                raise DataError(error.what, where=where, remedy=error.remedy) from None
            lane.arrive(record.offset, output)
        if not self._taken:
            for lane in self.lanes.values():
                lane.settle()
        return len(records)

    def form(self) -> Formed | None:
        """The next step, or None until more has arrived. What it returns must be `learned` before the next call."""
        while (lane := self._lowest()) is not None:
            head = lane.queue[0]
            full = self._taken_tokens + head.tokens > self._budget
            if self._taken_tokens and (full or (_restarts(head) and lane.partition in self._marks)):
                return self._formed()
            self._take(lane)
        if self._last is not None and not self.ended():
            return None
        return self._formed() if self._taken_tokens else None

    def form_recorded(self, ends: Mapping[int, Position]) -> Formed | None:
        """Exactly the step that ended at `ends`, or None until it has arrived whole.

        Raises `DataError` where the topic no longer holds what the log names.
        """
        for partition, end in ends.items():
            lane = self.lanes[partition]
            while self._mark(lane) != end:
                head = lane.queue[0].output if lane.queue else None
                if head is None and not self._at_end(lane):
                    return None
                if head is None or (isinstance(head, Example) and head.position > end):
                    raise DataError(
                        f"the step log ends a step at {end}, but after {self._mark(lane)} the topic has "
                        f"{head.position if isinstance(head, Example) else 'nothing'}",
                        where=f"{self._topic}[{partition}]@{lane.fetched}",
                        remedy="restore the examples topic, or the trainer's state directory from a backup",
                    )
                self._take(lane)
        return self._formed()

    def learned(self, step: Formed) -> None:
        """The step is in the weights: move marks, positions and horizons."""
        for partition, waiting in step.outputs:
            self.lanes[partition].learned(waiting)
        for lane in self.lanes.values():
            lane.settle()

    def ended(self) -> bool:
        """Strict: everything up to the end has been taken."""
        return self._last is not None and all(
            not lane.queue and lane.fetched >= self._last[p] for p, lane in self.lanes.items()
        )

    def ends(self, step: Formed) -> dict[int, Position]:
        """Where the step ends in every partition that has a mark: what the step log keeps."""
        ends = {p: lane.state.mark for p, lane in self.lanes.items() if lane.state.fingerprint}
        ends |= {p: example.position for p, example in step.examples}
        return dict(sorted(ends.items()))

    def _lowest(self) -> Lane | None:
        """The lane to take from now; None where nothing may be taken before more arrives."""
        ready = [lane for lane in self.lanes.values() if lane.queue]
        if not ready:
            return None
        lowest = min(ready, key=lambda lane: (lane.queue[0].output.watermark, lane.partition))
        allowed = lowest.queue[0].output.watermark - (0 if self._last is not None else self._max_skew_ms)
        for lane in self.lanes.values():
            behind = self._last is not None or lane.state.watermark_ms < allowed
            if not lane.queue and behind and not self._at_end(lane):
                return None
        return lowest

    def _at_end(self, lane: Lane) -> bool:
        if self._last is not None:
            return lane.fetched >= self._last[lane.partition]
        end, asked = self._ends.get(lane.partition, (-1, 0.0))
        now = self._clock.monotonic()
        if lane.fetched >= end and (end < 0 or now - asked >= END_SECONDS):
            end = self._source.bounds(self._topic, lane.partition)[1]
            self._ends[lane.partition] = (end, now)
        return lane.fetched >= end

    def _take(self, lane: Lane) -> None:
        waiting = lane.pop()
        self._taken.append((lane.partition, waiting))
        self._taken_tokens += waiting.tokens
        if isinstance(waiting.output, Example):
            self._marks[lane.partition] = waiting.output.position

    def _mark(self, lane: Lane) -> Position:
        """The last position taken of this lane, in this step or before it."""
        return self._marks.get(lane.partition, lane.state.mark)

    def _formed(self) -> Formed:
        taken = sorted(self._taken, key=lambda each: each[0])  # stable: arrival order within a partition is its order
        self._taken, self._taken_tokens, self._marks = [], 0, {}
        return Formed(taken)

    def _hold_back(self) -> None:
        """Backpressure: a lane with many steps waiting is not fetched until it has but few."""
        full = {
            p
            for p, lane in self.lanes.items()
            if lane.queued_tokens > (FEW_STEPS if p in self._paused else MANY_STEPS) * self._budget
        }
        if added := full - self._paused:
            self._source.pause(self._topic, sorted(added))
        if removed := self._paused - full:
            self._source.resume(self._topic, sorted(removed))
        self._paused = full


def _restarts(waiting: Waiting) -> bool:
    """A chain begins here: the step log's positions must not span two incarnations."""
    return isinstance(waiting.output, Example) and waiting.output.prev == BEFORE_ALL
