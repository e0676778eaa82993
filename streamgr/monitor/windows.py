"""Tumbling windows in memory: counts and sums by key and by time, for as long as they are looked at.

The plain twin of Faust's windowed tables, which hold the same values under the same windows so that they outlive a
process (`app.py` writes them through and reads them back at the start).
"""

import operator
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Generic, TypeVar

V = TypeVar("V")


class Windows(Generic[V]):
    """`add` what belongs to a moment, ask for the sum of the last so many milliseconds."""

    def __init__(self, step_ms: int, keep_ms: int, plus: Callable[[V, V], V] = operator.add) -> None:
        """`step_ms`: the width of a window; `keep_ms`: how long one is kept; `plus`: how two values become one."""
        self.step_ms, self._keep_ms, self._plus = step_ms, keep_ms, plus
        self._windows: dict[int, dict[str, V]] = {}

    def add(self, key: str, at_ms: int, value: V) -> V:
        """Add to the window of `at_ms`; returns what this key has there now."""
        window = self._windows.setdefault(at_ms - at_ms % self.step_ms, {})
        window[key] = self._plus(window[key], value) if key in window else value
        return window[key]

    def put(self, key: str, start_ms: int, value: V) -> None:
        """Set what a key has in the window that begins at `start_ms`, as it was kept somewhere else."""
        self._windows.setdefault(start_ms, {})[key] = value

    def since(self, from_ms: int) -> dict[str, V]:
        """By key, the sum over every window that has not ended by `from_ms`."""
        found: dict[str, list[V]] = {}
        for start, window in self._windows.items():
            if start + self.step_ms > from_ms:
                for key, value in window.items():
                    found.setdefault(key, []).append(value)
        return {key: reduce(self._plus, values) for key, values in found.items()}

    def each(self, from_ms: int) -> Iterator[tuple[int, dict[str, V]]]:
        """(start, values by key) of every window since, oldest first."""
        for start in sorted(self._windows):
            if start + self.step_ms > from_ms:
                yield start, dict(self._windows[start])

    def forget(self, now_ms: int) -> None:
        """Let go of what is older than is kept."""
        for start in [start for start in self._windows if start + self.step_ms <= now_ms - self._keep_ms]:
            del self._windows[start]
