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
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamgr.events import FIRST_ACTION, IMPRESSION, PROFILE, History
from streamgr.model.table import FEATURE, ITEM, USER

Number = TypeVar("Number", np.uint8, np.int64, np.uint64)
Ints = NDArray[np.int64]

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
    rows = _Rows.of(histories)
    query_times = np.append(rows.times[1:], 0)
    last = rows.offsets[1:][np.diff(rows.offsets) > 0] - 1
    query_times[last] = rows.times[last] if at is None else np.asarray(at, np.int64)[np.diff(rows.offsets) > 0]

    chosen = _flat(targets, rows.offsets[:-1])
    end = rows.earlier[chosen] if at is None else rows.offsets[1:]  # of what is seen when it is asked for
    begin = rows.offsets[rows.sequence[chosen]] if at is None else rows.offsets[:-1]
    acted = np.maximum.accumulate(np.where(rows.kinds >= FIRST_ACTION, np.arange(len(rows)), -1))
    query = np.append(acted, -1)[end - 1]
    query = np.where((end > begin) & (query >= begin), query, -1)

    shift = np.arange(1, len(histories) + 1) if layout.user_token else np.zeros(len(histories), np.int64)
    of_row = np.append(shift[rows.sequence], 0)
    tokens = Tokens(
        rows.offsets,
        np.int64(1) << rows.kinds.astype(np.int64),
        rows.items,
        np.where(rows.kinds == PROFILE, FEATURE, ITEM).astype(np.uint8),
        rows.times,
        np.where(rows.is_item, rows.times[rows.anchor], query_times),
        rows.first_unseen - rows.offsets[rows.sequence],
        ~rows.is_item,
        chosen + of_row[chosen],
        np.where(query < 0, -1, query + of_row[query]),
    )
    return _with_users(tokens, users, layout) if layout.user_token else tokens


def request_times(history: History) -> Ints:
    """i64[n], ms: the request time of each impression, the own time of every other row."""
    rows = _Rows.of([history])
    return rows.times[rows.anchor]


def visible(history: History) -> Ints:
    """i64[n]: how many leading rows each row sees besides itself."""
    return _Rows.of([history]).first_unseen


@dataclass(frozen=True, slots=True)
class _Rows:
    """Histories end to end: their columns, the sequence of each row, for each row the first of its request (`anchor`),
    where the rows that are earlier than that one's time end, and where the rows end that it sees."""

    offsets: Ints
    sequence: Ints
    kinds: NDArray[np.uint8]
    items: NDArray[np.uint64]
    times: Ints
    is_item: NDArray[np.bool_]
    anchor: Ints
    earlier: Ints
    first_unseen: Ints

    def __len__(self) -> int:
        return len(self.kinds)

    @classmethod
    def of(cls, histories: Sequence[History]) -> "_Rows":
        lengths = np.array([len(h) for h in histories], np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        kinds = _column([h.kinds for h in histories], np.uint8)
        times = _column([h.times for h in histories], np.int64)
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        index = np.arange(len(kinds))
        is_item = kinds == IMPRESSION
        anchor = _request_start(sequence, is_item, _column([h.requests for h in histories], np.uint64))
        begins = np.ones(len(kinds), bool)  # where a run of equal times begins
        begins[1:] = (times[1:] != times[:-1]) | (sequence[1:] != sequence[:-1])
        run_start = np.maximum.accumulate(np.where(begins, index, 0))
        earlier = run_start[anchor]
        return cls(
            offsets,
            sequence,
            kinds,
            _column([h.items for h in histories], np.uint64),
            times,
            is_item,
            anchor,
            earlier,
            np.where(is_item, earlier, index),
        )


def _request_start(sequence: Ints, is_item: NDArray[np.bool_], requests: NDArray[np.uint64]) -> Ints:
    """Index of the first impression of each impression's request; every other row's own index."""
    anchor = np.arange(len(requests))
    shown = np.flatnonzero(is_item & (requests != 0))
    if len(shown):
        order = shown[np.lexsort((requests[shown], sequence[shown]))]  # stable: the earliest of a request leads it
        leads = np.ones(len(order), bool)
        leads[1:] = (requests[order][1:] != requests[order][:-1]) | (sequence[order][1:] != sequence[order][:-1])
        anchor[order] = order[np.maximum.accumulate(np.where(leads, np.arange(len(order)), 0))]
    return anchor


def _with_users(tokens: Tokens, users: Sequence[int] | None, layout: Layout) -> Tokens:
    """The same with the user's own token before each sequence. Token indices count it already."""
    if users is None or len(users) != len(tokens.offsets) - 1:
        raise ValueError("a model with `user_token` wants the user of every history")
    at = tokens.offsets[:-1]
    return Tokens(
        tokens.offsets + np.arange(len(tokens.offsets)),
        np.insert(tokens.marks, at, 1 << layout.user),
        np.insert(tokens.keys, at, np.array(users, np.uint64)),
        np.insert(tokens.fields, at, USER),
        np.insert(tokens.times, at, CONTEXT_TIME),
        np.insert(tokens.query_times, at, CONTEXT_TIME),
        np.insert(tokens.visible + 1, at, 0),
        np.insert(tokens.provisional, at, False),
        tokens.targets,
        tokens.queries,
    )


def _flat(parts: Sequence[Ints] | None, starts: Ints) -> Ints:
    """Indices that count within each history, counted over all of them."""
    if parts is None:
        return np.zeros(0, np.int64)
    return _column(parts, np.int64) + np.repeat(starts, [len(part) for part in parts])


def _column(parts: Sequence[NDArray[Any]], dtype: type[Number]) -> NDArray[Number]:
    return np.concatenate([np.zeros(0, dtype), *(part.astype(dtype, copy=False) for part in parts)])
