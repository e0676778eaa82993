"""When which partition is checkpointed for a snapshot, and what became of it.

Each partition has its own moment within the interval, by its number, so that workers do not all write to the shared
directory at once, and a role takes at most one checkpoint a commit. A partition that has read nothing since its last
snapshot is passed over.
"""

from collections.abc import Mapping

from streamgr.clock import Clock, Deadline
from streamgr.config import State
from streamgr.errors import StreamgrError
from streamgr.sequence.partition import Partition
from streamgr.state import snapshot
from streamgr.state.snapshot import Snapshots
from streamgr.state.uploader import Upload, Uploader
from streamgr.telemetry import DURATION_BUCKETS, Log, counter, gauge, histogram

SNAPSHOTS = counter("snapshots", "Snapshots of partitions, by what became of them.", ("outcome",))
COPIED = counter("snapshot_copied_bytes", "Bytes brought to the shared directory; files that are there are not copied.")
NEWEST = gauge("snapshot_timestamp_seconds", "When the newest snapshot was taken, the oldest of the partitions owned.")
CHECKPOINT = histogram(
    "checkpoint_duration_seconds", "A partition's loop held up by a checkpoint.", (), DURATION_BUCKETS
)
for _outcome in ("published", "failed"):
    SNAPSHOTS.labels(_outcome)  # 0 is a value too


class Schedule:
    """Snapshots of a role's partitions. Used by the role's loop, between two commits."""

    def __init__(self, settings: State, snapshots: Snapshots, clock: Clock, log: Log) -> None:
        self._every, self._clock, self._log = settings.snapshot_seconds, clock, log
        self._uploader = Uploader(snapshots)
        self._due: dict[int, float] = {}  # monotonic
        self._taken: dict[int, tuple[int, int]] = {}  # the last one published: next offset, when (ms)

    def opened(self, number: int, partitions: int, *, at_once: bool = False) -> None:
        """A partition has come, of so many in all; its first snapshot is due at its moment, or at once."""
        self._due[number] = self._clock.monotonic() + (0 if at_once else self._every * (number + 1) / partitions)

    def closed(self, number: int) -> None:
        """A partition has gone."""
        self._due.pop(number, None)
        self._taken.pop(number, None)

    def turn(self, partitions: Mapping[int, Partition]) -> None:
        """Take the one checkpoint that is due, and tell what became of earlier ones. Nothing may be uncommitted."""
        for upload in self._uploader.results():
            self._tell(upload)
        now = self._clock.monotonic()
        for number, due in sorted(self._due.items(), key=lambda each: each[1]):  # who has waited longest goes first
            if now < due:
                return
            if number not in partitions:
                continue
            store = partitions[number].store
            self._due[number] = now + self._every
            if store.progress.next_offset != self._taken.get(number, (0, 0))[0]:
                self._uploader.submit(snapshot.take(store, self._clock.now_ms()))
                CHECKPOINT.observe(self._clock.monotonic() - now)
                return

    def close(self, deadline: Deadline) -> None:
        """Abandon what is not published yet."""
        self._uploader.close(deadline)

    def _tell(self, upload: Upload) -> None:
        facts, outcome = upload.checkpoint.facts, upload.outcome
        number = facts.origin.partition
        if isinstance(outcome, StreamgrError):
            SNAPSHOTS.labels("failed").inc()
            self._log.warning("snapshot_failed", str(outcome), partition=number, offset=facts.next_offset)
            return
        SNAPSHOTS.labels("published").inc()
        COPIED.inc(outcome.copied_bytes)
        if number in self._due:
            self._taken[number] = facts.next_offset, facts.created_ms
            NEWEST.set(min(when for _, when in self._taken.values()) / 1000)
        self._log.info(
            "snapshot_published",
            partition=number,
            offset=facts.next_offset,
            bytes=outcome.snapshot.manifest.bytes,
            copied_bytes=outcome.copied_bytes,
        )
        for problem in outcome.problems:
            self._log.warning("snapshots_untidy", str(problem), partition=number)
