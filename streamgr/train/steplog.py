"""The step log: where each training step ended, so that a crash can be walked again step by step (decision 6).

A step is a function of the weights before it and of its end positions, one per partition. One JSON line a step is
appended before the step's weights leave the process, and fsynced before any version that contains them is published.
After a crash the steps since the checkpoint are formed again from these lines, so the same versions come out, bit for
bit on CPU. What was written but not yet synced may be lost with the machine: no version can have contained it.

The publishing thread syncs while the loop appends; only with a file being replaced must it not meet.

A torn last line is what a crash leaves, and is cut off. Anything else that cannot be read is damage.
"""

import os
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec

from streamgr import files
from streamgr.errors import DataError, StateNotWritable
from streamgr.sequence.examples import Position


class Step(msgspec.Struct, frozen=True):
    """Step `step` learned, in each partition, the examples up to and with this position."""

    step: int
    ends: dict[int, Position]


_decoder = msgspec.json.Decoder(Step)


class StepLog:
    """An append-only file of steps. Raises `StateNotWritable` when the disk refuses, `DataError` when damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._in_place = threading.Lock()  # held while the file is synced, or replaced
        self.steps = self._read()
        self._file = self._open()

    def append(self, step: Step) -> None:
        try:
            self._file.write(msgspec.json.encode(step) + b"\n")
            self._file.flush()
        except OSError as error:
            raise _refused(self._path, error) from None
        self.steps.append(step)

    def sync(self) -> None:
        """What was appended survives the machine from here on. Any thread may ask."""
        try:
            with self._in_place:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _refused(self._path, error) from None

    def after(self, step: int) -> list[Step]:
        """The steps after `step`, without a hole. Raises `DataError` where one is missing."""
        found = [s for s in self.steps if s.step > step]
        if [s.step for s in found] != list(range(step + 1, step + 1 + len(found))):
            raise DataError(
                f"the steps after {step} are not all there",
                where=str(self._path),
                remedy="the log belongs to another checkpoint: restore both together, or remove the trainer's state",
            )
        return found

    def forget(self, step: int) -> None:
        """Drop the steps up to and with `step`: every checkpoint that could be restored holds them."""
        self.steps = [s for s in self.steps if s.step > step]
        temporary = self._path.with_suffix(".tmp")
        with self._in_place:
            try:
                files.write(temporary, b"".join(msgspec.json.encode(s) + b"\n" for s in self.steps))
                self._file.close()
                temporary.replace(self._path)
            except OSError as error:
                raise _refused(self._path, error) from None
            self._file = self._open()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("ab")
            files.sync_directory(self._path.parent)  # else a synced step could stand in a file that is not there
            return file
        except OSError as error:
            raise _refused(self._path, error) from None

    def _read(self) -> list[Step]:
        if not self._path.exists():
            return []
        whole, _, torn = self._path.read_bytes().rpartition(b"\n")
        if torn:
            with self._path.open("r+b") as file:
                file.truncate(len(whole) + 1 if whole else 0)
        try:
            return [_decoder.decode(line) for line in whole.splitlines()]
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise DataError(
                f"not a step log: {error}",
                where=str(self._path),
                remedy="restore the trainer's state directory from a backup, or remove it to start a new lineage",
            ) from None


def _refused(path: Path, error: OSError) -> StateNotWritable:
    return StateNotWritable(
        f"cannot write: {error.strerror}", where=str(path), remedy="free space or permissions, then start again"
    )
