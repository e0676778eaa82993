"""Catching up: how far partitions are from where their logs ended when they were opened, for metrics and the log."""

from collections.abc import Mapping

from streamgr.clock import Clock
from streamgr.sequence.partition import Partition
from streamgr.telemetry import Log, gauge

REMAINING = gauge("restore_remaining_records", "Records between the position and the log's end at opening.")
TOLD_SECONDS = 10.0
WORTH_TELLING = 10_000  # a replay of fewer records is over before anybody looks


class Replay:
    """The replays of one role's partitions."""

    def __init__(self, clock: Clock, log: Log) -> None:
        self._clock, self._log = clock, log
        self._ends: dict[int, int] = {}
        self._began = self._told = clock.monotonic()
        self._whole = self._told_remaining = 0

    def opened(self, number: int, partition: Partition, end: int) -> None:
        """A partition was opened whose log ended at `end`."""
        if not self._ends:
            self._began, self._whole = self._clock.monotonic(), 0
            self._told, self._told_remaining = self._began, 0
        self._ends[number] = end
        self._whole += max(0, end - partition.next_offset)
        self._told_remaining += max(0, end - partition.next_offset)

    def look(self, partitions: Mapping[int, Partition]) -> int:
        """How many records are still to come; logged every ten seconds, and when it is over."""
        if not self._ends:
            return 0
        left = {n: end - partitions[n].next_offset for n, end in self._ends.items() if n in partitions}
        self._ends = {n: self._ends[n] for n, records in left.items() if records > 0}
        remaining, now = sum(records for records in left.values() if records > 0), self._clock.monotonic()
        REMAINING.set(remaining)
        if remaining and now - self._told >= TOLD_SECONDS:
            speed = (self._told_remaining - remaining) / (now - self._told)
            self._log.info("replaying", partitions=sorted(self._ends), remaining=remaining, per_second=round(speed))
            self._told, self._told_remaining = now, remaining
        elif not remaining and self._whole >= WORTH_TELLING:
            self._log.info("caught_up", records=self._whole, seconds=round(now - self._began, 1))
        return remaining
