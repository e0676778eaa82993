"""A real trainer with a wish to die: as `tests.crash.worker`, at the points of a trainer's life.

    python -m tests.crash.trainer_worker --die-at mid_append:3 --told FILE --diary FILE trainer

The diary names every step before it is appended to the step log, and is never cut: the step log itself forgets what
the checkpoints hold. A step number that comes again takes the place of all from there on (`steplog`).

Beside the point's name it leaves what the disk is sure of: how many bytes of step log and prequential log were synced.
Who buries the process may cut the files there, as a loss of power does. Controls break what the exactness rests on:

    unsynced    the step log is not synced before a version is published
    apart       a checkpoint has the positions of the one before it: weights and positions are not saved as one
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from streamgr import cli, files
from streamgr.kafka.producer import Producer
from streamgr.train.checkpoint import Checkpoints, Facts
from streamgr.train.learner import Learner
from streamgr.train.outcomes import Outcomes
from streamgr.train.reader import ExamplesReader
from streamgr.train.steplog import Step, StepLog, _line
from streamgr.train.trainer import Trainer
from streamgr.train.versions import Versions
from streamgr.weights.log import ManifestLog
from streamgr.weights.publisher import Publisher
from tests.crash.worker import Death, Hook, around, die_with

POINTS = (
    "before_claim",
    "after_claim",  # the claim is in the log, what stands before it has not been read
    "in_recovery",
    "before_append",
    "mid_append",  # half a line of the step log is written
    "after_append",
    "in_learning",  # mapped and predicted, the weights not moved
    "after_learning",
    "after_cut",
    "before_sync",
    "after_sync",
    "before_chunks",
    "between_chunks",  # the broker has some
    "before_manifest",
    "in_manifest",  # sent, and nobody knows whether it arrived
    "after_manifest",  # acknowledged, and not noted yet
    "after_noted",
    "after_mkdir",  # of a checkpoint
    "mid_tensors",  # half their bytes are written
    "after_tensors",
    "after_facts",
    "before_rename",
    "after_rename",  # its directory is not synced: a machine may take it back to the point before
    "before_removal",  # of the oldest checkpoint
    "mid_removal",
    "before_forget",
    "before_replace",  # the shorter step log is written, beside the old one
    "after_replace",
)
BY_STEP = {"before_append", "mid_append", "after_append", "in_learning", "after_learning"}  # points of every step


class TrainersDeath(Death):
    """Waits at one point of a trainer's life, and knows which bytes are durable."""

    def __init__(self, point: str, passages: int, told: Path | None) -> None:
        super().__init__(point, passages, told)
        self._synced: dict[int, int] = {}  # inode: bytes
        self._chunks = 0  # of the version on its way

    def install(self) -> None:
        around(Publisher, "claim", before=self.at("before_claim"))
        around(ManifestLog, "start", before=self.at("after_claim"))
        around(ExamplesReader, "form_recorded", before=self.at("in_recovery"))
        around(StepLog, "append", before=self._append, after=self.at("after_append"))
        around(Learner, "_descend", before=self.at("in_learning"))
        around(Trainer, "_learn", after=self.at("after_learning"))
        around(Versions, "cut", after=self.at("after_cut"))
        around(StepLog, "sync", before=self.at("before_sync"), after=self.at("after_sync"))
        around(Producer, "send_all", before=self._send_chunks, after=self.at("before_manifest"))
        around(Producer, "_send", after=self._sent)
        around(Publisher, "_published", before=self.at("after_manifest"))
        around(Outcomes, "carried", after=self.at("after_noted"))
        around(files, "write", before=self._write, after=self._written)
        around(
            Path, "rename", before=self._of_a_checkpoint("before_rename"), after=self._of_a_checkpoint("after_rename")
        )
        around(shutil, "rmtree", before=self._remove)
        around(StepLog, "forget", before=self.at("before_forget"))
        around(Path, "replace", before=self._of_the_log("before_replace"), after=self._of_the_log("after_replace"))
        around(StepLog, "__init__", before=lambda _, path: self._survived(path))
        around(Outcomes, "__init__", before=lambda *args: self._survived(Path(args[3])))
        self._watch_syncs()

    def pass_by(self, point: str, last_words: Hook = lambda: None) -> None:
        def and_what_is_durable() -> None:
            last_words()
            if self._told is not None:
                self._told.with_suffix(".synced").write_text(json.dumps(self._synced))

        super().pass_by(point, and_what_is_durable)

    def _append(self, log: StepLog, step: Step) -> None:
        line = _line(step)
        self.pass_by("before_append")
        self.pass_by("mid_append", lambda: os.write(log._file.fileno(), line[: len(line) // 2]))

    def _send_chunks(self, *_: object) -> None:
        self._chunks = 0
        self.pass_by("before_chunks")

    def _sent(self, producer: Producer, topic: str, *_: object) -> None:
        """The second chunk: those so far are brought to the broker first."""
        if topic.endswith(".weights"):
            self._chunks += 1
            if self._chunks == 2:
                self.pass_by("between_chunks", lambda: producer._producer.flush(5))
        elif self._chunks:  # no claim
            self.pass_by("in_manifest")

    def _write(self, path: Path, data: bytes) -> None:
        if path.name == "tensors.safetensors":
            self.pass_by("after_mkdir")
            self.pass_by("mid_tensors", lambda: path.write_bytes(data[: len(data) // 2]))

    def _written(self, path: Path, *_: object) -> None:
        if path.name in ("tensors.safetensors", "checkpoint.json"):
            self.pass_by("after_tensors" if path.suffix == ".safetensors" else "after_facts")

    def _remove(self, path: Path) -> None:
        if path.parent.name == "checkpoints" and not path.name.startswith("."):
            self.pass_by("before_removal")
            self.pass_by("mid_removal", (path / "checkpoint.json").unlink)

    def _of_a_checkpoint(self, point: str) -> Hook:
        return lambda path, *_: path.parent.name == "checkpoints" and self.pass_by(point)

    def _of_the_log(self, point: str) -> Hook:
        return lambda path, *_: path.stem == "steps" and self.pass_by(point)

    def _survived(self, path: Path) -> None:
        """What is there when we begin has been through a death."""
        if path.is_file():
            self._synced[path.stat().st_ino] = path.stat().st_size

    def _watch_syncs(self) -> None:
        sync = os.fsync

        def watched(descriptor: int) -> None:
            before = os.fstat(descriptor)
            sync(descriptor)
            self._synced[before.st_ino] = before.st_size

        os.fsync = watched


def keep_diary(file: BinaryIO) -> None:
    """Every step, before it is appended."""
    around(StepLog, "append", before=lambda _, step: file.write(_line(step)))


def never_sync() -> None:
    StepLog.sync = lambda _: None  # type: ignore[method-assign]


def save_apart() -> None:
    save, before = Checkpoints.save, dict[int, Any]()

    def apart(self: Checkpoints, facts: Facts, tensors: dict[str, Any]) -> int:
        nonlocal before
        lanes, before = before or facts.lanes, msgspec.convert(msgspec.to_builtins(facts.lanes), type(facts.lanes))
        return save(self, msgspec.structs.replace(facts, lanes=lanes), tensors)

    Checkpoints.save = apart  # type: ignore[method-assign]


CONTROLS: dict[str, Callable[[], None]] = {"unsynced": never_sync, "apart": save_apart}


def main() -> int:
    parser = argparse.ArgumentParser(description="run a trainer that kills itself at a named point")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="whom to die with")
    parser.add_argument("--die-at", default="", metavar="POINT:N", help=f"one of {', '.join(POINTS)}; N-th passage")
    parser.add_argument("--told", type=Path, metavar="FILE", help="where to leave the point's name")
    parser.add_argument("--diary", type=Path, metavar="FILE", help="where to write down every step")
    parser.add_argument("--control", default="", choices=["", *CONTROLS])
    parser.add_argument("command", nargs=argparse.REMAINDER, help="streamgr's own command line")
    args = parser.parse_args()
    die_with(args.parent)
    if args.control:
        CONTROLS[args.control]()
    if args.die_at:
        point, _, passages = args.die_at.partition(":")
        if point not in POINTS:
            parser.error(f"no point {point!r}; there are {', '.join(POINTS)}")
        TrainersDeath(point, int(passages or 1), args.told).install()
    if args.diary:
        keep_diary(args.diary.open("ab", buffering=0))
    return cli.main(args.command)


if __name__ == "__main__":
    sys.exit(main())
