"""Keys and values of a partition's database, byte by byte; golden bytes are held by a test.

    events  uid 16 | ~time 8 | kind 1 | event hash 8   -> Stored     a user's newest event first
    profiles  the keys of the profile events among them  -> nothing
    users   uid 16                                     -> user text
    items   item key 8                                 -> item text
    due     step 8 | uid 16 [| time 8]                 -> nothing      open labels by the watermark that closes them
    state   "meta" | "progress"                        -> see `store`

A user's key is a digest of fixed width, so that a prefix scan finds exactly one user. The time is complemented, so
that scanning forwards goes back in time. Events of the same millisecond lie in no particular order: sequence order
(decision 9) needs kinds by name and the whole event id, so readers always take all events of a millisecond and sort.
Every event value starts with its version.
"""

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import msgspec

from streamgr.errors import Damaged, DataError

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what msgspec raises on damaged bytes
VERSION = 1  # of an event's value
UID_BYTES, EVENT_KEY_BYTES, DUE_KEY_BYTES = 16, 33, 32
NEVER = -1  # `due` of what is no target
LAST_STEP = (1 << 64) - 1  # later than any

_U64 = (1 << 64) - 1
_event_head = struct.Struct(">QB")
_scan_tail = struct.Struct(">Q")
_due = struct.Struct(">Q16s")
_event_digest = blake2b(digest_size=8)  # copied for each event: making a new one costs twice as much


class Stored(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The value of an event. Its kind and time are in the key.

    item: `events.item_key` (0 for a profile). append_ms: broker append time. due: the watermark (ms) at which it
    becomes a target, `NEVER` for what is none. late: it arrived too late to count (decision 9). offset: of its record.
    """

    event_id: str
    item: int
    append_ms: int
    due: int
    late: bool
    offset: int
    request: str
    surface: str
    position: int
    features: Mapping[str, str | int] | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Stored)
_HEAD = bytes([VERSION])


@lru_cache(maxsize=1 << 16)
def uid(user: str) -> bytes:
    """The 16-byte key of a user."""
    return blake2b(user.encode(), digest_size=UID_BYTES, person=b"user").digest()


def event_key(user: bytes, time: int, kind: int, event_id: str) -> bytes:
    """Where an event lies; `user` is its `uid`. The same identity (decision 9) gives the same key."""
    digest = _event_digest.copy()
    digest.update(event_id.encode())
    return user + _event_head.pack(_U64 - time, kind) + digest.digest()


def scan_key(user: bytes, before: int | None = None) -> bytes:
    """Where to start for a user's events, newest first: all, or those with time < `before` (at least 1)."""
    return user if before is None else user + _scan_tail.pack(_U64 - before + 1)


def split_event_key(key: bytes) -> tuple[int, int]:
    """(time, kind) of an event's key."""
    time, kind = _event_head.unpack_from(key, UID_BYTES)
    return _U64 - time, kind


def encode_event(event: "Stored | tuple[object, ...]") -> bytes:
    """The bytes of an event's value; `event` may be a plain tuple of `Stored`'s fields (its bytes are the same)."""
    return _HEAD + _encoder.encode(event)


def encode_events(user: bytes, time: int, kind: int, rows: Iterable[tuple[Any, ...]]) -> list[tuple[bytes, bytes]]:
    """The keys and values of a user's events of one time and kind; a row is a tuple of `Stored`'s fields."""
    prefix, new_digest, encode = user + _event_head.pack(_U64 - time, kind), _event_digest.copy, _encoder.encode
    pairs = []
    for row in rows:
        digest = new_digest()
        digest.update(row[0].encode())
        pairs.append((prefix + digest.digest(), _HEAD + encode(row)))
    return pairs


def decode_event(value: bytes) -> Stored:
    """Read an event's value; raises `DataError` on what this version cannot read."""
    if value[:1] != _HEAD:
        raise DataError(
            f"an event of format {value[0] if value else '(empty)'}, this version reads {VERSION}",
            remedy="run the version that wrote it, or remove the state and rebuild it from the log",
        )
    try:
        return _decoder.decode(memoryview(value)[1:])
    except UNREADABLE as error:
        raise Damaged(f"a damaged event: {error}") from None


def item_bytes(key: int) -> bytes:
    """The key of an item's text."""
    return key.to_bytes(8, "big")


def due_key(step: int, user: bytes = b"", behind: int | None = None) -> bytes:
    """The key of a user's open labels: `step` is the watermark (ms, on the grid of steps) that closes them.

    behind: the time of an event that the watermark had passed already when it came. Without a user: before all of them.
    """
    key = _due.pack(step, user) if user else _scan_tail.pack(step)
    return key if behind is None else key + _scan_tail.pack(behind)


def split_due_key(key: bytes) -> tuple[int, bytes, int | None]:
    """(step, user, behind)"""
    step, user = _due.unpack_from(key)
    return step, user, None if len(key) == _due.size else _scan_tail.unpack_from(key, _due.size)[0]
