"""The auxiliary series: what a user's profile and the features of his events say, merged into the window by time.

A series is one feature of one user. Its values come from `profile` events and from the features of impressions and
actions, in sequence order; who does not name a feature says nothing of it. Only the first entry of each constant run
becomes a row of the window (arXiv 2402.17152, section 2.1), just before the event that said so. At its head a window
carries in what the profile says at that time, however long ago that was; of events it knows only its own.

What is shown is a function of the user's events alone, never of what happened to be at hand.
"""

from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from streamgr.events import PROFILE, History, feature_key
from streamgr.sequence.tail import Pairs, Tail

Change = tuple[int, int, int]  # before which row of the window, when (ms), feature key
State = Mapping[str, tuple[int, int]]  # feature -> (since when, feature key)


def pairs(features: Mapping[str, str | int] | None) -> Pairs:
    """What an event says: (feature, `feature_key`), sorted; equal features nearly always give the same object."""
    return _pairs(tuple(sorted(features.items()))) if features else ()


@lru_cache(maxsize=1 << 14)
def _pairs(features: tuple[tuple[str, str | int], ...]) -> Pairs:
    return tuple((name, feature_key(name, value)) for name, value in features)


class Profiles:
    """All profile events of one user, in sequence order, with the state of the series after each (shared where equal).

    Of few users there are many: the whole is kept with the tail.
    """

    __slots__ = ("_keys", "_said", "_states")

    def __init__(self) -> None:
        self._keys: list[tuple[int, str]] = []  # (time, event id)
        self._said: list[Pairs] = []
        self._states: list[State] = []

    def __len__(self) -> int:
        return len(self._keys)

    def insert(self, time: int, event_id: str, said: Pairs) -> None:
        """Take a profile event that is not here yet."""
        i = bisect_left(self._keys, (time, event_id))
        self._keys.insert(i, (time, event_id))
        self._said.insert(i, said)
        del self._states[i:]
        for j in range(i, len(self._keys)):
            self._states.append(_after(self._states[-1] if j else {}, self._keys[j][0], self._said[j]))

    def before(self, time: int, cut: int) -> State:
        """The state just before `time` (ms); of what is older than `cut` only the newest event counts."""
        end = bisect_left(self._keys, (time, ""))
        first = max(0, bisect_left(self._keys, (cut, "")) - 1)
        if not first:
            return self._states[end - 1] if end else {}
        state: State = {}
        for i in range(first, end):
            state = _after(state, self._keys[i][0], self._said[i])
        return state

    def between(self, start: int, end: int) -> list[tuple[int, Pairs]]:
        """(time, what it says) of the events with start <= time < end (ms)."""
        i, j = bisect_left(self._keys, (start, "")), bisect_left(self._keys, (end, ""))
        return [(key[0], said) for key, said in zip(self._keys[i:j], self._said[i:j], strict=True)]


def _after(state: State, time: int, said: Pairs) -> State:
    changed = {name: (time, key) for name, key in said if name not in state or state[name][1] != key}
    return {**state, **changed} if changed else state


def window(  # noqa: PLR0917
    tail: Tail, profiles: Profiles, start: int, end: int, upto: int, cut: int, limit: int
) -> tuple[History, NDArray[np.int64] | None]:
    """Rows start to end with what the series say before `upto` (ms), and how far each row has moved; None: nowhere.

    cut: older events are out of the sequence (ms). limit: so many auxiliary rows at most, the newest.
    """
    rows = tail.window(start, end)
    found = _changes(tail, profiles, start, end, upto, cut)[-limit:] if limit else []
    if not found:
        return rows, None
    places, times, keys = (np.array(column) for column in zip(*found, strict=True))
    return History(
        np.insert(rows.kinds, places, PROFILE),
        np.insert(rows.items, places, keys.astype(np.uint64)),
        np.insert(rows.times, places, times),
        np.insert(rows.requests, places, 0),
    ), np.searchsorted(places, np.arange(len(rows)), "right").astype(np.int64)


def _changes(  # noqa: PLR0917
    tail: Tail, profiles: Profiles, start: int, end: int, upto: int, cut: int
) -> list[Change]:
    """Where the runs of the window begin, in order."""
    times, features = tail.times, tail.features
    if not len(profiles) and features is None:
        return []
    first = times[start] if start < end else upto
    carried = profiles.before(first, cut)
    found: list[Change] = [(0, time, key) for time, _, key in sorted((t, name, k) for name, (t, k) in carried.items())]
    now = {name: key for name, (_, key) in carried.items()}

    def say(said: Pairs, place: int, time: int) -> None:
        for name, key in said:
            if now.get(name) != key:
                now[name] = key
                found.append((place, time, key))

    row = start
    for time, said in [*profiles.between(max(first, cut), upto), (upto, ())]:
        until = bisect_left(times, time, row, end) if time < upto else end
        if features is not None:
            told: Pairs = ()
            for i in range(row, until):
                if (spoken := features[i]) and spoken is not told:
                    say(spoken, i - start, times[i])
                    told = spoken
        row = until
        say(said, row - start, time)
    return found
