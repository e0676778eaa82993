"""Time comes in as an argument: the one place that reads the machine's clocks."""

import time
from typing import Protocol


def milliseconds(seconds: float) -> int:
    """Seconds of the configuration as whole milliseconds."""
    return round(seconds * 1000)


class Clock(Protocol):
    """Wall time in milliseconds since 1970 UTC, and a monotonic time in seconds."""

    def now_ms(self) -> int: ...

    def monotonic(self) -> float: ...


class SystemClock:
    """The machine's clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that only moves when told; for tests and replays."""

    def __init__(self, now_ms: int = 0) -> None:
        self._now_ms = now_ms

    def advance(self, seconds: float) -> None:
        self._now_ms += milliseconds(seconds)

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic(self) -> float:
        return self._now_ms / 1000


class Deadline:
    """One monotonic budget, shared by everything that must end within it."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._end = clock.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self._end - self._clock.monotonic())

    def passed(self) -> bool:
        return self.remaining() == 0.0
