"""One partition of `streamgr.examples`: what is accepted, what waits, what has been learned.

Exactly once by position (decision 3). An example carries its own position and that of its predecessor, so against the
mark (the last position accepted) there are three cases and no fourth:

    position <= mark           a repetition after somebody's crash: counted and dropped
    prev <= mark < position    the next one: accepted
    mark < prev                something between is gone: `OutputsMissing`, never a jump

Positions are source offsets, so they mean something only within one incarnation of the events topic. A new
incarnation shows as a new fingerprint whose chain starts again at BEFORE_ALL; then the mark starts again too. (A
changed setting also changes the fingerprint, but goes on in the old chain.)

The horizon moves only over source records all of whose outputs have been learned: a record's last output is known as
such when something of a later record follows it, an example or a progress record.
"""

from collections import deque
from dataclasses import dataclass

import msgspec

from streamgr.errors import OutputsMissing
from streamgr.sequence.examples import BEFORE_ALL, Example, Position, Progress
from streamgr.telemetry import counter

DUPLICATES = counter("train_duplicates", "Examples seen again and dropped by their position.")
GAPS = counter("train_gaps", "Missing outputs that `trainer.accept_loss` let pass.")
INCARNATIONS = counter("train_incarnations", "Partitions whose marks started again with a recreated source topic.")


class LaneState(msgspec.Struct, kw_only=True):
    """What a checkpoint keeps of a partition. Offsets are next ones; times in ms; -1 where nothing is known yet."""

    next_offset: int = 0  # in streamgr.examples: everything before it is in the weights
    mark: Position = BEFORE_ALL
    fingerprint: str = ""
    watermark_ms: int = -1
    horizon_ms: int = -1  # append time of the newest source record fully in the weights
    source_next: int = 0  # in streamgr.events: everything before it is in the weights
    open_offset: int = -1  # the source record learned last, of which more outputs may come
    open_append_ms: int = -1


@dataclass(frozen=True, slots=True)
class Waiting:
    """An accepted output at its offset in `streamgr.examples`."""

    offset: int
    output: Example | Progress

    @property
    def tokens(self) -> int:
        return len(self.output.history) if isinstance(self.output, Example) else 0


class Lane:
    """The queue of one partition. `state` is about what was learned; the queue is ahead of it."""

    def __init__(self, topic: str, partition: int, state: LaneState, *, accept_loss: bool = False) -> None:
        self.topic, self.partition, self.state = topic, partition, state
        self._accept_loss = accept_loss
        self._accepted = state.mark
        self._fingerprint = state.fingerprint
        self.fetched = state.next_offset  # the next offset to arrive
        self.queue: deque[Waiting] = deque()
        self.queued_tokens = 0

    def arrive(self, offset: int, output: Example | Progress) -> bool:
        """Queue the output of `offset`; false for a repetition. Raises `OutputsMissing` at a gap."""
        self.fetched = offset + 1
        if isinstance(output, Example) and not self._accept(offset, output):
            return False
        waiting = Waiting(offset, output)
        self.queue.append(waiting)
        self.queued_tokens += waiting.tokens
        return True

    def pop(self) -> Waiting:
        waiting = self.queue.popleft()
        self.queued_tokens -= waiting.tokens
        return waiting

    def learned(self, waiting: Waiting) -> None:
        """This output, and so everything before it, is in the weights now."""
        state, output = self.state, waiting.output
        state.next_offset = waiting.offset + 1
        state.watermark_ms = max(state.watermark_ms, output.watermark)
        if isinstance(output, Progress):
            self._answered(output.offset, output.append_ms)
            return
        self._follow(output)
        if output.fingerprint != state.fingerprint and output.prev == BEFORE_ALL:
            state.source_next = 0
        state.mark, state.fingerprint = output.position, output.fingerprint
        state.source_next = max(state.source_next, output.position[0])
        state.open_offset, state.open_append_ms = output.position[0], output.append_ms

    def settle(self) -> None:
        """Apply what needs no learning at the head of the queue: progress, and the end of the open record."""
        while self.queue and isinstance(self.queue[0].output, Progress):
            self.learned(self.pop())
        if self.queue and isinstance(head := self.queue[0].output, Example):
            self._follow(head)

    def _follow(self, example: Example) -> None:
        """This example comes next: if it is of another source record, the open one is complete."""
        if 0 <= self.state.open_offset != example.position[0]:
            self._answered(self.state.open_offset + 1, self.state.open_append_ms)

    def _answered(self, source_next: int, append_ms: int) -> None:
        """All outputs of the source before `source_next` are in the weights; its last record came at `append_ms`."""
        state = self.state
        state.source_next = max(state.source_next, source_next)
        state.horizon_ms = max(state.horizon_ms, append_ms)
        if state.open_offset < source_next:
            state.open_offset = state.open_append_ms = -1

    def _accept(self, offset: int, example: Example) -> bool:
        if example.fingerprint != self._fingerprint:
            if example.prev == BEFORE_ALL != self._accepted:
                INCARNATIONS.inc()
                self._accepted = BEFORE_ALL
            self._fingerprint = example.fingerprint
        if example.position <= self._accepted:
            DUPLICATES.inc()
            return False
        if example.prev > self._accepted:
            if not self._accept_loss:
                raise OutputsMissing(
                    f"the example at {example.position} follows {example.prev}, but the last one learned is "
                    f"{self._accepted}: the outputs between them are gone (retention passed, or records were deleted)",
                    where=f"{self.topic}[{self.partition}]@{offset}",
                    remedy="restore the topic; or go on without them: start once with trainer.accept_loss = true",
                )
            GAPS.inc()
        self._accepted = example.position
        return True
