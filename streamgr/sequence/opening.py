"""How a partition opens: from the local disk, else from the newest sound snapshot, else from the start of its log.

A snapshot is taken instead of a local store where that is empty or damaged, where retention has overtaken it, where it
knows less than was emitted under other settings, or where the snapshot spares the reading of many records. Whatever it
opens from, nothing is taken on trust: the store must be this log's (`Store.claim`); all that was emitted after what it
knows must have been emitted under today's settings, so that it will be said again in the same words (decision 4); and
the log must still hold the next record. A local store that is damaged is set aside, not removed: its content is a
function of the log, so it can be had again.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamgr.clock import Clock, Deadline
from streamgr.config import Config
from streamgr.errors import ConfigError, Damaged, RetentionPassed, TryAgain
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.topics import Identity
from streamgr.sequence import examples as wire
from streamgr.sequence import origin
from streamgr.sequence.partition import Partition
from streamgr.service import Stop
from streamgr.state.rocks import Memory
from streamgr.state.snapshot import Manifest, Origin, Snapshots
from streamgr.state.store import Store, is_condemned, partition_directory
from streamgr.telemetry import Log, counter

DAMAGED = counter("state_damaged", "Local stores found damaged and set aside.")
FAR_RECORDS = 1_000_000  # a snapshot that is farther ahead of the local store than this replaces it
LAST_OUTPUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Opened:
    """An open partition, what it was opened from ("disk" | "snapshot" | "log"), and where its log ended then.

    changed: under other settings than its store was made with, so that older snapshots of it will not serve.
    """

    partition: Partition
    source: str
    end: int
    changed: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """The last record in the examples: made under which settings, and from which source offset."""

    fingerprint: str
    offset: int


@dataclass(frozen=True, slots=True)
class _Log:
    """A partition's log as it stands: whose it is, today's settings' digest, what it holds, what was last answered."""

    topic: Identity
    settings: str
    low: int
    end: int
    last: Answered | None


class Opener:
    """Opens the partitions of one role, each at its own offset."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        log: Log,
        stop: Stop,
        *,
        role: str,
        emits: bool,
        rebuild: bool = False,
        accept_loss: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """emits: false for a follower. rebuild: from the log alone, each partition once. `waiting` is called while a
        lock, the broker or a volume keeps us waiting.
        """
        self._config, self._clock, self._log, self._stop, self._waiting = config, clock, log, stop, waiting
        self._directory, self._emits = config.role_directory(role), emits
        self._rebuild, self._accept_loss, self._rebuilt = rebuild, accept_loss, set[int]()
        self._events, self._examples = config.topic("events"), config.topic("examples")
        self._memory = Memory(config.state)
        directory = config.state.snapshots_directory
        self.snapshots = Snapshots(Path(directory), kept=config.state.snapshots_kept) if directory else None

    def open(self, number: int, reader: Consumer, topic: Identity) -> Opened:
        """Open partition `number`.

        Raises `TryAgain` where another process holds it, `ConfigError` where it does not fit its log or its outputs,
        `RetentionPassed` where the log lacks its next record.
        """
        low, end = reader.bounds(self._events, number)
        last = self._last_output(number, reader) if self._emits else None
        log = _Log(topic, origin.fingerprint(topic.cluster_id, topic.topic_id, self._config.sequence), low, end, last)
        path = partition_directory(self._directory, number)
        store = self._locked(path)
        try:
            source = "disk" if store.progress.next_offset else "log"
            if self._rebuild and number not in self._rebuilt:
                store, source = self._emptied(store, number), "log"
            elif self.snapshots is not None and self._restored(self.snapshots, store, number, log):
                store, source = self._locked(path), "snapshot"
            fingerprint = self._fingerprint(store, number, log)
            self._require_records(store, number, low)
            settings = self._config.sequence
            meta = origin.meta(topic, self._events, number, settings, emits=self._emits, fingerprint=fingerprint)
            changed = store.meta is not None and store.meta.fingerprint != fingerprint
            store.claim(meta, follow=source == "snapshot" and not self._emits)
            partition = Partition(store, settings, fingerprint, emits=self._emits)
            if not store.progress.next_offset and low:
                self._log.warning("log_cut", "the log no longer starts at 0", partition=number, offset=low)
                partition.start_at(low)
        except BaseException:
            store.close()
            raise
        return Opened(partition, source, end, changed)

    def _locked(self, path: Path) -> Store:
        """The store at `path`, ours from now on; a damaged one makes room for a new one."""
        try:
            if is_condemned(path):
                raise Damaged("found damaged when it was used last", where=str(path))
            return Store(path, self._memory)
        except Damaged as error:
            aside = path.with_name(f".{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            DAMAGED.inc()
            self._log.error("state_damaged", f"set aside as {aside.name}: {error.what}", where=error.where)
            return Store(path, self._memory)

    def _emptied(self, store: Store, number: int) -> Store:
        """An empty store in the place of this one; its snapshots go with it, or they would be taken for newer."""
        store.close()
        shutil.rmtree(store.path)
        if self.snapshots is not None:
            self.snapshots.forget(self._events, number)
        self._rebuilt.add(number)
        return Store(store.path, self._memory)

    def _restored(self, snapshots: Snapshots, store: Store, number: int, log: "_Log") -> bool:
        """Put the newest snapshot that helps in the place of the store, which is closed then; whether there was one."""
        local, topic = store.progress.next_offset, log.topic
        useless = local < max(1, log.low) or bool(self._why_not(local, log))
        enough = local + (1 if useless else FAR_RECORDS)

        def why_not(manifest: Manifest) -> str:
            if manifest.next_offset < enough:
                return "the local store serves as well"
            if not log.low <= manifest.next_offset <= log.end:
                return f"its next record is {manifest.next_offset}, and the log holds {log.low} to {log.end}"
            if not self._emits and origin.settled(manifest.fingerprint)[0] != log.settings:
                return "it was made under other settings"
            return self._why_not(manifest.next_offset, log)

        if not any(s.manifest.next_offset >= enough for s in snapshots.find(self._events, number)[0]):
            return False
        started, fresh = self._clock.monotonic(), store.path.with_name(f".{store.path.name}.fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        home = Origin(topic.cluster_id, topic.topic_id, self._events, number, topic.partitions)
        manifest, refused = snapshots.restore_newest(home, fresh, why_not, self._waiting)
        for error in refused:
            self._log.warning("snapshot_refused", str(error), partition=number)
        if manifest is None:
            return False
        store.close()
        shutil.rmtree(store.path)
        fresh.rename(store.path)
        self._log.info(
            "snapshot_restored",
            partition=number,
            offset=manifest.next_offset,
            instead_of=local,
            bytes=manifest.bytes,
            seconds=round(self._clock.monotonic() - started, 3),
        )
        return True

    def _fingerprint(self, store: Store, number: int, log: "_Log") -> str:
        """What the outputs are to be marked with: as before, as long as the settings are the same."""
        offset, last = store.progress.next_offset, log.last
        if not self._emits:
            return log.settings
        if why := self._why_not(offset, log):
            remedy = (
                "start once with the old settings (streamgr sequencer --until-end), then with the new ones; where only "
                "these records are left and the old answers may stand: sequencer --rebuild --accept-loss"
            )
            raise ConfigError(why, where=f"{self._events}[{number}]", remedy=remedy)
        if last is not None and last.offset >= offset:
            return last.fingerprint
        if store.meta is not None and origin.settled(store.meta.fingerprint)[0] == log.settings:
            return store.meta.fingerprint
        return origin.fingerprint(log.topic.cluster_id, log.topic.topic_id, self._config.sequence, offset)

    def _why_not(self, offset: int, log: "_Log") -> str:
        """Why the records from `offset` on may not be answered under today's settings; empty where they may."""
        last = log.last
        if last is None or last.offset < offset:
            return ""
        settings, since = origin.settled(last.fingerprint)
        if settings != log.settings:
            return (
                f"settings that decide what is emitted have changed (fingerprint {settings} to {log.settings}), but "
                f"outputs of the old ones reach source offset {last.offset} and the store only {offset}: some records "
                "would get two different answers"
            )
        if offset < since and not self._accept_loss:
            return (
                f"today's settings (fingerprint {settings}) hold since source offset {since}, and the store reaches "
                f"only {offset}: the records between have been answered under other settings"
            )
        return ""

    def _require_records(self, store: Store, number: int, low: int) -> None:
        """Raise `RetentionPassed` where records that the store has not seen are gone from the log."""
        offset = store.progress.next_offset
        if offset >= low or (not offset and (self._accept_loss or not self._emits)):
            return
        remedy = "bring a snapshot (state.snapshots_directory), or accept the loss: sequencer --rebuild --accept-loss"
        if not self._emits:
            remedy = f"remove {store.path}: the sequences start again where the log does; then raise its retention.ms"
        raise RetentionPassed(
            f"{'the store reaches ' + str(offset) if offset else 'an empty store'}, and the log starts at {low}",
            where=f"{self._events}[{number}]@{offset}",
            remedy=remedy,
        )

    def _last_output(self, number: int, reader: Consumer) -> Answered | None:
        """The last record in the examples' partition."""
        low, high = reader.bounds(self._examples, number)
        if low == high:
            return None
        reader.assign({(self._examples, number): high - 1})
        patience = Deadline(self._clock, LAST_OUTPUT_SECONDS)
        while not (records := reader.poll(1, 0.2)):
            self._waiting()
            if self._stop or patience.passed():
                raise TryAgain(
                    "cannot read the last output",
                    where=f"{self._examples}[{number}]@{high - 1}",
                    remedy="start again when the broker is well",
                )
        output = wire.decode(records[0].value or b"")
        offset = output.offset - 1 if isinstance(output, wire.Progress) else output.position[0]
        return Answered(output.fingerprint, offset)
