"""Takes out of the store what has left the sequences: events older than `sequence.keep_seconds`.

Readers do not wait for it: they pass over what lies before the cut. So it may take its time, and does: a few users with
each commit, round and round by user key. Of the profiles before the cut the newest stays, for it still holds. A user of
whom nothing remains loses his name, too. (The texts of items stay: nobody counts who still refers to them.)
"""

from collections.abc import Set

from streamgr.events import PROFILE
from streamgr.state import codec
from streamgr.state.rocks import Batch
from streamgr.state.store import Store

USERS, DELETIONS = 64, 4_096  # a commit looks at so many users, and at no further one after so many deletions


class Sweeper:
    """The sweeper of one store; where it is in its round is not remembered across restarts."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next = b""

    def sweep(self, cut: int, batch: Batch, spare: Set[bytes]) -> list[bytes]:
        """Delete some of what is older than `cut` (ms), and return the keys of the users of whom nothing is left.

        Users in `spare` have uncommitted events: their turn comes another time.
        """
        start, self._next = self._next, b""
        deleted, emptied = 0, []
        for looked, uid in enumerate(self._store.user_keys(start)):
            if looked == USERS or deleted >= DELETIONS:
                self._next = uid
                break
            if uid not in spare:
                gone = self._expired(uid, cut)
                for key in gone:
                    batch.delete("events", key)
                    if codec.split_event_key(key)[1] == PROFILE:
                        batch.delete("profiles", key)
                deleted += len(gone)
                if gone and self._store.count(uid, len(gone) + 1) == len(gone):
                    batch.delete("users", uid)
                    emptied.append(uid)
        return emptied

    def _expired(self, uid: bytes, cut: int) -> list[bytes]:
        """The keys of a user's events before the cut, but for the profile that still holds."""
        gone: list[bytes] = []
        holds: tuple[int, str, bytes] | None = None
        for key, time, kind, event in self._store.events(uid, cut):
            if kind == PROFILE and (holds is None or (time, event.event_id) > holds[:2]):
                if holds is not None:
                    gone.append(holds[2])
                holds = time, event.event_id, key
            else:
                gone.append(key)
        return gone
