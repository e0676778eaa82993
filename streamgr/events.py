"""Events and records: the types that everything else speaks of, and the 64-bit keys of items and requests.

What a record must be like to become an event is `decoder`'s matter.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

MAX_VALUE_BYTES = 1 << 20
MAX_ID, MAX_EVENT_ID, MAX_TEXT, MAX_FEATURES = 256, 128, 128, 32
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

PROFILE, IMPRESSION, FIRST_ACTION = 0, 1, 2  # an action's kind is FIRST_ACTION + its bit


class Record(NamedTuple):
    """One record of a partition. `append_ms` is the broker's append time (or its stand-in)."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    append_ms: int


@dataclass(frozen=True, slots=True)
class Records:
    """Consecutive records of one partition as columns, offsets ascending.

    next_offset: where to go on; it may lie past the last record, as transactions' control records take up offsets too.
    headers: of each record, where the consumer was asked for them.
    """

    topic: str
    partition: int
    offsets: list[int]
    keys: list[bytes | None]
    values: list[bytes | None]
    append_ms: list[int]
    next_offset: int
    headers: list[list[tuple[str, bytes]]] | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> Record:
        return Record(self.topic, self.partition, self.offsets[i], self.keys[i], self.values[i], self.append_ms[i])

    def between(self, first: int, end: int) -> "Records":
        """Those with first <= offset < end."""
        lo, hi = bisect_left(self.offsets, first), bisect_left(self.offsets, end)
        if lo == 0 and hi == len(self) and self.next_offset <= end:
            return self
        cut = slice(lo, hi)
        return Records(
            self.topic,
            self.partition,
            self.offsets[cut],
            self.keys[cut],
            self.values[cut],
            self.append_ms[cut],
            min(self.next_offset, end),
            self.headers[cut] if self.headers is not None else None,
        )


class Event(msgspec.Struct, frozen=True, gc=False):
    """A checked event of one user. `kind`: PROFILE, IMPRESSION, or FIRST_ACTION + bit; times in ms since 1970."""

    kind: int
    user: str
    item: str  # "" for a profile
    event_id: str
    time: int
    request: str = ""  # "" where absent
    surface: str = ""
    position: int = -1
    features: Mapping[str, str | int] | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Moves the watermark of its partition; part of no sequence."""

    time: int


@dataclass(frozen=True, slots=True)
class Erasure:
    """A null value under a user's key: forget the user."""

    user: str


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Why a record goes to the dead letters."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class History:
    """The window of one user's sequence that a model sees, as columns; sequence order, oldest first.

    kinds u8[n] (IMPRESSION or an action; profiles are not in it), items u64[n] (`item_key`), times i64[n] (ms),
    requests u64[n] (0 where absent).
    """

    kinds: NDArray[np.uint8]
    items: NDArray[np.uint64]
    times: NDArray[np.int64]
    requests: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.kinds)


@lru_cache(maxsize=1 << 18)
def item_key(text: str) -> int:
    """The 64-bit key that stands for an item id in sequences, examples and the ID table."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=b"item").digest(), "little")


def request_key(text: str) -> int:
    """The 64-bit key of a request id; 0 is kept for "absent"."""
    if not text:
        return 0
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=b"request").digest(), "little") or 1


def heartbeat(time: int) -> bytes:
    """The value of a heartbeat record at `time` (ms); it goes to every partition, under no key."""
    return msgspec.json.encode({"type": "heartbeat", "event_time": time})
