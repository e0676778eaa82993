"""One partition of the events, from records to one write and its outputs; no Kafka, no clock.

What comes out is a function of the records alone: how they are cut into batches, when they are committed and how often
the process restarts change nothing. `apply` changes the state in memory and fills one `Batch`; `commit` writes that
batch with the next offset. Dropping a partition that has not committed loses nothing: its records come again and say
the same.

Per event: find the user's tail (read back from the store where it is not at hand), the event's place in it (or that it
is there already), what it joins; then schedule when its label closes. Per step of the watermark: the users who have
something due, by name; their targets, cut into examples.
"""

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from streamgr import config
from streamgr.clock import milliseconds
from streamgr.errors import DataError
from streamgr.events import (
    IMPRESSION,
    PROFILE,
    BadRecord,
    Decoder,
    Erasure,
    Event,
    Heartbeat,
    History,
    Record,
    item_key,
    request_key,
)
from streamgr.sequence import examples as wire
from streamgr.sequence import join
from streamgr.sequence.tail import EVER, NOTHING, Tail, Token, ranks
from streamgr.sequence.watermark import Watermark
from streamgr.state import codec
from streamgr.state.store import Progress, Store

KNOWN_ITEMS = 1 << 18  # item texts kept in memory


@dataclass(slots=True)
class Applied:
    """What a batch of records gave. `kinds` counts new events by kind name; times in ms."""

    examples: list[wire.Example] = field(default_factory=list)
    dead_letters: list[tuple[Record, BadRecord]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    records: int = 0
    duplicates: int = 0
    late: int = 0
    targets: int = 0
    ages_ms: list[int] = field(default_factory=list)  # append minus event time of the batch's first and last event


class Partition:
    """The writer of one store. Not thread safe."""

    def __init__(self, store: Store, settings: config.Sequence, fingerprint: str, *, emits: bool = True) -> None:
        """Goes on where the store is. `emits` False: a follower, which keeps sequences and closes no labels."""
        self.store, self.fingerprint, self._emits = store, fingerprint, emits
        self._window = milliseconds(settings.attribution_window_seconds)
        lateness, step = milliseconds(settings.lateness_seconds), max(1, milliseconds(settings.close_step_seconds))
        self._history, self._cached = settings.history_length, max(1, settings.cached_users)
        self._names = ["profile", "impression", *settings.actions]
        self._rank = ranks(settings.actions)
        self._decoder = Decoder(
            settings.actions, milliseconds(settings.max_future_seconds), self._window + lateness + step
        )
        p = store.progress
        self.next_offset, self.append_ms, self.last, self.open_impressions = (
            p.next_offset,
            p.append_ms,
            p.last,
            p.open_impressions,
        )
        self._watermark = Watermark(lateness, step, milliseconds(settings.max_step_seconds), p.seen, p.watermark)
        self._tails: dict[str, Tail] = {}  # least recently used first
        self._items: dict[int, str] = {}
        self._due: dict[int, dict[str, int]] = {}  # step -> user -> time of the oldest event that waits
        for due_step, user, oldest in store.due():
            self._due.setdefault(due_step, {})[user] = oldest
        self._steps = list(self._due)
        heapq.heapify(self._steps)
        self._begin()

    @property
    def watermark(self) -> int | None:
        """Event ms; None before the first event."""
        return self._watermark.value

    @property
    def newest_event_ms(self) -> int | None:
        """The greatest event time counted."""
        return self._watermark.seen

    @property
    def pending(self) -> bool:
        """Whether there is anything to commit."""
        return self.next_offset != self.store.progress.next_offset

    def progress(self) -> wire.Progress | None:
        """What to tell the readers of the examples; None before the first event."""
        if self.watermark is None:
            return None
        return wire.Progress(wire.FORMAT, self.fingerprint, self.next_offset, self.watermark, self.append_ms)

    def start_at(self, offset: int) -> None:
        """Begin a store of a log that no longer starts at 0 (its loss accepted)."""
        self.next_offset = offset

    def apply(self, records: Sequence[Record]) -> Applied:
        """Take the next records, in offset order; those below `next_offset` are passed over.

        Raises `DataError` where two texts share a key.
        """
        if records and records[0].offset < self.next_offset:
            records = [r for r in records if r.offset >= self.next_offset]
        out = Applied(records=len(records))
        for record, outcome in zip(records, self._decoder.decode(records), strict=True):
            self.append_ms = record.append_ms
            if type(outcome) is Event:
                new = self._event(outcome, record, out)
                time = outcome.time
            elif type(outcome) is Heartbeat:
                new, time = True, outcome.time
                out.kinds["heartbeat"] += 1
            elif type(outcome) is Erasure:
                new = False
                self._erase(outcome.user)
                out.kinds["erasure"] += 1
            else:
                new = False
                out.dead_letters.append((record, outcome))  # type: ignore[arg-type]
            self.next_offset = record.offset + 1
            if new:
                before = self._watermark.value
                if self._watermark.advance(time) and self._emits:
                    self._close(before, record, out)
        return out

    def commit(self) -> None:
        """Write everything applied so far, with the next offset, in one batch. Raises as `Database.write` does."""
        mark = self._watermark
        progress = Progress(self.next_offset, mark.seen, mark.value, self.last, self.append_ms, self.open_impressions)
        self.store.write(self._batch, progress)
        for user in self._touched:
            if tail := self._tails.get(user):
                self._trim(tail)
        if len(self._items) > KNOWN_ITEMS:
            self._items.clear()
        self._begin()

    def history(self, user: str, before: int, limit: int) -> History | None:
        """The user's newest `limit` impressions and actions with time < `before`, oldest first; None if unknown."""
        if not self.knows(user):
            return None
        tail = self._open(user)
        self._cover(tail, user, before, limit)
        end = bisect_left(tail.times, before)
        return tail.window(max(0, end - limit), end)

    def knows(self, user: str) -> bool:
        """Whether there is anything of this user."""
        return user in self._tails or (user not in self._erased and self.store.has_user(user))

    def item_text(self, key: int) -> str | None:
        return self._items.get(key) or self.store.item_text(key)

    def _begin(self) -> None:
        """An empty batch; nothing pending."""
        self._batch = self.store.batch()
        self._touched: set[str] = set()  # users with something in the batch: their tails may not go
        self._erased: set[str] = set()  # users whose stored events are gone once the batch is written
        self._profiles: set[bytes] = set()  # keys of profile events in the batch

    def _event(self, e: Event, record: Record, out: Applied) -> bool:
        """Take one event; false if it was here already."""
        kind, time, user = e.kind, e.time, e.user
        tail = self._open(user)
        item, request, due, late = 0, 0, codec.NEVER, False
        if kind == PROFILE:
            if self._has_profile(user, e):
                out.duplicates += 1
                return False
        else:
            item, request = item_key(e.item), request_key(e.request)
            self._cover(tail, user, time if kind == IMPRESSION else time - self._window + 1)
            i = tail.place(time, kind, e.event_id, self._rank)
            if i < 0:
                out.duplicates += 1
                return False
            if kind == IMPRESSION:
                late = self._watermark.reached(time + self._window)
                due = codec.NEVER if late else time + self._window
            else:
                j = join.find(tail, i, time, item, request, window_ms=self._window)
                late = j >= 0 and self._watermark.reached(tail.times[j] + self._window)
                if j < 0:  # organic so far: a target when the watermark reaches it, at the next step if it has
                    due = time if not self._watermark.reached(time) else self._watermark.value + 1  # type: ignore[operator]
            tail.insert(i, Token(time, kind, e.event_id, item, request, record.append_ms, due, late))
            self._name(item, e.item)
            if due >= 0:
                self._schedule(due, user, time)
                self.open_impressions += kind == IMPRESSION and self._emits
        self._touched.add(user)
        stored = codec.Stored(
            e.event_id, item, record.append_ms, due, late, record.offset, e.request, e.surface, e.position, e.features
        )
        key = codec.event_key(codec.uid(user), time, kind, e.event_id)
        self._batch.put("events", key, codec.encode_event(stored))
        if kind == PROFILE:
            self._profiles.add(key)
        out.kinds[self._names[kind]] += 1
        out.late += late
        if len(out.ages_ms) < 2:
            out.ages_ms.append(record.append_ms - time)
        else:
            out.ages_ms[1] = record.append_ms - time
        return True

    def _open(self, user: str) -> Tail:
        """The user's tail, from now on the most recently used; a new user gets a name."""
        tail = self._tails.pop(user, None)
        if tail is None:
            while len(self._tails) >= self._cached and (oldest := next(iter(self._tails))) not in self._touched:
                del self._tails[oldest]
            if user in self._erased or not self.store.has_user(user):
                self._batch.put("users", codec.uid(user), user.encode())
                self._touched.add(user)
                tail = Tail()
            else:
                tail = Tail(NOTHING)
                self._cover(tail, user, self._open_from(), self._history)
        self._tails[user] = tail
        return tail

    def _open_from(self) -> int:
        """No label of an event before this time is open (but for those that `_due` names)."""
        return 0 if self._watermark.value is None else self._watermark.value - self._window + 1

    def _cover(self, tail: Tail, user: str, time: int, tokens: int = 0) -> None:
        """Read back what the tail lacks of everything from `time` on and `tokens` events before that."""
        if tail.covers(time, tokens):
            return
        older: list[Token] = []
        since, count = EVER, bisect_left(tail.times, time)
        for t, kind, s in self.store.events(codec.uid(user), None if tail.since == NOTHING else tail.since):
            if t < time and count >= tokens and not (older and older[-1].time == t):
                since = t + 1
                break
            if kind != PROFILE:
                older.append(Token(t, kind, s.event_id, s.item, request_key(s.request), s.append_ms, s.due, s.late))
                count += t < time
        tail.extend_back(older, since, self._rank)

    def _trim(self, tail: Tail) -> None:
        """Keep the open labels and one window before them; cut only when it is worth it."""
        keep = join.first_open(tail, self._watermark.value, self._window) - self._history
        if keep > self._history:
            tail.trim(keep)

    def _has_profile(self, user: str, e: Event) -> bool:
        key = codec.event_key(codec.uid(user), e.time, e.kind, e.event_id)
        return key in self._profiles or (user not in self._erased and self.store.event(key) is not None)

    def _name(self, key: int, item: str) -> None:
        """Keep the item's text."""
        known = self._items.get(key)
        if known is None:
            if not self.store.has_item(key, item):
                self._batch.put("items", codec.item_bytes(key), item.encode())
            self._items[key] = item
        elif known != item:
            raise DataError(
                f"items {known!r} and {item!r} share the key {key:016x}",
                where=str(self.store.path),
                remedy="rename one of them at its source: the model could not tell them apart",
            )

    def _schedule(self, due: int, user: str, time: int) -> None:
        """Look at the user when the watermark reaches `due`, because of an event at `time`."""
        if not self._emits:
            return
        step = self._watermark.step_of(due)
        users = self._due.get(step)
        if users is None:
            users = self._due[step] = {}
            heapq.heappush(self._steps, step)
        if (oldest := users.get(user)) is None or time < oldest:
            users[user] = time
            self._batch.put("due", codec.due_key(step, codec.uid(user)), codec.encode_due(time, user))

    def _close(self, before: int | None, record: Record, out: Applied) -> None:
        """The watermark moved from `before` by this record: emit the targets it closes."""
        watermark = self._watermark.value
        assert watermark is not None
        waiting: dict[str, int] = {}
        while self._steps and self._steps[0] <= watermark:
            step = heapq.heappop(self._steps)
            for user, oldest in self._due.pop(step).items():
                waiting[user] = min(oldest, waiting.get(user, oldest))
                self._batch.delete("due", codec.due_key(step, codec.uid(user)))
        n = 0
        for user in sorted(waiting):
            tail = self._open(user)
            self._cover(tail, user, waiting[user], self._history)
            found = join.targets(tail, codec.NEVER if before is None else before, watermark, self._window)
            for chunk in join.chunks(found, self._history):
                out.examples.append(self._example(user, tail, chunk, (record.offset, n), watermark))
                n += 1
                out.targets += len(chunk)
            self.open_impressions -= sum(tail.kinds[t.row] == IMPRESSION for t in found)

    def _example(
        self, user: str, tail: Tail, chunk: list[join.Target], position: wire.Position, watermark: int
    ) -> wire.Example:
        end = chunk[-1].row + 1
        start = max(0, end - self._history)
        rows = [t.row for t in chunk]
        prev, self.last = self.last, position
        return wire.Example(
            self.fingerprint,
            position,
            prev,
            user,
            watermark,
            self.append_ms,
            tail.window(start, end),
            np.array(rows, np.int64) - start,
            np.array([t.labels for t in chunk], np.uint32),
            np.array([tail.appends[i] for i in rows], np.int64),
            [self._text(tail.items[i]) for i in rows],
            [tail.ids[i] for i in rows],
        )

    def _text(self, key: int) -> str:
        text = self._items.get(key)
        if text is None:
            text = self.store.item_text(key)
            if text is None:
                raise DataError(
                    f"the item {key:016x} has no text",
                    where=str(self.store.path),
                    remedy="the store is damaged: remove it and rebuild it from the log",
                )
            self._items[key] = text
        return text

    def _erase(self, user: str) -> None:
        """Forget the user: events, open labels, name, tail."""
        if not self.knows(user):
            return
        uid = codec.uid(user)
        tail = self._open(user)
        for step, users in self._due.items():
            if user in users:
                self._cover(tail, user, users.pop(user))
                self._batch.delete("due", codec.due_key(step, uid))
        if self._emits:
            after = codec.NEVER if self._watermark.value is None else self._watermark.value
            self.open_impressions -= sum(
                kind == IMPRESSION and due > after for kind, due in zip(tail.kinds, tail.dues, strict=True)
            )
        self._batch.delete_prefix("events", uid, codec.EVENT_KEY_BYTES)
        self._batch.delete("users", uid)
        del self._tails[user]
        self._profiles = {key for key in self._profiles if not key.startswith(uid)}
        self._erased.add(user)
        self._touched.add(user)
