"""Tokens: histories as one jagged batch, with what each token may see and the time it asks at.

The unified sequence (arXiv 2402.17152, section 2.1): the main series of items and actions, the auxiliary series merged
into it by time, the context first.

    context    the user's own id, where the model wants one: a prefix, older than everything
    auxiliary  a PROFILE row: a feature of the user takes a value, which is what the token is of
    item       an impression. It belongs to a request; its request time r is the earliest time of the impressions of
               that request in the window (its own time without one). It sees the tokens before r and itself: never the
               other items of its request, nor what came of them (decision 1)
    action     what the user did with an item, at its own time. It sees everything before it in sequence order

Interleaved, each event is a token. Summed (`summed`), an impression and its first action are one token, placed where
its outcome is known; targets are then tokens of their own. What a token is beside its id is said by `marks`, a set of
bits, so several actions fit into one.

`visible[i]` = how many leading tokens of its sequence token i sees besides itself, so the attention mask is
`j < visible[i] or j == i` and a candidate at serving is an item token with `visible = n`.

The query time of an item token is r; of the others the time of the token after it (the "next timestamp" rule: it is
asked what comes next at the moment when that came), of a last one its own time, or the request's `at` at serving.
Because a sequence is in time order, the first token that a target does not see stands at exactly its r: what the
trainer sees through the last visible action is what the scorer saw with `at = r`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgr.events import FIRST_ACTION, IMPRESSION, PROFILE, History
from streamgr.model.rows import Ints, Rows, column
from streamgr.model.table import FEATURE, ITEM, USER

CONTEXT_TIME = 0  # older than everything: its time bias is one constant


@dataclass(frozen=True, slots=True)
class Layout:
    """How histories become tokens. actions: how many kinds; window_ms > 0: summed, with this attribution window.

    A token's marks are bits: PROFILE, IMPRESSION, FIRST_ACTION + b for action b, then `passed` (shown, and the window
    passed without an action; summed only) and `user`.
    """

    actions: int
    window_ms: int = 0
    user_token: bool = False

    @property
    def passed(self) -> int:
        return FIRST_ACTION + self.actions

    @property
    def user(self) -> int:
        return self.passed + 1

    @property
    def marks(self) -> int:
        """How many marks there are."""
        return self.user + 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """A jagged batch of B sequences and T tokens.

    offsets i64[B+1]; marks i64[T] (bits, see `Layout`); keys u64[T] and fields u8[T]: the id in the table; times i64[T]
    and query_times i64[T] (ms); visible i64[T] (counted from the start of the token's own sequence); provisional
    bool[T]: its query time is the time of what comes after it. targets i64[m]: the tokens that the targets asked for
    have become; queries i64[m]: for each of them the last action token before its request, -1 without one.
    """

    offsets: Ints
    marks: Ints
    keys: NDArray[np.uint64]
    fields: NDArray[np.uint8]
    times: Ints
    query_times: Ints
    visible: Ints
    provisional: NDArray[np.bool_]
    targets: Ints
    queries: Ints

    def __len__(self) -> int:
        return len(self.marks)

    @property
    def seen_times(self) -> Ints:
        """i64[T], ms: when each token's id was seen; a user's own with the last of his events."""
        last = self.times[np.maximum(self.offsets[1:], 1) - 1] if len(self) else self.times
        return np.where(self.fields == USER, np.repeat(last, np.diff(self.offsets)), self.times)


def tokenize(
    histories: Sequence[History],
    layout: Layout,
    *,
    targets: Sequence[Ints] | None = None,
    users: Sequence[int] | None = None,
    at: Sequence[int] | None = None,
) -> Tokens:
    """Lay histories end to end. targets: rows of each history, ascending; users: `events.user_key` of each.

    at (ms, one a history): the time asked at each end (`queries` are then the ends', one a history); None: the training
    rule.
    """
    rows = Rows.of(histories)
    asked = None if at is None else np.asarray(at, np.int64)
    tokens = (_summed if layout.window_ms else _interleaved)(rows, layout, _flat(targets, rows.offsets[:-1]), asked)
    return _with_users(tokens, users, layout) if layout.user_token else tokens


def _interleaved(rows: Rows, layout: Layout, targets: Ints, at: Ints | None) -> Tokens:
    """Each row is a token. targets: rows."""
    query_times = np.append(rows.times[1:], 0)
    filled = np.diff(rows.offsets) > 0
    last = rows.offsets[1:][filled] - 1
    query_times[last] = rows.times[last] if at is None else at[filled]
    begin, end = (
        (rows.offsets[rows.sequence[targets]], rows.earlier[targets])
        if at is None
        else (rows.offsets[:-1], rows.offsets[1:])
    )
    return Tokens(
        rows.offsets,
        np.int64(1) << rows.kinds.astype(np.int64),
        rows.items,
        _fields(rows.kinds),
        rows.times,
        np.where(rows.is_item, rows.times[rows.anchor], query_times),
        rows.first_unseen - rows.offsets[rows.sequence],
        ~rows.is_item,
        targets,
        _last_acted(rows.kinds >= FIRST_ACTION, begin, end),
    )


def _summed(rows: Rows, layout: Layout, targets: Ints, at: Ints | None) -> Tokens:
    """An impression and its first action are one token, at the time when its outcome is known; targets come last.

    Known means: by then nobody can have seen otherwise. With an action it is known at the action's time; without one
    when the window has passed. What is not known yet is no token, so the sequence at any time is the beginning of the
    sequence at any later time, and what is trained equals what is served. Later actions are tokens of their own.
    Query times are the tokens' own: "what comes next" comes at a moment that the sequence does not hold.
    """
    joined = rows.joined(layout.window_ms)
    acts = np.flatnonzero(joined >= 0)
    first = np.full(len(rows), -1)  # of an impression: its first action
    first[joined[acts][::-1]] = acts[::-1]
    lead = np.arange(len(rows))  # the row whose token a row goes into
    together = acts[rows.times[acts] == rows.times[first[joined[acts]]]]
    lead[together] = first[joined[together]]
    marks = np.int64(1) << rows.kinds.astype(np.int64)
    np.bitwise_or.at(marks, lead[together], marks[together] | 1 << IMPRESSION)

    passed = np.flatnonzero(rows.is_item & (first < 0))
    kept = np.concatenate([np.flatnonzero(~rows.is_item & (lead == np.arange(len(rows)))), passed])
    known = np.concatenate([rows.times[kept[: len(kept) - len(passed)]], rows.times[passed] + layout.window_ms - 1])
    marks[passed] |= 1 << layout.passed
    end = rows.times[np.maximum(rows.offsets[1:], 1) - 1] + 1 if at is None and len(rows) else at
    if len(kept):
        assert end is not None
        told = known < end[rows.sequence[kept]]
        kept, known, late = kept[told], known[told], (np.arange(len(kept)) >= len(kept) - len(passed))[told]
        order = np.lexsort((kept, late, known, rows.sequence[kept]))
        kept, known = kept[order], known[order]
    count = np.bincount(rows.sequence[kept], minlength=len(rows.offsets) - 1)
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])

    asked = rows.times[rows.anchor[targets]]
    mine = rows.sequence[targets]
    seen = _earlier_than(known, rows.sequence[kept], asked, mine) - start[mine]  # how many tokens each target sees
    acted = (marks[kept] >> FIRST_ACTION & (1 << layout.actions) - 1) != 0
    begin, upto = (start[mine], start[mine] + seen) if at is None else (start[:-1], start[1:])
    query = _last_acted(acted, begin, upto)
    own = mine if at is None else np.arange(len(query))

    place = start[mine + 1] + np.arange(len(targets))  # targets are ascending: each after its sequence's own tokens
    held = np.setdiff1d(np.arange(len(kept) + len(targets)), place, assume_unique=True)

    def merge(history: NDArray[Any], asked_for: NDArray[Any]) -> NDArray[Any]:
        out = np.empty(len(kept) + len(targets), history.dtype)
        out[held], out[place] = history, asked_for
        return out

    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(mine, minlength=len(count)))])
    return Tokens(
        start + before,
        merge(marks[kept], np.full(len(targets), 1 << IMPRESSION)),
        merge(rows.items[kept], rows.items[targets]),
        merge(_fields(rows.kinds[kept]), np.full(len(targets), ITEM)),
        merge(known, asked),
        merge(known, asked),
        merge(np.arange(len(kept)) - start[rows.sequence[kept]], seen),
        np.zeros(len(kept) + len(targets), bool),
        place,
        np.where(query < 0, -1, query + before[own]),
    )


def _earlier_than(times: Ints, sequence: Ints, asked: Ints, of: Ints) -> Ints:
    """For each question (a time, a sequence) where in the columns, sorted by sequence and time, earlier ones end."""
    order = np.lexsort(
        (np.r_[np.ones(len(times), int), np.zeros(len(asked), int)], np.r_[times, asked], np.r_[sequence, of])
    )
    rank = np.cumsum(order < len(times))
    found = np.empty(len(order), np.int64)
    found[order] = rank
    return found[len(times) :]


def _last_acted(acted: NDArray[np.bool_], begin: Ints, end: Ints) -> Ints:
    """The last of the tokens begin to end that is of an action, -1 without one."""
    last = np.append(np.maximum.accumulate(np.where(acted, np.arange(len(acted)), -1)), -1)[end - 1]
    return np.where((end > begin) & (last >= begin), last, -1)


def _fields(kinds: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(kinds == PROFILE, FEATURE, ITEM).astype(np.uint8)


def request_times(history: History) -> Ints:
    """i64[n], ms: the request time of each impression, the own time of every other row."""
    rows = Rows.of([history])
    return rows.times[rows.anchor]


def visible(history: History) -> Ints:
    """i64[n]: how many leading rows each row sees besides itself."""
    return Rows.of([history]).first_unseen


def _with_users(tokens: Tokens, users: Sequence[int] | None, layout: Layout) -> Tokens:
    """The same with the user's own token before each sequence."""
    if users is None or len(users) != len(tokens.offsets) - 1:
        raise ValueError("a model with `user_token` wants the user of every history")
    at = tokens.offsets[:-1]
    shift = np.repeat(np.arange(1, len(tokens.offsets)), np.diff(tokens.offsets))  # of each token
    shift = np.append(shift, 0)
    return Tokens(
        tokens.offsets + np.arange(len(tokens.offsets)),
        np.insert(tokens.marks, at, 1 << layout.user),
        np.insert(tokens.keys, at, np.array(users, np.uint64)),
        np.insert(tokens.fields, at, USER),
        np.insert(tokens.times, at, CONTEXT_TIME),
        np.insert(tokens.query_times, at, CONTEXT_TIME),
        np.insert(tokens.visible + 1, at, 0),
        np.insert(tokens.provisional, at, False),
        tokens.targets + shift[tokens.targets],
        np.where(tokens.queries < 0, -1, tokens.queries + shift[tokens.queries]),
    )


def _flat(parts: Sequence[Ints] | None, starts: Ints) -> Ints:
    """Indices that count within each history, counted over all of them."""
    if parts is None:
        return np.zeros(0, np.int64)
    return column(parts, np.int64) + np.repeat(starts, [len(part) for part in parts])
