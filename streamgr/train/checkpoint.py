"""Checkpoints: all that a later step depends on, whole or absent.

One directory a checkpoint, named by its step: `tensors.safetensors` and `checkpoint.json`, which holds the facts and
one digest over both: a changed byte is a damaged checkpoint, never another position or step. Written beside its name,
fsynced, renamed, and the parent fsynced: a crash leaves a directory that begins with a dot and is removed at the next
save. A second one of the same step (positions move while nothing is learned) is named `<step>.1` and so on, so nothing
is removed before its successor is there. The two newest are kept. A newest one that is damaged is passed over with a
warning, which costs time but no bits: the step log reaches back to the oldest one kept.
"""

import fcntl
import re
import shutil
from hashlib import sha256
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from streamgr import __version__, files
from streamgr.errors import ConfigError, DataError, StateNotWritable, TryAgain
from streamgr.telemetry import DURATION_BUCKETS, Log, gauge, histogram
from streamgr.train.lane import LaneState
from streamgr.weights.manifest import model_differences

FORMAT = 2  # 1 had no digest over the facts
KEPT = 2
NAME = re.compile(r"\d{12}(\.\d+)?")
DURATION = histogram("train_checkpoint_duration_seconds", "From state to renamed directory.", (), DURATION_BUCKETS)
WRITTEN = gauge("train_checkpoint_timestamp_seconds", "When the newest checkpoint was written.")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What stands beside the tensors. `architecture` is `Manifest.model`, lanes by partition, times in ms."""

    step: int
    watermark_ms: int
    targets_learned: int
    architecture: dict[str, Any]
    seed: int
    lanes: dict[int, LaneState]
    version: int  # the newest published by this lineage, 0 for none
    horizon_ms: int
    log_bytes: int  # length of the prequential log at this step
    written_ms: int


class Head(msgspec.Struct, frozen=True):
    """What every format begins with."""

    format: int
    code: str  # the version of streamgr that wrote it


class Envelope(Head, frozen=True):
    """The file `checkpoint.json`."""

    sha256: str  # of tensors.safetensors and, after it, the facts as they stand here
    facts: msgspec.Raw


_head, _envelope, _facts = msgspec.json.Decoder(Head), msgspec.json.Decoder(Envelope), msgspec.json.Decoder(Facts)
GARBAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what reading some may raise


class Checkpoints:
    """The checkpoints of one trainer, under `directory`."""

    def __init__(self, directory: Path, log: Log) -> None:
        self._directory, self._log = directory, log

    def save(self, facts: Facts, tensors: dict[str, Tensor]) -> int:
        """Write one; returns the step of the oldest checkpoint kept. Raises `StateNotWritable`."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for stale in self._directory.glob(".*"):
                shutil.rmtree(stale)
            name = f"{facts.step:012d}"
            if same := [again for step, again in map(_order, self._found()) if step == facts.step]:
                name += f".{max(same) + 1}"
            temporary, final = self._directory / f".{name}", self._directory / name
            temporary.mkdir()
            data = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
            files.write(temporary / "tensors.safetensors", data)
            body = msgspec.json.encode(facts)
            envelope = Envelope(FORMAT, __version__, _digest(data, body), msgspec.Raw(body))
            files.write(temporary / "checkpoint.json", msgspec.json.encode(envelope))
            files.sync_directory(temporary)
            temporary.rename(final)
            files.sync_directory(self._directory)
            for old in self._found()[KEPT:]:
                shutil.rmtree(old)
        except OSError as error:
            raise StateNotWritable(
                f"cannot write a checkpoint: {error.strerror}",
                where=str(self._directory),
                remedy="free space or permissions, then start again: nothing is lost",
            ) from None
        WRITTEN.set(facts.written_ms / 1000)
        return _order(self._found()[-1])[0]

    def load(self, architecture: dict[str, Any], seed: int) -> tuple[Facts, dict[str, Tensor]] | None:
        """The newest whole one, or None where there is none.

        Raises `ConfigError` where it belongs to another model, `DataError` where all are damaged or of a newer format.
        """
        found = self._found()
        for path in found:
            _require_format(path)
            try:
                facts, tensors = _read(path)
            except DataError as error:
                self._log.warning("checkpoint_damaged", str(error))
                continue
            differences = model_differences(facts.architecture, architecture)
            if facts.seed != seed:
                differences.append(f"trainer.seed: {facts.seed!r} is not {seed!r}")
            if differences:
                raise ConfigError(
                    "the checkpoint belongs to another model: " + ", ".join(differences),
                    where=str(path),
                    remedy="start with the settings it was written with, or remove the directory to train anew",
                )
            return facts, tensors
        if found:
            raise DataError(
                "no checkpoint can be read",
                where=str(self._directory),
                remedy="restore the directory from a backup, or remove the trainer's state to train anew",
            )
        return None

    def _found(self) -> list[Path]:
        """Newest first."""
        return _found(self._directory)


def newest(directory: Path) -> tuple[Path, Facts | None, list[DataError]] | None:
    """The newest checkpoint that is whole, and what is wrong with newer ones; facts are None where none is whole.

    None where there is no checkpoint at all. Raises `DataError` for one of another format.
    """
    problems: list[DataError] = []
    found = _found(directory)
    for path in found:
        _require_format(path)
        try:
            return path, _read(path)[0], problems
        except DataError as error:
            problems.append(error)
    return (directory, None, problems) if found else None


def _found(directory: Path) -> list[Path]:
    """Newest first; none where there is no directory."""
    return sorted((p for p in directory.glob("*") if NAME.fullmatch(p.name)), key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    """(step, which one of that step) of a checkpoint's directory."""
    step, _, again = path.name.partition(".")
    return int(step), int(again or 0)


def _require_format(path: Path) -> None:
    """A checkpoint of another format is no damage to pass over: raise `DataError`."""
    try:
        head = _head.decode((path / "checkpoint.json").read_bytes())
    except (OSError, *GARBAGE):
        return  # damaged: `_read` says how
    if head.format != FORMAT:
        raise DataError(
            f"format {head.format}, this version reads {FORMAT}",
            where=str(path),
            remedy=f"start the version that wrote it: {head.code}",
        )


def _read(path: Path) -> tuple[Facts, dict[str, Tensor]]:
    remedy = "the one before it is used; remove the directory when you have seen why"
    try:
        envelope = _envelope.decode((path / "checkpoint.json").read_bytes())
        data = (path / "tensors.safetensors").read_bytes()
        if _digest(data, envelope.facts) != envelope.sha256:
            raise DataError("its tensors and facts are not what was written", where=str(path), remedy=remedy)
        return _facts.decode(envelope.facts), load_tensors(data)
    except (OSError, SafetensorError, *GARBAGE) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), remedy=remedy) from None


def _digest(tensors: bytes, facts: bytes | msgspec.Raw) -> str:
    digest = sha256(tensors)
    digest.update(facts)
    return digest.hexdigest()


def lock(directory: Path) -> TextIOWrapper:
    """Make the trainer's directory ours while the file returned is open. Raises `TryAgain`, `StateNotWritable`."""
    path = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        remedy = "one trainer a state directory: stop the other one first"
        raise TryAgain("another trainer holds the directory", where=str(path), remedy=remedy) from None
    except OSError as error:
        remedy = "check state.directory, its owner and free space"
        raise StateNotWritable(f"cannot be written: {error.strerror}", where=str(path), remedy=remedy) from None
    return file
