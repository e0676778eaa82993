"""The store of one partition: whose log it belongs to, how far it has read it, and what it holds.

Everything a partition writes goes through one `Batch`: events, dictionaries, open labels, and `Progress`; so that what
is stored and the offset it was read up to can never disagree. Two processes never share a store: RocksDB's lock sees to
it. A store belongs to one incarnation of one topic; it refuses any other, and says what to do.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

from streamgr.errors import ConfigError, Damaged, DataError
from streamgr.state import codec
from streamgr.state.rocks import CONDEMNED, Batch, Database, Memory

SCHEMA = 3  # 2 had no `profiles`
FAMILIES = {"events": codec.UID_BYTES, "profiles": codec.UID_BYTES, "users": 0, "items": 0, "due": 0, "state": 0}


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """Whose store this is. `actions`: kinds in the order of their bits. `emits`: false for a follower.

    fingerprint: of the settings that decide what is emitted, and since when (`sequence.origin`).
    """

    schema: int = SCHEMA
    cluster_id: str
    topic_id: str
    topic: str
    partition: int
    partitions: int
    fingerprint: str
    actions: tuple[str, ...]
    window_ms: int
    keep_ms: int = 0
    emits: bool


class Progress(msgspec.Struct, array_like=True, frozen=True):
    """How far a partition is. `seen`: greatest event time counted, `watermark`: both ms, None before the first event.

    last: position of the last example. append_ms: of the last record read. open_impressions: labels not closed yet.
    """

    next_offset: int = 0
    seen: int | None = None
    watermark: int | None = None
    last: tuple[int, int] = (-1, -1)
    append_ms: int = 0
    open_impressions: int = 0


def partition_directory(role_directory: Path, partition: int) -> Path:
    """Where a role keeps a partition."""
    return role_directory / f"p{partition:05d}"


def is_condemned(path: Path) -> bool:
    """Whether a store was found damaged while it was in use."""
    return (path / CONDEMNED).exists()


class Store:
    """One partition's database, open for writing (one process) or, `read_only`, beside its writer."""

    def __init__(self, path: Path, memory: Memory, *, read_only: bool = False) -> None:
        """Raises as `Database` does, and `DataError` for a schema that this version cannot read."""
        self.path = path
        self.database = Database(path, memory, FAMILIES, read_only=read_only)
        try:
            self.meta = self._read_meta()
            if self.meta is not None and self.meta.schema != SCHEMA:
                raise DataError(
                    f"schema {self.meta.schema}, this version reads {SCHEMA}",
                    where=str(path),
                    remedy="run the version that wrote it, or remove the directory: it is rebuilt from the log",
                )
            self.progress = self._read_progress()
        except BaseException:
            self.database.close()
            raise

    def claim(self, meta: Meta, *, follow: bool = False) -> None:
        """Bind an empty store to its log, or check that it is this log's.

        follow: a sequencer's store becomes a follower's, who closes no labels. A changed fingerprint is the caller's to
        judge (`meta.fingerprint` before); it is stored from now on. Raises `ConfigError` for another cluster, topic,
        partition or partition count, or action kinds that are not an extension.
        """
        old, remedy = self.meta, f"remove {self.path} to rebuild it from the log, or go back to what it was made from"
        if old is not None:
            if follow:
                old = msgspec.structs.replace(old, emits=meta.emits)
            for what in ("cluster_id", "topic", "topic_id", "partition", "partitions", "emits"):
                was, now = getattr(old, what), getattr(meta, what)
                if was != now:
                    story = {
                        "topic_id": "the topic was recreated",
                        "partitions": "the partition count changed, users have moved",
                        "emits": "a follower's store is not a sequencer's",
                    }.get(what, "this is another log")
                    raise ConfigError(f"{story}: {what} was {was!r}, is {now!r}", where=str(self.path), remedy=remedy)
            if meta.actions[: len(old.actions)] != old.actions:
                raise ConfigError(
                    f"sequence.actions was {[*old.actions]}, is {[*meta.actions]}: kinds may only be added at the end",
                    where=str(self.path),
                    remedy="a kind's place in the list is its bit in what is stored; put the old ones first",
                )
        if self.meta != meta:
            batch = self.batch()
            if not meta.emits:
                batch.delete_prefix("due", b"", codec.DUE_KEY_BYTES)
            batch.put("state", b"meta", msgspec.json.encode(meta))
            self.database.write(batch)
            self.meta = meta

    def batch(self) -> Batch:
        return self.database.batch()

    def write(self, batch: Batch, progress: Progress) -> None:
        """The one write: what `batch` holds and how far we are, together."""
        batch.put("state", b"progress", msgspec.msgpack.encode(progress))
        self.database.write(batch)
        self.progress = progress

    def events(self, user: bytes, before: int | None = None) -> Iterator[tuple[bytes, int, int, codec.Stored]]:
        """(key, time, kind, event) of one user, newest first (unordered within a millisecond), with time < `before`."""
        if before is not None and before <= 0:
            return
        for key, value in self.database.scan_prefix("events", codec.scan_key(user, before)):
            try:
                event = codec.decode_event(value)
            except Damaged as error:
                self.database.condemn()
                raise Damaged(error.what, where=str(self.path)) from None
            yield key, *codec.split_event_key(key), event

    def profiles(self, user: bytes) -> Iterator[tuple[int, codec.Stored]]:
        """(time, event) of a user's profile events, in no useful order."""
        keys = [key for key, _ in self.database.scan_prefix("profiles", user)]
        for key, value in zip(keys, self.database.get_many("events", keys), strict=True):
            try:
                if value is None:
                    raise Damaged(f"a profile of user key {user.hex()} is missing", where=str(self.path))
                event = codec.decode_event(value)
            except Damaged as error:
                self.database.condemn()
                raise Damaged(error.what, where=str(self.path)) from None
            yield codec.split_event_key(key)[0], event

    def has_profiles(self) -> bool:
        """Whether anybody has one."""
        return next(iter(self.database.scan("profiles")), None) is not None

    def count(self, user: bytes, limit: int) -> int:
        """How many events a user has, counted up to `limit`."""
        return sum(1 for _ in islice(self.database.scan_prefix("events", user), limit))

    def has_event(self, key: bytes) -> bool:
        return self.database.get("events", key) is not None

    def has_user(self, uid: bytes, user: str) -> bool:
        """Whether the user is known; `uid` is his key. Raises `DataError` should two users share it."""
        known = self.user_text(uid)
        if known is not None and known != user:
            raise DataError(
                f"users {known!r} and {user!r} share the key {uid.hex()}",
                where=str(self.path),
                remedy="rename one of them at its source: their sequences would mix",
            )
        return known is not None

    def user_text(self, uid: bytes) -> str | None:
        """The user behind a key; None if there is none."""
        value = self.database.get("users", uid)
        return None if value is None else value.decode()

    def item_text(self, key: int) -> str | None:
        value = self.database.get("items", codec.item_bytes(key))
        return None if value is None else value.decode()

    def item_texts(self, keys: list[int]) -> list[str | None]:
        values = self.database.get_many("items", [codec.item_bytes(key) for key in keys])
        return [None if value is None else value.decode() for value in values]

    def users(self) -> Iterator[str]:
        """Every user's text, in no useful order."""
        for _, text in self.database.scan("users"):
            yield text.decode()

    def user_keys(self, start: bytes) -> Iterator[bytes]:
        """Every user's key from `start` on, ascending."""
        for key, _ in self.database.scan("users", start):
            yield key

    def due(self, after: int) -> Iterator[tuple[bytes, int, bytes, int | None]]:
        """(key, step, user's key, behind) of the open labels that close at a step later than `after`, by step."""
        for key, _ in self.database.scan("due", codec.due_key(after + 1)):
            yield key, *codec.split_due_key(key)

    def sync(self) -> None:
        """What is written survives a power failure from now on."""
        self.database.sync()

    def close(self) -> None:
        self.database.close()

    def _read_meta(self) -> Meta | None:
        raw = self.database.get("state", b"meta")
        try:
            return None if raw is None else msgspec.json.decode(raw, type=Meta)
        except codec.UNREADABLE as error:
            raise Damaged(f"unreadable meta: {error}", where=str(self.path)) from None

    def _read_progress(self) -> Progress:
        raw = self.database.get("state", b"progress")
        try:
            return Progress() if raw is None else msgspec.msgpack.decode(raw, type=Progress)
        except codec.UNREADABLE as error:
            raise Damaged(f"unreadable progress: {error}", where=str(self.path)) from None
