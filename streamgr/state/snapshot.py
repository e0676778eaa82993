"""Snapshots: a partition's store in a shared directory, whole or absent, every file of it once.

    <root>/<topic>/p00003/files/<digest of the bytes>
    <root>/<topic>/p00003/<next offset>-<digest of the manifest>.json

The owner takes a checkpoint between two commits: hard links beside its store, in milliseconds. Another thread
(`uploader`) copies to `files` what is not there yet and, last of all, writes the manifest that names them; everything
is written beside its name, fsynced and renamed. So a reader sees a snapshot whole or not at all, and two who publish
the same partition (a new owner, a zombie) do not disturb each other: under one digest lies one content, and state is a
function of the log, so either's snapshot is as good. The newest few are kept. A file that none of them names goes an
hour after a publisher last wanted it: a slow reader or another publisher may still count on it.

A reader trusts nothing: names are checked before anything is written, sizes and digests while it is copied, and a store
appears under its name when all of it is there. A bad snapshot is passed over for an older one. The price of having none
is time, never data: the log is read again.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

import msgspec

from streamgr.errors import DataError, StateNotWritable, StreamgrError
from streamgr.files import UNFINISHED, appearing, sync_directory
from streamgr.state.store import SCHEMA, Store, partition_directory

FORMAT = 1
KEPT = 2
YOUNG_SECONDS = 3600.0  # what is younger is left alone
BLOCK_BYTES = 4 << 20  # read, hashed and written at a time; other threads run meanwhile
FILES = "files"
FILE_NAME, DIGEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"), re.compile(r"[0-9a-f]{64}")
MANIFEST_NAME = re.compile(r"\d{20}-[0-9a-f]{12}\.json")

Between = Callable[[], None]  # called between two blocks; what it raises ends the work, and nothing is left half done


class Origin(msgspec.Struct, frozen=True):
    """The log that a store is a function of."""

    cluster_id: str
    topic_id: str
    topic: str
    partition: int
    partitions: int


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is of, and how far it is. Times are ms; `watermark` is None before the first event."""

    origin: Origin
    schema: int
    fingerprint: str
    next_offset: int
    watermark: int | None
    created_ms: int


class File(msgspec.Struct, array_like=True, frozen=True):
    """One file of a store; its content lies under its digest (blake2b, 32 bytes, hex)."""

    name: str
    size: int
    digest: str


class Manifest(Facts, frozen=True, kw_only=True):
    """What makes files a snapshot. One whose names could lead out of a directory cannot be made."""

    bytes: int
    files: tuple[File, ...]

    def __post_init__(self) -> None:
        for file in self.files:
            if not (FILE_NAME.fullmatch(file.name) and DIGEST.fullmatch(file.digest) and file.size >= 0):
                raise ValueError(f"not a file of a store: {file}")
        names = {file.name for file in self.files}
        if len(names) < len(self.files) or "CURRENT" not in names:
            raise ValueError("not the files of one store: a name twice, or none is CURRENT")


class Envelope(msgspec.Struct, frozen=True):
    """The file of a manifest; the digest is over the body's bytes."""

    format: int
    digest: str
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A store as it was between two commits, in a directory that whoever publishes it removes."""

    directory: Path
    facts: Facts

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A manifest and where it lies."""

    path: Path
    manifest: Manifest

    def content(self, file: File) -> Path:
        return self.path.parent / FILES / file.digest


@dataclass(frozen=True, slots=True)
class Published:
    """A new snapshot, how much of it had to be copied, and what the publisher saw amiss around it."""

    snapshot: Snapshot
    copied_bytes: int
    problems: list[StreamgrError]


def partitions_in(directory: Path) -> list[Path]:
    """The partitions' places in a role's directory, or in a topic's of the shared one, in order."""
    return sorted(path for path in directory.glob("p[0-9]*") if path.name[1:].isdigit())


def take(store: Store, now_ms: int) -> Checkpoint:
    """Checkpoint a claimed store beside itself: on its owner's thread, between two commits.

    Raises as `Database.checkpoint` does.
    """
    meta, progress = store.meta, store.progress
    assert meta is not None, "a store is claimed first"
    directory = store.path.with_name(f".{store.path.name}.checkpoints") / token_hex(8)
    store.database.checkpoint(directory)
    facts = Facts(
        origin=Origin(meta.cluster_id, meta.topic_id, meta.topic, meta.partition, meta.partitions),
        schema=meta.schema,
        fingerprint=meta.fingerprint,
        next_offset=progress.next_offset,
        watermark=progress.watermark,
        created_ms=now_ms,
    )
    return Checkpoint(directory, facts)


class Snapshots:
    """All partitions' snapshots under `root`; of each origin the newest `kept` stay. One thread publishes."""

    def __init__(self, root: Path, *, kept: int = KEPT) -> None:
        self._root, self._kept = root, kept
        self._digests: dict[Path, dict[tuple[str, int, int, int], str]] = {}  # of SSTs, which never change

    def publish(self, checkpoint: Checkpoint, between: Between = lambda: None) -> Published:
        """Make a checkpoint a snapshot, then remove what is no longer needed; the checkpoint stays.

        Raises `StateNotWritable` where the root, `DataError` where the checkpoint is to blame.
        """
        home = self._home(checkpoint.facts.origin)
        try:
            (home / FILES).mkdir(parents=True, exist_ok=True)
            files, copied_bytes = self._bring_files(checkpoint.directory, home, between)
            snapshot = _write_manifest(home, checkpoint.facts, files)
        except OSError as error:
            raise _unwritable(error, home) from None
        return Published(snapshot, copied_bytes, self._tidy(checkpoint.facts.origin))

    def find(self, topic: str, partition: int) -> tuple[list[Snapshot], list[DataError]]:
        """A partition's snapshots, of any origin, newest first; and what is wrong with the manifests that are none."""
        home = partition_directory(self._root / topic, partition)
        snapshots: list[Snapshot] = []
        refused: list[DataError] = []
        try:
            paths = sorted(path for path in home.iterdir() if MANIFEST_NAME.fullmatch(path.name))
        except FileNotFoundError:
            return [], []  # none was published yet
        except OSError as error:
            return [], [_unreadable(error, home)]
        for path in paths:
            try:
                snapshots.append(Snapshot(path, _read(path)))
            except DataError as error:
                if path.exists():  # else another publisher has just tidied it away
                    refused.append(error)
        snapshots.sort(key=lambda s: (s.manifest.next_offset, s.manifest.created_ms), reverse=True)
        return snapshots, refused

    def forget(self, topic: str, partition: int) -> None:
        """Make all of a partition's snapshots none: nothing is to be restored from them."""
        for snapshot in self.find(topic, partition)[0]:
            snapshot.path.unlink(missing_ok=True)

    def restore(self, snapshot: Snapshot, target: Path, between: Between = lambda: None) -> None:
        """Copy a snapshot to `target`, which must not exist or be empty: all of it, on the disk, or nothing.

        Raises `DataError` where a file is missing or not what was published, `StateNotWritable` for the target.
        """
        staging = target.with_name(f".{target.name}.restoring")  # a name that nobody takes for a store's
        known = self._digests.setdefault(self._home(snapshot.manifest.origin), {})
        if any(target.iterdir()) if target.is_dir() else target.exists():
            remedy = "remove it first, if the snapshot is to take its place"
            raise StateNotWritable("something is here already", where=str(target), remedy=remedy)
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            for file in snapshot.manifest.files:
                _bring(snapshot.content(file), staging / file.name, file, between)
                known[_mark(staging / file.name)] = file.digest
            sync_directory(staging)
            staging.rename(target)
            sync_directory(target.parent)
        except OSError as error:
            raise _unwritable(error, target) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def restore_newest(
        self,
        origin: Origin,
        target: Path,
        why_not: Callable[[Manifest], str] = lambda manifest: "",
        between: Between = lambda: None,
    ) -> tuple[Manifest | None, list[DataError]]:
        """Restore the newest snapshot that fits and is sound (None: there is none), and why no newer one was taken.

        why_not: the caller's own reasons against one (the log's bounds, the fingerprint), empty for none. Raises
        `StateNotWritable` for the target.
        """
        passed_over: dict[Path, DataError] = {}
        while True:  # looks again each time: meanwhile others publish, and remove what is no longer new
            snapshots, refused = self.find(origin.topic, origin.partition)
            snapshot = next((s for s in snapshots if s.path not in passed_over), None)
            if snapshot is None:
                return None, [*refused, *passed_over.values()]
            try:
                _require_fit(snapshot, origin, why_not)
                self.restore(snapshot, target, between)
                return snapshot.manifest, [*refused, *passed_over.values()]
            except DataError as error:
                passed_over[snapshot.path] = error

    def _home(self, origin: Origin) -> Path:
        return partition_directory(self._root / origin.topic, origin.partition)

    def _bring_files(self, checkpoint: Path, home: Path, between: Between) -> tuple[list[File], int]:
        """Bring under its digest what is not there yet: the files, and how many bytes were copied."""
        known, seen = self._digests.setdefault(home, {}), {}
        files, copied_bytes = [], 0
        for path in sorted(checkpoint.iterdir()):
            mark = _mark(path)
            if mark not in known or path.suffix != ".sst":
                known[mark] = _copy(path, None, between)[1]
            seen[mark] = known[mark]
            file = File(path.name, path.stat().st_size, known[mark])
            target = home / FILES / file.digest
            if _size(target) == file.size:
                os.utime(target)  # wanted again: it stays until the manifest is there
            else:
                _bring(path, target, file, between)
                copied_bytes += file.size
            files.append(file)
        self._digests[home] = seen
        return files, copied_bytes

    def _tidy(self, origin: Origin) -> list[StreamgrError]:
        """Leave the newest snapshots of each origin, the files they name and young ones; what was amiss.

        A manifest that cannot be read may name any file: as long as there is one, nothing is removed.
        """
        home = self._home(origin)
        snapshots, refused = self.find(origin.topic, origin.partition)
        if refused:
            return [*refused]
        whole: Counter[Origin] = Counter()
        named: set[str] = set()
        try:
            for snapshot in snapshots:
                origin, files = snapshot.manifest.origin, snapshot.manifest.files
                if whole[origin] == self._kept:
                    snapshot.path.unlink(missing_ok=True)
                else:
                    whole[origin] += all(_size(snapshot.content(file)) == file.size for file in files)
                    named.update(file.digest for file in files)
            sync_directory(home)
            old = home.stat().st_mtime - YOUNG_SECONDS  # by the clock that also gave the files their times
            for path in [*home.iterdir(), *(home / FILES).iterdir()]:
                unwanted = DIGEST.fullmatch(path.name) and path.name not in named
                with suppress(FileNotFoundError):  # another publisher tidies up too
                    if (unwanted or path.suffix == UNFINISHED) and path.stat().st_mtime < old:
                        path.unlink()
        except OSError as error:
            return [_unwritable(error, home)]
        return []


def _write_manifest(home: Path, facts: Facts, files: list[File]) -> Snapshot:
    """The last step: from here on it is a snapshot."""
    manifest = Manifest(**msgspec.structs.asdict(facts), bytes=sum(file.size for file in files), files=tuple(files))
    body = msgspec.json.encode(manifest)
    digest = _digest(body)
    snapshot = Snapshot(home / f"{manifest.next_offset:020d}-{digest[:12]}.json", manifest)
    for file in files:
        os.utime(snapshot.content(file))  # there still, and wanted for another hour
    sync_directory(home / FILES)
    with appearing(snapshot.path) as out:
        out.write(msgspec.json.encode(Envelope(FORMAT, digest, msgspec.Raw(body))))
    sync_directory(home)
    return snapshot


def _read(path: Path) -> Manifest:
    """A manifest from its file. Raises `DataError` on damage and on another format."""
    try:
        envelope = msgspec.json.decode(path.read_bytes(), type=Envelope)
        if _digest(envelope.body) != envelope.digest:
            raise msgspec.DecodeError("not what was written")
        if envelope.format != FORMAT:
            raise msgspec.DecodeError(f"format {envelope.format}, this version reads {FORMAT}")
        return msgspec.json.decode(envelope.body, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        remedy = "an older one is taken; remove it when you have seen why, for until then nothing is tidied up"
        raise DataError(f"an unreadable manifest: {error}", where=str(path), remedy=remedy) from None
    except OSError as error:
        raise _unreadable(error, path) from None


def _require_fit(snapshot: Snapshot, origin: Origin, why_not: Callable[[Manifest], str]) -> None:
    """Raise `DataError` unless it is of this log and our schema, and the caller has nothing against it."""
    manifest = snapshot.manifest
    facts = {**msgspec.structs.asdict(manifest.origin), "schema": manifest.schema}
    wanted = {**msgspec.structs.asdict(origin), "schema": SCHEMA}
    different = ", ".join(
        f"{name} is {facts[name]!r}, not {wanted[name]!r}" for name in facts if facts[name] != wanted[name]
    )
    if why := different or why_not(manifest):
        remedy = "none, if another one or the log serves instead; else remove it"
        raise DataError(f"a snapshot that does not fit: {why}", where=str(snapshot.path), remedy=remedy)


def _bring(source: Path, target: Path, file: File, between: Between) -> None:
    """Copy a file. Raises `DataError` unless it is what it should be."""
    with appearing(target) as out:
        size, digest = _copy(source, out, between)
        if (size, digest) != (file.size, file.digest):
            what = f"{size} bytes, not {file.size}" if size != file.size else "its content has changed"
            remedy = "remove it: the next snapshot brings it again"
            raise DataError(f"damaged ({file.name} of the store): {what}", where=str(source), remedy=remedy)


def _copy(source: Path, into: BinaryIO | None, between: Between) -> tuple[int, str]:
    """(size, digest) of a file, copied on the way. Raises `DataError` where it cannot be read."""
    size, digest = 0, blake2b(digest_size=32)
    for block in _blocks(source):
        between()
        digest.update(block)
        if into:
            into.write(block)
        size += len(block)
    return size, digest.hexdigest()


def _blocks(source: Path) -> Iterator[memoryview]:
    """A file's bytes, each block in the place of the one before."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    try:
        with source.open("rb", buffering=0) as file:
            while n := file.readinto(buffer):
                yield buffer[:n]
    except OSError as error:
        raise _unreadable(error, source) from None


def _mark(path: Path) -> tuple[str, int, int, int]:
    """What tells an immutable file apart without reading it; hard links have it in common."""
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino


def _size(path: Path) -> int:
    """-1 where there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _digest(data: bytes | memoryview | msgspec.Raw) -> str:
    return blake2b(data, digest_size=32).hexdigest()


def _unwritable(error: OSError, path: Path) -> StateNotWritable:
    remedy = "free space or fix the permissions; the next attempt goes on where this one was"
    return StateNotWritable(f"cannot be written: {error.strerror}", where=str(error.filename or path), remedy=remedy)


def _unreadable(error: OSError, path: Path) -> DataError:
    remedy = "check that the volume is mounted and may be read; without it, an older snapshot or the log serves"
    return DataError(f"cannot be read: {error.strerror}", where=str(path), remedy=remedy)
