"""The users of one partition: their names, and an exact cache of their decoded tails.

The partition is the only writer, so what is remembered here is always what the store holds, or will hold after the next
write. Of a user whose tail is let go, the time of the newest event stays for a while: an event that is newer still
(nearly every one) then needs no look into the store.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from streamgr.events import IMPRESSION, PROFILE, request_key
from streamgr.sequence.auxiliary import Profiles, pairs
from streamgr.sequence.tail import DECIDED, EVER, LATE, NOTHING, ORGANIC, SHOWN, Row, Tail
from streamgr.state import codec
from streamgr.state.rocks import Batch
from streamgr.state.store import Store

GHOSTS = 1 << 17  # users of whom only the newest event's time is remembered
NO_PROFILES = Profiles()


class Users:
    """Tails by `codec.uid`, least recently used first."""

    def __init__(self, store: Store, rank: Sequence[int], cached_events: int, *, auxiliary: bool = False) -> None:
        """rank: `tail.ranks`. cached_events: rows that all tails together may hold beyond what is open. auxiliary:
        whether anybody asks for what the events say of their users."""
        self._store, self._rank, self.cached_events = store, rank, cached_events
        self._tails: dict[bytes, Tail] = {}
        self._rows: dict[bytes, int] = {}  # how many of each tail are counted
        self._counted = 0
        self._ghosts: dict[bytes, int] = {}
        self._new: dict[bytes, str] = {}  # names to be written
        self._auxiliary = auxiliary
        self._profiles: dict[bytes, Profiles] = {}  # of those at hand who were asked for theirs
        self._profiled = auxiliary and store.has_profiles()  # whether anybody has one
        self._erased: set[bytes] = set()  # their events lie in the store until the next write
        self.closed = NOTHING  # labels due up to this watermark have been closed

    def open(self, uid: bytes, user: str) -> Tail:
        """The user's tail, from now on the most recently used; a new user gets a name.

        Raises `DataError` should two users share a key.
        """
        tail = self._tails.pop(uid, None)
        if tail is None:
            if (newest := self._ghosts.pop(uid, None)) is not None:
                tail = Tail(user, newest + 1 if newest >= 0 else EVER)
            elif self._is_stored(uid, user):
                tail = Tail(user, NOTHING)
            else:
                tail = Tail(user)
                self._new[uid] = user
        self._tails[uid] = tail
        return tail

    def find(self, uid: bytes) -> Tail | None:
        """The tail of a user who may have been erased since."""
        if uid in self._tails:
            return self.open(uid, "")
        if uid in self._erased or (user := self._store.user_text(uid)) is None:
            return None
        return self.open(uid, user)

    def knows(self, user: str) -> bool:
        """Whether there is anything of this user."""
        uid = codec.uid(user)
        return uid in self._tails or uid in self._ghosts or self._is_stored(uid, user)

    def at_hand(self, uid: bytes) -> Tail | None:
        """The user's tail where it is in memory."""
        return self._tails.get(uid)

    def is_erased(self, uid: bytes) -> bool:
        """Whether what the store holds of this user goes with the next write."""
        return uid in self._erased

    def cover(self, uid: bytes, tail: Tail, time: int, tokens: int = 0) -> None:
        """Read back what the tail lacks of everything from `time` on and `tokens` events before that."""
        if tail.covers(time, tokens):
            return
        since, count, rank, asked, request = EVER, bisect_left(tail.times, time), self._rank, "", 0
        older: list[Row] = []
        for _, t, kind, s in self._store.events(uid, None if tail.since == NOTHING else tail.since):
            if t < time and count >= tokens and not (older and older[-1][0] == t):
                since = t + 1
                break
            if kind != PROFILE:
                waits = SHOWN if kind == IMPRESSION else ORGANIC
                state = LATE if s.late else DECIDED if s.due <= self.closed else waits
                if s.request != asked:
                    asked, request = s.request, request_key(s.request)
                said = pairs(s.features) if s.features and self._auxiliary else ()
                older.append((t, rank[kind], s.event_id, kind, s.item, request, s.append_ms, state, said))
                count += t < time
        tail.extend_back(older, since)

    def recall(self, uid: bytes, tail: Tail, time: int) -> None:
        """Put the ids of one time back into a tail."""
        stored = []
        for _, t, kind, s in self._store.events(uid, time + 1):
            if t < time:
                break
            if kind != PROFILE:
                stored.append((self._rank[kind], s.event_id))
        tail.recall(time, stored, self._rank)

    def profiles(self, uid: bytes) -> Profiles:
        """The profile events of a user at hand, the uncommitted ones among them."""
        if not self._profiled:
            return NO_PROFILES
        found = self._profiles.get(uid)
        if found is None:
            found = self._profiles[uid] = Profiles()
            if uid not in self._new and uid not in self._erased:
                for time, event in self._store.profiles(uid):
                    found.insert(time, event.event_id, pairs(event.features))
        return found

    def profile(self, uid: bytes, time: int, event_id: str, features: Mapping[str, str | int] | None) -> None:
        """Take a new profile event of a user at hand."""
        if self._auxiliary:
            self._profiled = True
            self.profiles(uid).insert(time, event_id, pairs(features))

    def erase(self, uid: bytes, batch: Batch) -> None:
        """Forget the user: name and tail."""
        self.forget([uid])
        self._new.pop(uid, None)
        batch.delete("users", uid)
        self._erased.add(uid)

    def forget(self, uids: Iterable[bytes]) -> None:
        """Nothing of these users is left in the store."""
        for uid in uids:
            self._tails.pop(uid, None)
            self._profiles.pop(uid, None)
            self._ghosts.pop(uid, None)
            self._counted -= self._rows.pop(uid, 0)

    def write(self, batch: Batch) -> None:
        """Put the new names into the batch that goes to the store now."""
        batch.put_all("users", ((uid, user.encode()) for uid, user in self._new.items()))

    def written(self, touched: Iterable[bytes]) -> None:
        """The batch lies in the store: let go of the least recently used where tails hold too much.

        touched: users whose tails may have grown or been trimmed since the last time.
        """
        self._new, self._erased = {}, set()
        for uid in touched:
            if (tail := self._tails.get(uid)) is not None:
                rows = len(tail) + 1 + len(self._profiles.get(uid, NO_PROFILES))
                self._counted += rows - self._rows.get(uid, 0)
                self._rows[uid] = rows
        while self._counted > self.cached_events and len(self._tails) > 1:
            uid = next(iter(self._tails))
            tail = self._tails.pop(uid)
            self._profiles.pop(uid, None)
            self._counted -= self._rows.pop(uid, 0)
            self._ghosts[uid] = tail.times[-1] if tail.times else tail.since - 1
        while len(self._ghosts) > GHOSTS:
            del self._ghosts[next(iter(self._ghosts))]

    def _is_stored(self, uid: bytes, user: str) -> bool:
        return uid not in self._erased and self._store.has_user(uid, user)
