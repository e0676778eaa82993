"""One partition of the events, from records to one write and its outputs; no Kafka, no clock.

What comes out is a function of the records alone: how they are cut into batches, when they are committed and how often
the process restarts change nothing. `apply` changes the state in memory, fills one `Batch` and hands out the examples
as they come; `commit` writes that batch with the next offset. Dropping a partition that has not committed loses
nothing: its records come again and say the same.

Per event: find the user's tail (read back from the store where it is not at hand), the event's place in it (or that it
is there already), what it joins; then schedule when its label closes. Per step of the watermark: `closing`.

With `keep_seconds` events older than the watermark minus that are out of the sequence: at once for every reader,
whatever the sweeper has got to (`sweeper`). The first watermark that passes an event decides, so that is a function of
the records too.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from streamgr import config
from streamgr.clock import milliseconds
from streamgr.decoder import Decoder
from streamgr.events import (
    IMPRESSION,
    PROFILE,
    BadRecord,
    Erasure,
    Event,
    Heartbeat,
    History,
    Record,
    Records,
    request_key,
)
from streamgr.sequence import examples as wire
from streamgr.sequence import join
from streamgr.sequence.auxiliary import pairs, window
from streamgr.sequence.closing import Closer, Emit, Step, nobody
from streamgr.sequence.items import Items
from streamgr.sequence.sweeper import Sweeper
from streamgr.sequence.tail import DECIDED, EVER, LATE, ORGANIC, SHOWN, Tail, Token, ranks
from streamgr.sequence.timers import Timers
from streamgr.sequence.users import Users
from streamgr.sequence.watermark import Watermark
from streamgr.state import codec
from streamgr.state.store import Progress, Store

WORTH_TRIMMING = 16  # rows


@dataclass(slots=True)
class Applied:
    """What a batch of records gave. `kinds` counts new events by kind name; times in ms."""

    dead_letters: list[tuple[Record, BadRecord]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    records: int = 0
    examples: int = 0
    targets: int = 0
    duplicates: int = 0
    late: int = 0
    expired: int = 0
    ages_ms: list[int] = field(default_factory=list)  # append minus event time of the batch's first and last event


class Partition:
    """The writer of one store. Not thread safe."""

    def __init__(self, store: Store, settings: config.Sequence, fingerprint: str, *, emits: bool = True) -> None:
        """Goes on where the store is. `emits` False: a follower, which keeps sequences and closes no labels."""
        self.store, self.fingerprint, self._emits = store, fingerprint, emits
        self._window = milliseconds(settings.attribution_window_seconds)
        self._keep = milliseconds(settings.keep_seconds)
        lateness, step = milliseconds(settings.lateness_seconds), max(1, milliseconds(settings.close_step_seconds))
        self._history, self._auxiliary = settings.history_length, settings.auxiliary_length
        self._names = ["profile", "impression", *settings.actions]
        self._rank = ranks(settings.actions)
        self._decoder = Decoder(
            settings.actions, milliseconds(settings.max_future_seconds), self._window + lateness + step
        )
        p = store.progress
        self.next_offset, self.append_ms, self.open_impressions = p.next_offset, p.append_ms, p.open_impressions
        self._watermark = Watermark(lateness, step, milliseconds(settings.max_step_seconds), p.seen, p.watermark)
        self._users = Users(store, self._rank, settings.cached_events, auxiliary=self._auxiliary > 0)
        self._items, self._timers, self._sweeper = Items(store), Timers(store), Sweeper(store)
        self._closer = Closer(
            self._users,
            self._items,
            self._timers,
            window_ms=self._window,
            keep_ms=self._keep,
            history_length=self._history,
            auxiliary_length=self._auxiliary,
            fingerprint=fingerprint,
            last=p.last,
        )
        if emits:
            self._users.closed = -1 if p.watermark is None else p.watermark
        self._open = SHOWN if emits else DECIDED  # what becomes of an impression: a follower waits for nothing
        # A slate is taken whole where the watermark cannot come near it: what its first record closes is older than it.
        self.slates = lateness > 0 and settings.max_step_seconds == 0
        self._asked = "", 0  # the last request's text and key
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

    def cache(self, events: int) -> None:
        """From now on keep about so many decoded events at hand."""
        self._users.cached_events = events

    def apply(self, records: Records, emit: Emit = nobody) -> Applied:
        """Take the next records; those below `next_offset` are passed over. Every example goes to `emit` as it comes.

        Raises `DataError` where two texts share a key, and whatever `emit` raises.
        """
        records = records.between(self.next_offset, codec.LAST_STEP)
        out, counts = Applied(records=len(records)), [0] * len(self._names)
        outcomes, mark, i = self._decoder.decode(records), self._watermark, 0
        while i < len(outcomes):
            outcome, offset, append_ms = outcomes[i], records.offsets[i], records.append_ms[i]
            i += 1
            if type(outcome) is Event:
                time, taken = outcome.time, 0
                if outcome.kind == IMPRESSION and self.slates:
                    end = _slate(outcomes, i)
                    if end > i and self._take_slate(outcomes[i - 1 : end], records, i - 1):  # type: ignore[arg-type]
                        taken, i = end - i + 1, end
                if not taken and not (taken := self._take(outcome, offset, append_ms, out)):
                    continue
                counts[outcome.kind] += taken
            elif type(outcome) is Heartbeat:
                time = outcome.time
                out.kinds["heartbeat"] += 1
            elif type(outcome) is Erasure:
                self._erase(outcome.user)
                out.kinds["erasure"] += 1
                continue
            else:
                out.dead_letters.append((records[i - 1], outcome))  # type: ignore[arg-type]
                continue
            if mark.seen is None or time > mark.seen:
                before = -1 if mark.value is None else mark.value
                if mark.advance(time) and mark.value is not None and self._emits:
                    closed = self._closer.close(Step(before, mark.value, offset, append_ms), emit, self._touched)
                    out.examples += closed.examples
                    out.targets += closed.targets
                    self.open_impressions -= closed.impressions
        self.next_offset = max(self.next_offset, records.next_offset)
        if outcomes:
            self.append_ms = records.append_ms[-1]
            out.kinds.update({name: count for name, count in zip(self._names, counts, strict=True) if count})
            for outcome, append_ms in ((outcomes[i], records.append_ms[i]) for i in (0, -1)):
                if type(outcome) is Event:
                    out.ages_ms.append(append_ms - outcome.time)
        self._items.settle(self._batch)
        return out

    def commit(self) -> None:
        """Write everything applied so far, with the next offset, in one batch. Raises as `Database.write` does."""
        mark, batch = self._watermark, self._batch
        batch.put_all("events", self._events)
        batch.put_all("profiles", ((key, b"") for key in self._profiles))
        self._users.write(batch)
        self._timers.write(batch)
        if self._keep and mark.value is not None:
            self._users.forget(self._sweeper.sweep(mark.value - self._keep, batch, spare=self._touched))
        last = self._closer.last
        progress = Progress(self.next_offset, mark.seen, mark.value, last, self.append_ms, self.open_impressions)
        self.store.write(batch, progress)
        for uid in self._touched:
            if (tail := self._users.at_hand(uid)) is not None:
                self._trim(tail)
        self._users.written(self._touched)
        self._items.written()
        self._begin()

    def history(self, user: str, before: int, limit: int) -> History | None:
        """The user's newest `limit` impressions and actions with time < `before`, oldest first, with the auxiliary rows
        of that window; None if unknown."""
        if not self._users.knows(user):
            return None
        uid = codec.uid(user)
        tail = self._users.open(uid, user)
        self._users.cover(uid, tail, before, limit)
        end = bisect_left(tail.times, before)
        start = max(0, end - limit, bisect_left(tail.times, self._cut()))
        profiles = self._users.profiles(uid)
        found, _ = window(tail, profiles, min(start, end), end, before, self._cut(), self._auxiliary if limit else 0)
        self._touched.add(uid)
        if not self.pending:  # nobody else will let go of what reading has brought
            self._users.written(self._touched)
            self._touched.clear()
        return found

    def knows(self, user: str) -> bool:
        """Whether there is anything of this user."""
        return self._users.knows(user)

    def item_text(self, key: int) -> str | None:
        """The item behind a key; None if it was never seen."""
        return self._items.find(key)

    def _begin(self) -> None:
        """An empty batch; nothing pending."""
        self._batch = self.store.batch()
        self._events: list[tuple[bytes, bytes]] = []  # of the batch: the events' keys and values
        self._touched: set[bytes] = set()  # users whose tails may have grown, by key
        self._profiles: set[bytes] = set()  # keys of profile events in the batch
        self._last: tuple[str, bytes, Tail] | None = None  # whose event was taken last: the next is often his, too

    def _cut(self) -> int:
        """Events before this time (ms) are out of the sequence."""
        watermark = self._watermark.value
        return EVER if not self._keep or watermark is None else watermark - self._keep

    def _take_slate(self, events: list[Event], records: Records, first: int) -> bool:
        """Take impressions of one user, time and watermark at once: `_take` for each of them, in fewer steps.

        first: the first one's place in `records`. False where it is not that simple, and nothing was done.
        """
        time, user, watermark, m = events[0].time, events[0].user, self._watermark.value, len(events)
        uid, tail = self._whose(user)
        if watermark is not None and time + self._window <= watermark:
            return False
        if tail.since > time:
            self._users.cover(uid, tail, time)
        times, ids = tail.times, [e.event_id for e in events]
        if (times and times[-1] >= time) or len(set(ids)) < m:
            return False
        due, appends = time + self._window, records.append_ms[first : first + m]
        items = self._items.keys([e.item for e in events])
        requests = [self._request(e.request) for e in events]
        order = sorted(range(m), key=ids.__getitem__)
        times.extend([time] * m)
        tail.kinds.extend([IMPRESSION] * m)
        tail.states.extend([self._open] * m)
        tail.ids.extend([ids[i] for i in order])
        tail.items.extend([items[i] for i in order])
        tail.requests.extend([requests[i] for i in order])
        tail.appends.extend([appends[i] for i in order])
        if self._auxiliary and (tail.features is not None or any(e.features for e in events)):
            said = [pairs(events[i].features) for i in order]
            tail.features = [*(tail.features or [()] * (len(times) - m)), *said]
        self._schedule(uid, tail, due, None)
        self.open_impressions += m * self._emits
        offsets = records.offsets[first : first + m]
        self._events += codec.encode_events(
            uid,
            time,
            IMPRESSION,
            [
                (e.event_id, item, append_ms, due, False, offset, e.request, e.surface, e.position, e.features)
                for e, item, append_ms, offset in zip(events, items, appends, offsets, strict=True)
            ],
        )
        return True

    def _whose(self, user: str) -> tuple[bytes, Tail]:
        """The user's key and tail."""
        if (last := self._last) is not None and last[0] == user:
            return last[1], last[2]
        uid = codec.uid(user)
        tail = self._users.open(uid, user)
        self._last = user, uid, tail
        self._touched.add(uid)
        return uid, tail

    def _request(self, text: str) -> int:
        """The request's key; the next event is often of the same."""
        if text != self._asked[0]:
            self._asked = text, request_key(text)
        return self._asked[1]

    def _schedule(self, uid: bytes, tail: Tail, due: int, behind: int | None) -> None:
        """Look at the user when the watermark reaches `due`. behind: time of an event that it has passed already."""
        if not self._emits:
            return
        step = self._watermark.step_of(due)
        if behind is not None or step != tail.scheduled:
            self._timers.schedule(step, uid, behind)
            tail.scheduled = step

    def _take(self, e: Event, offset: int, append_ms: int, out: Applied) -> bool:
        """Take one event; false if it was here already, or is older than what is kept."""
        kind, time, user, watermark = e.kind, e.time, e.user, self._watermark.value
        cut = EVER
        if self._keep and watermark is not None and time < (cut := watermark - self._keep):
            out.expired += 1
            return False
        uid, tail = self._whose(user)
        item, due, late, behind = 0, codec.NEVER, False, None
        if kind == PROFILE:
            key = codec.event_key(uid, time, kind, e.event_id)
            if key in self._profiles or (not self._users.is_erased(uid) and self.store.has_event(key)):
                out.duplicates += 1
                return False
            self._profiles.add(key)
            self._users.profile(uid, time, e.event_id, e.features)
        else:
            times = tail.times
            from_time = time if kind == IMPRESSION else time - self._window + 1
            if tail.since > from_time:
                self._users.cover(uid, tail, from_time)
            if times and times[-1] < time:
                i = len(times)
            else:
                if tail.lacks_ids(time):
                    self._users.recall(uid, tail, time)
                i = tail.place(time, kind, e.event_id, self._rank)
            if i < 0:
                out.duplicates += 1
                return False
            item, request = self._items.key(e.item), self._request(e.request)
            if kind == IMPRESSION:
                due, state = time + self._window, self._open
                if watermark is not None and due <= watermark:
                    due, state, late = codec.NEVER, LATE, True
            else:
                j = join.find(tail, i, max(time - self._window, cut - 1), item, request)
                if j < 0:  # organic so far: a target when the watermark reaches it, at the next step if it has
                    due, state = time, ORGANIC if self._emits else DECIDED
                    if watermark is not None and time <= watermark:
                        due, behind = watermark + 1, time
                elif watermark is not None and times[j] + self._window <= watermark:
                    state, late = LATE, True
                else:
                    state = DECIDED
            if i == len(times):
                tail.append(time, kind, e.event_id, item, request, append_ms, state)
            else:
                tail.insert(i, Token(time, kind, e.event_id, item, request, append_ms, state))
            if e.features and self._auxiliary:
                tail.say(i, pairs(e.features))
            if due != codec.NEVER:
                self._schedule(uid, tail, due, behind)
                self.open_impressions += kind == IMPRESSION and self._emits
            key = codec.event_key(uid, time, kind, e.event_id)
        value = (e.event_id, item, append_ms, due, late, offset, e.request, e.surface, e.position, e.features)
        self._events.append((key, codec.encode_event(value)))
        out.late += late
        return True

    def _erase(self, user: str) -> None:
        """Forget the user: events, name, tail. His timers find nobody when they fall due."""
        if not self._users.knows(user):
            return
        uid = codec.uid(user)
        if self._emits:
            tail = self._users.open(uid, user)
            self._users.cover(uid, tail, self._users.closed - self._window + 1)
            self.open_impressions -= tail.states.tobytes().count(SHOWN)
        self._batch.put_all("events", self._events)
        self._events = []
        self._batch.delete_prefix("events", uid, codec.EVENT_KEY_BYTES)
        self._batch.delete_prefix("profiles", uid, codec.EVENT_KEY_BYTES)
        self._profiles = {key for key in self._profiles if not key.startswith(uid)}
        self._users.erase(uid, self._batch)
        self._last = None

    def _trim(self, tail: Tail) -> None:
        """Keep the open labels and a history before them; cut only when it is worth it."""
        first_open = join.first_open(tail, self._watermark.value, self._window)
        tail.let_go(first_open)
        keep = min(len(tail) - 1, first_open - self._history)
        if keep > max(self._history // 2, WORTH_TRIMMING):
            tail.trim(keep)


def _slate(outcomes: list[Event | Heartbeat | Erasure | BadRecord], i: int) -> int:
    """Where the impressions end that go on with the user and time of the one before place `i`."""
    first = outcomes[i - 1]
    assert type(first) is Event
    user, time = first.user, first.time
    while i < len(outcomes):
        e = outcomes[i]
        if type(e) is not Event or e.time != time or e.user != user or e.kind != IMPRESSION:
            break
        i += 1
    return i
