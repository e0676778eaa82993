"""Publishes snapshots in a thread of its own, so that a role's loop never waits for a volume.

The role takes a checkpoint (hard links) between two commits and hands it over; what became of it comes back as a value,
which the role logs and counts. A volume that is full, slow or gone costs snapshots, never the role.
"""

import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass

from streamgr.clock import Deadline
from streamgr.errors import StreamgrError, TryAgain
from streamgr.state.snapshot import YOUNG_SECONDS, Checkpoint, Origin, Published, Snapshots


@dataclass(frozen=True, slots=True)
class Upload:
    """What became of a checkpoint."""

    checkpoint: Checkpoint
    outcome: Published | StreamgrError


class Uploader:
    """Publishes checkpoints in a thread of its own; at most one of each partition waits.

    It raises and logs nothing: the role's loop takes `results`. A checkpoint's directory is removed whatever happens;
    what a killed process has left goes at the first upload an hour later.
    """

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._waiting: dict[Origin, Checkpoint] = {}
        self._current: Origin | None = None
        self._results: list[Upload] = []
        self._leaving = False
        self._changed = threading.Condition()  # guards all of these
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Checkpoint) -> None:
        """Publish it when its turn comes, instead of an older one of its partition that still waits."""
        gone: Checkpoint | None = checkpoint
        with self._changed:
            if not self._leaving:
                gone = self._waiting.pop(checkpoint.facts.origin, None)
                self._waiting[checkpoint.facts.origin] = checkpoint
                self._changed.notify()
        if gone:
            self._end(gone, TryAgain("not published: another came first", remedy="take snapshots less often"))

    def busy(self, origin: Origin) -> bool:
        """Whether a checkpoint of the partition waits or is being published: no use in taking another."""
        with self._changed:
            return origin == self._current or origin in self._waiting

    def results(self) -> list[Upload]:
        """What has ended since the last call."""
        with self._changed:
            results, self._results = self._results, []
        return results

    def close(self, deadline: Deadline) -> bool:
        """Abandon what waits, and what is being published at its next block; whether that was in time."""
        with self._changed:
            self._leaving = True
            self._changed.notify()
        self._thread.join(deadline.remaining())
        return not self._thread.is_alive()

    def _run(self) -> None:
        outcome: Published | StreamgrError
        while checkpoint := self._next():
            try:
                self._between()
                _remove_forgotten(checkpoint)
                outcome = self._snapshots.publish(checkpoint, self._between)
            except StreamgrError as error:
                outcome = error
            except Exception as error:  # a bug here is no reason to stop a role
                outcome = StreamgrError(f"{type(error).__name__}: {error}", remedy="report it")
            self._end(checkpoint, outcome)

    def _next(self) -> Checkpoint | None:
        """The one that has waited longest; None when there is none and we leave."""
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._waiting or self._leaving)
            self._current = next(iter(self._waiting), None)
            return self._waiting.pop(self._current) if self._current else None

    def _between(self) -> None:
        if self._leaving:
            raise TryAgain("not published: the role leaves", remedy="none: what was copied is not copied again")

    def _end(self, checkpoint: Checkpoint, outcome: Published | StreamgrError) -> None:
        checkpoint.remove()
        with self._changed:
            self._results.append(Upload(checkpoint, outcome))


def _remove_forgotten(checkpoint: Checkpoint) -> None:
    """Remove what processes that were killed have left beside a checkpoint."""
    with suppress(OSError):
        for path in checkpoint.directory.parent.iterdir():
            if path.stat().st_mtime < checkpoint.facts.created_ms / 1000 - YOUNG_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
