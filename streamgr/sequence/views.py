"""Sequences and examples for people: the contract's JSON.

What is shown is a function of the stored events alone: the order in which they arrived, and what was known then, does
not matter (only `late` tells of it). Stores are opened read-only, beside the process that writes them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamgr.config import State
from streamgr.errors import DataError
from streamgr.events import FIRST_ACTION, PROFILE, request_key
from streamgr.sequence import join
from streamgr.sequence.examples import Example
from streamgr.sequence.tail import DECIDED, Tail, ranks
from streamgr.state import codec
from streamgr.state.rocks import Memory
from streamgr.state.store import Store

Json = dict[str, Any]
ROLES = ("sequencer", "scorer")  # who keeps sequences, in the order in which we ask


class Part(NamedTuple):
    """Which part of a sequence is wanted: since <= event time < before (ms), and of that the newest `last` (0: all).

    A part is read from its newest end and no farther than asked, however long the sequence is. Of profiles it shows the
    first of each run within the part.
    """

    since: int = 0
    before: int | None = None
    last: int = 0


WHOLE = Part()


def show(state_directory: Path, user: str, part: Part = WHOLE) -> Json | None:
    """One user's sequence from `state.directory`; None if unknown. Raises `DataError` where there is no state."""
    for store in stores(state_directory):
        try:
            if store.has_user(codec.uid(user), user):
                return sequence(store, user, part)
        finally:
            store.close()
    return None


def export(state_directory: Path) -> Iterator[Json]:
    """Every user's sequence, sorted by user id. Raises `DataError` where there is no state."""
    opened = list(stores(state_directory))
    try:
        users = sorted((user, place) for place, store in enumerate(opened) for user in store.users())
        for user, place in users:
            if (found := sequence(opened[place], user))["events"]:  # all of it may be older than what is kept
                yield found
    finally:
        for store in opened:
            store.close()


def sequence(store: Store, user: str, part: Part = WHOLE) -> Json:
    """A user's sequence, oldest first: every impression and action, and of profiles the first of each run."""
    meta = store.meta
    assert meta is not None
    names, rank = ["profile", "impression", *meta.actions], ranks(meta.actions)
    stored = sorted(_read(store, user, part), key=lambda row: (row[0], rank[row[1]], row[2].event_id))
    texts = dict.fromkeys(event.item for _, kind, event in stored if kind != PROFILE)
    texts |= zip(texts, store.item_texts(list(texts)), strict=True)
    actions = _joined_kinds(stored, rank, meta.window_ms)
    shown: list[Json] = []
    features: object = None  # of the run of profiles we are in; none yet
    token = 0
    for time, kind, event in stored:
        row: Json = {"type": names[kind]}
        if kind == PROFILE:
            if features == (now := dict(event.features or {})):
                continue
            features = now
        else:
            row["item_id"] = texts[event.item]
        row |= {"event_time": time, "event_id": event.event_id}
        if kind != PROFILE:
            if kinds := actions.get(token):
                row["actions"] = sorted(names[k] for k in kinds)
            token += 1
        if event.late:
            row["late"] = True
        if part.before is None or time < part.before:
            shown.append(row)
    return {"user_id": user, "events": shown[-part.last :] if part.last else shown}


def _read(store: Store, user: str, part: Part) -> Iterator[tuple[int, int, codec.Stored]]:
    """(time, kind, event) of the part, newest first, and of one window after it: what may have joined it."""
    meta, watermark = store.meta, store.progress.watermark
    assert meta is not None
    cut = watermark - meta.keep_ms if meta.keep_ms and watermark is not None else 0
    after = None if part.before is None else part.before + meta.window_ms
    wanted, oldest = part.last, 0  # how many more, and the time of the last one read
    profile: tuple[int, int, codec.Stored] | None = None  # that holds at the cut
    for _, time, kind, event in store.events(codec.uid(user), after):
        if time < cut:
            if kind == PROFILE and (profile is None or (time, event.event_id) > (profile[0], profile[2].event_id)):
                profile = time, kind, event
            continue
        if time < part.since or (part.last and wanted <= 0 and time < oldest):
            return
        yield time, kind, event
        if part.before is None or time < part.before:
            wanted, oldest = wanted - 1, time
    if profile is not None and profile[0] >= part.since:  # it still holds
        yield profile


def examples_json(example: Example, partition: int, actions: Sequence[str]) -> Json:
    """An example as `examples list` prints it; `actions`: kinds in the order of their bits."""
    h, offset, n = example.history, *example.position
    return {
        "position": {"partition": partition, "offset": offset, "n": n},
        "user": example.user,
        "targets": [
            {
                "item": item,
                "event_id": event_id,
                "event_time": int(h.times[i]),
                "labels": [name for bit, name in enumerate(actions) if labels >> bit & 1],
            }
            for i, labels, item, event_id in zip(
                example.target_index.tolist(),
                example.target_labels.tolist(),
                example.target_items,
                example.target_events,
                strict=True,
            )
        ],
    }


def _joined_kinds(
    stored: list[tuple[int, int, codec.Stored]], rank: Sequence[int], window_ms: int
) -> dict[int, set[int]]:
    """For each impression (by its place among impressions and actions) the kinds that joined it."""
    tail = Tail()
    tail.extend_back(
        [
            (t, rank[kind], s.event_id, kind, s.item, request_key(s.request), s.append_ms, DECIDED, ())
            for t, kind, s in stored
            if kind != PROFILE
        ],
        tail.since,
    )
    found: dict[int, set[int]] = {}
    for i, kind in enumerate(tail.kinds):
        if kind >= FIRST_ACTION:
            j = join.find(tail, i, tail.times[i] - window_ms, tail.items[i], tail.requests[i])
            if j >= 0:
                found.setdefault(j, set()).add(kind)
    return found


def stores(state_directory: Path) -> Iterator[Store]:
    """The partitions' stores of the first role that has any, read-only."""
    memory = Memory(State())
    for path in store_paths(*(state_directory / role for role in ROLES), state_directory):
        store = Store(path, memory, read_only=True)
        if store.meta is None:  # its owner is about to claim it
            store.close()
        else:
            yield store


def store_paths(*directories: Path) -> list[Path]:
    """The stores in the first of the directories that has any. Raises `DataError` where none has."""
    for directory in directories:
        if paths := sorted(path for path in directory.glob("p[0-9]*") if (path / "CURRENT").exists()):
            return paths
    remedy = "give the value of state.directory of a sequencer"
    raise DataError("no sequences here", where=str(directories[-1]), remedy=remedy)
