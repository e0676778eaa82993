"""Leave one out: each user's last item is the test, the last but one the validation, all before is learned from.

The protocol of the public sequence recommenders (arXiv 2402.17152 section 4.1.1; RecTools' notebook), with what they
differ in settled here: interactions in the order (time, place in the file), a stable sort, because a quarter of
MovieLens's last items hang on ties; every item of the catalogue is ranked, none sampled; what the user has had before
the asked place cannot be recommended; ties count against the model (by item id they would favour it). A window is the
`length` items before a place, and `query_times` are the times of what came next: the time of the request, which a
system knows when it is asked.
"""

import csv
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgr.errors import DataError
from streamgr.events import FIRST_ACTION
from streamgr.lab.metrics import hit_rate, ndcg
from streamgr.model.table import ITEM
from streamgr.model.tokens import Tokens

Ints = NDArray[np.int64]
TEST, VALIDATION, TRAINING = 1, 2, 3  # where a window's asked item stands, counted from the end
LEAST = 4  # interactions of a user: one to learn from, one to learn, and the two that are held out


@dataclass(frozen=True, slots=True)
class Interactions:
    """offsets i64[U+1]; items i64[n], numbered 0..count-1; times i64[n], ms, all 0 where only the order is known."""

    offsets: Ints
    items: Ints
    times: Ints
    count: int

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, users: NDArray[Any], items: NDArray[Any], times: Ints) -> "Interactions":
        """From columns in file order; users of fewer than `LEAST` interactions are left out."""
        _, user, counts = np.unique(users, return_inverse=True, return_counts=True)
        keep = counts[user] >= LEAST
        user, items, times = user[keep], items[keep], times[keep]
        order = np.lexsort((np.arange(len(user)), times, user))
        names, numbered = np.unique(items[order], return_inverse=True)
        lengths = np.unique(user, return_counts=True)[1]
        return cls(np.append(0, np.cumsum(lengths)), numbered.astype(np.int64), times[order], len(names))


def read(path: Path) -> Interactions:
    """A log with columns ts_ms, user and item (.csv.gz), or a line a user: the user's id, then items (.txt.gz)."""
    try:
        with gzip.open(path, "rt") as file:
            if path.name.endswith(".csv.gz"):
                rows = [(row["user"], row["item"], int(row["ts_ms"])) for row in csv.DictReader(file)]
            else:
                lines = enumerate(file)
                rows = [(str(number), item, 0) for number, line in lines for item in line.split()[1:]]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"cannot be read: {error!r}", where=str(path)) from None
    user, item, time = zip(*rows, strict=True) if rows else ((), (), ())
    return Interactions.of(np.array(user), np.array(item), np.array(time, np.int64))


@dataclass(frozen=True, slots=True)
class Windows:
    """Some users' windows. tokens: item tokens, each seeing itself and what is before it; items i64[T] theirs;
    following i64[T]: the item after each; last i64[b]: the last token of each window."""

    tokens: Tokens
    items: Ints
    following: Ints
    last: Ints


def windows(data: Interactions, users: Ints, place: int, length: int) -> Windows:
    """The `length` items before the item at `place` from the end (TEST, VALIDATION, TRAINING) of these users."""
    asked = data.offsets[users + 1] - place
    lengths = np.minimum(asked - data.offsets[users], length)
    offsets = np.append(0, np.cumsum(lengths))
    visible = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    rows = visible + np.repeat(asked - lengths, lengths)
    items = data.items[rows]
    tokens = Tokens(
        offsets=offsets,
        marks=np.full(len(rows), 1 << FIRST_ACTION),
        keys=items.astype(np.uint64),
        fields=np.full(len(rows), ITEM, np.uint8),
        times=data.times[rows],
        query_times=data.times[rows + 1],
        visible=visible,
        provisional=np.ones(len(rows), bool),
        targets=np.zeros(0, np.int64),
        queries=np.zeros(0, np.int64),
    )
    return Windows(tokens, items, data.items[rows + 1], offsets[1:] - 1)


def batches(data: Interactions, size: int, rng: np.random.Generator | None = None) -> Iterator[Ints]:
    """Users in batches of `size`; without rng by the length of their sequences, so that little is padded."""
    order = np.argsort(np.diff(data.offsets), kind="stable") if rng is None else rng.permutation(data.users)
    for start in range(0, data.users, size):
        yield order[start : start + size]


def ranks(scores: Tensor, data: Interactions, users: Ints, place: int) -> Ints:
    """The rank i64[b] of each user's item at `place` by scores f32[b, count]; -1: the user has had it before."""
    asked = data.offsets[users + 1] - place
    target = torch.from_numpy(data.items[asked])
    true = scores.gather(1, target[:, None])
    had = asked - data.offsets[users]
    row = np.repeat(np.arange(len(users)), had)
    before = np.arange(had.sum()) - np.repeat(np.cumsum(had) - had, had) + np.repeat(data.offsets[users], had)
    seen = torch.zeros(scores.shape, dtype=torch.bool)
    seen[torch.from_numpy(row), torch.from_numpy(data.items[before])] = True
    ahead = ~(scores < true) & ~seen  # what is not finite counts against the model too; the item itself: 1 is the best
    again = seen.gather(1, target[:, None]).squeeze(1)
    return torch.where(again, -1, ahead.sum(1)).numpy()


@dataclass(frozen=True, slots=True)
class Quality:
    """Hit rate and NDCG by cut-off."""

    hr_10: float
    ndcg_10: float
    hr_50: float
    ndcg_50: float


def evaluate(score: Callable[[Windows], Tensor], data: Interactions, place: int, length: int) -> Quality:
    """score: windows -> f32[b, count], what follows each."""
    found = [
        ranks(score(windows(data, users, place, length)), data, users, place) for users in batches(data, 256)
    ]  # fmt: skip
    rank = np.concatenate(found)
    values = [measure(rank, k) or 0.0 for k in (10, 50) for measure in (hit_rate, ndcg)]
    return Quality(*values)
