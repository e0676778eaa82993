"""The step log: where each training step ended, so that a crash can be walked again step by step (decision 6).

A step is a function of the weights before it and of its end positions, one per partition. One JSON line a step is
appended before the step's weights leave the process, and fsynced before any version that contains them is published.
After a crash the steps since the checkpoint are formed again from these lines, so the same versions come out, bit for
bit on CPU. What was written but not yet synced may be lost with the machine: no version can have contained it.

The publishing thread syncs while the loop appends; only with a file being replaced must it not meet.

A line begins with CRC-32 and length of its JSON: a position that has changed is a position as good as any other, and a
line that was synced must be told from one that a crash has torn. A last line shorter than it says is torn, and cut off;
anything else that is not as it was written is damage.
"""

import os
import threading
import zlib
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
HEAD = 18  # bytes before a line's JSON
GARBAGE = (ValueError, msgspec.DecodeError, RecursionError)  # what reading some may raise


class StepLog:
    """An append-only file of steps. Raises `StateNotWritable` when the disk refuses, `DataError` when damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._in_place = threading.Lock()  # held while the file is synced, or replaced
        self.steps = self._read()
        self._file = self._open()

    def append(self, step: Step) -> None:
        try:
            self._file.write(_line(step))
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
                files.write(temporary, b"".join(map(_line, self.steps)))
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
        try:
            data = self._path.read_bytes()
            end = data.rfind(b"\n") + 1
            steps = [_step(line) for line in data[:end].split(b"\n")[:-1]]
            if end < len(data):
                _require_torn(data[end:])
                os.truncate(self._path, end)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _refused(self._path, error) from None
        except GARBAGE as error:
            raise DataError(
                f"not a step log, or damaged: {error}",
                where=str(self._path),
                remedy="restore the trainer's state directory from a backup, or remove it to start a new lineage; if "
                "the machine lost its power, cut the file off behind its last good line: nothing else was published",
            ) from None
        return steps


def _line(step: Step) -> bytes:
    body = msgspec.json.encode(step)
    return b"%08x %08x %b\n" % (zlib.crc32(body), len(body), body)


def _step(line: bytes) -> Step:
    """What a line without its newline says; raises one of `GARBAGE`."""
    head, body = line[:HEAD], line[HEAD:]
    if head != b"%08x %08x " % (zlib.crc32(body), len(body)):
        raise ValueError(f"{line[:60]!r} is not what was written")
    return _decoder.decode(body)


def _require_torn(tail: bytes) -> None:
    """What follows the last newline: raises `ValueError` unless it is the beginning of a line."""
    begins = set(tail[:HEAD]) <= set(b"0123456789abcdef ")
    if not begins or len(tail) > HEAD + int(tail[9:17] or b"0", 16):
        raise ValueError(f"{tail[:60]!r} is not the beginning of a step")


def _refused(path: Path, error: OSError) -> StateNotWritable:
    return StateNotWritable(
        f"cannot write: {error.strerror}", where=str(path), remedy="free space or permissions, then start again"
    )
