"""What an operator does with stores: look, verify, back up, restore, have a user forgotten.

A backup is a set of snapshots (`state.snapshot`), so the shared directory that running sequencers write to is one too.
A store that is in use cannot be backed up from outside: its owner's lock says so, and its owner takes snapshots itself.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamgr.clock import Clock
from streamgr.config import Config, State
from streamgr.errors import DataError, StreamgrError, TryAgain
from streamgr.events import MAX_ID, PROFILE, item_key
from streamgr.kafka.producer import Producer
from streamgr.kafka.topics import identity
from streamgr.sequence.views import ROLES, store_paths, stores
from streamgr.state import codec
from streamgr.state.rocks import Memory
from streamgr.state.snapshot import Origin, Snapshots, take
from streamgr.state.store import Store, partition_directory

Json = dict[str, Any]
CONFIRM_SECONDS = 30.0
SHOWN = 10  # of what is wrong in a partition, so much is named


def show(state_directory: Path) -> Iterator[Json]:
    """Each partition's store: whose it is and how far. Raises `DataError` where there is none."""
    for store in stores(state_directory):
        try:
            yield _facts(store)
        finally:
            store.close()


def verify(state_directory: Path) -> Iterator[Json]:
    """Read every byte of every store and hold it against everything else it says.

    One object a partition: what there is, `ok`, and the first problems by name. Raises `DataError` where there is none.
    """
    memory = Memory(State())
    for path in store_paths(*(state_directory / role for role in ROLES), state_directory):
        counts, problems, facts = {"events": 0, "users": 0, "items": 0, "timers": 0}, list[str](), {"store": str(path)}
        try:
            store = Store(path, memory, read_only=True)
            try:
                facts |= _facts(store)
                for problem in _problems(store, counts):
                    problems.append(problem)
                    if len(problems) == SHOWN:
                        break
            finally:
                store.close()
        except StreamgrError as error:
            problems.append(str(error))
        yield {**facts, **counts, "ok": not problems, "problems": problems}


def backup(state_directory: Path, role: str, target: Path, kept: int, clock: Clock) -> Iterator[Json]:
    """A snapshot of each of a role's partitions in `target`. Raises `TryAgain` where the role is running."""
    snapshots, memory = Snapshots(target, kept=kept), Memory(State())
    for path in store_paths(state_directory / role):
        try:
            store = Store(path, memory)
        except TryAgain as error:
            remedy = "stop the role, or let it take snapshots itself (state.snapshots_directory): they are backups too"
            raise TryAgain(error.what, where=error.where, remedy=remedy) from None
        try:
            checkpoint = take(store, clock.now_ms())
        finally:
            store.close()
        try:
            published = snapshots.publish(checkpoint)
        finally:
            checkpoint.remove()
        manifest = published.snapshot.manifest
        yield {
            "topic": manifest.origin.topic,
            "partition": manifest.origin.partition,
            "next_offset": manifest.next_offset,
            "bytes": manifest.bytes,
            "copied_bytes": published.copied_bytes,
            "manifest": str(published.snapshot.path),
        }


def restore(config: Config, directory: Path, source: Path) -> Iterator[Json]:
    """The newest sound snapshot of each partition as a store in a role's directory, where there is none yet.

    Only snapshots of this very topic are taken (the broker is asked which that is). Raises `StateNotWritable` where a
    store is there already, `DataError` where no partition has a snapshot.
    """
    topic = config.topic("events")
    log, snapshots, found = identity(config.kafka, topic), Snapshots(source), 0
    for number in range(log.partitions):
        origin = Origin(log.cluster_id, log.topic_id, topic, number, log.partitions)
        target = partition_directory(directory, number)
        manifest, refused = snapshots.restore_newest(origin, target)
        row: Json = {"topic": topic, "partition": number, "refused": [str(error) for error in refused]}
        if manifest is not None:
            found += 1
            row |= {"next_offset": manifest.next_offset, "bytes": manifest.bytes, "store": str(target)}
        yield row
    if not found:
        raise DataError(
            f"no snapshot of {topic} that fits", where=str(source), remedy="name the directory given to `state backup`"
        )


def erase(config: Config, user: str) -> Json:
    """Publish the record that makes every store forget the user, on replay too.

    Raises `DataError` for what is no user id, `TryAgain` where the broker does not answer.
    """
    if not 1 <= len(user) <= MAX_ID:
        raise DataError(f"a user id has 1 to {MAX_ID} characters, not {len(user)}", remedy="name the user")
    producer = Producer(config.kafka, client_id="streamgr-erase")
    try:
        topic = config.topic("events")
        offset = producer.send_confirmed(topic, None, key=user.encode(), timeout=CONFIRM_SECONDS)
    finally:
        producer.close()
    return {"user_id": user, "topic": topic, "offset": offset}


def _facts(store: Store) -> Json:
    meta, progress = store.meta, store.progress
    assert meta is not None
    return {
        "store": str(store.path),
        "topic": meta.topic,
        "partition": meta.partition,
        "partitions": meta.partitions,
        "emits": meta.emits,
        "next_offset": progress.next_offset,
        "watermark": progress.watermark,
        "open_impressions": progress.open_impressions,
        "fingerprint": meta.fingerprint,
        "actions": list(meta.actions),
        "bytes": store.database.size_bytes(),
    }


def _problems(store: Store, counts: dict[str, int]) -> Iterator[str]:
    """Whatever does not agree within a store; counts what is read."""
    database, progress = store.database, store.progress
    users = set()
    for uid, text in database.scan("users"):
        counts["users"] += 1
        users.add(uid)
        if uid != codec.uid(text.decode(errors="replace")):
            yield f"user {text!r} lies under the key {uid.hex()}, which is not his"
    items = set()
    for key, text in database.scan("items"):
        counts["items"] += 1
        items.add(key)
        if key != codec.item_bytes(item_key(text.decode(errors="replace"))):
            yield f"item {text!r} lies under the key {key.hex()}, which is not its own"
    for key, value in database.scan("events"):
        counts["events"] += 1
        event, (time, kind) = codec.decode_event(value), codec.split_event_key(key)
        where = f"event {event.event_id!r} of user key {key[: codec.UID_BYTES].hex()}"
        if key != codec.event_key(key[: codec.UID_BYTES], time, kind, event.event_id):
            yield f"{where} lies under another event's key"
        if key[: codec.UID_BYTES] not in users:
            yield f"{where}: the user has no name"
        if kind == PROFILE and database.get("profiles", key) is None:
            yield f"{where} is missing among the profiles"
        if kind != PROFILE and codec.item_bytes(event.item) not in items:
            yield f"{where}: its item {event.item:016x} has no text"
        if event.offset >= progress.next_offset:
            yield f"{where} comes from offset {event.offset}, and the store says that {progress.next_offset} is next"
    for key, _ in database.scan("profiles"):
        if database.get("events", key) is None:
            yield f"a profile of user key {key[: codec.UID_BYTES].hex()} that is no event"
    for key, _ in database.scan("due"):
        counts["timers"] += 1
        step, _, _ = codec.split_due_key(key)
        if progress.watermark is None or step <= progress.watermark:
            yield f"a timer for {step}, which the watermark {progress.watermark} has passed"
