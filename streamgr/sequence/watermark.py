"""The watermark of a partition: the event time below which its log is taken as complete.

It is the greatest event time seen minus the lateness, cut down to a grid of steps, and is moved by records alone
(heartbeats included), never by a clock: replaying the log moves it in the same places. With `max_step_ms`, one record
moves the greatest time seen by no more than that, so that a single wrong date cannot close a year of labels; a real gap
is crossed in as many records as it takes.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Watermark:
    """`seen` and `value` in event ms, None before the first record. `step_ms` > 0; `max_step_ms` 0 means no limit."""

    lateness_ms: int
    step_ms: int
    max_step_ms: int = 0
    seen: int | None = None
    value: int | None = None

    def advance(self, time: int) -> bool:
        """A record of event time `time` was applied; whether the watermark moved a step (or was set)."""
        seen = self.seen
        if seen is not None:
            if time <= seen:
                return False
            if self.max_step_ms:
                time = min(time, seen + self.max_step_ms)
        self.seen = time
        value = (time - self.lateness_ms) // self.step_ms * self.step_ms
        if self.value is not None and value <= self.value:
            return False
        self.value = value
        return True

    def moves(self, time: int) -> bool:
        """Whether a record of event time `time` would move the watermark, or is held back from moving it farther."""
        if self.value is None or self.seen is None:
            return True
        if time > self.seen and self.max_step_ms:
            return True
        return (time - self.lateness_ms) // self.step_ms * self.step_ms > self.value

    def reached(self, time: int) -> bool:
        """Whether the watermark is at or past `time`."""
        return self.value is not None and self.value >= time

    def step_of(self, due: int) -> int:
        """The watermark (on the grid) that reaches `due` first."""
        return -(-due // self.step_ms) * self.step_ms
