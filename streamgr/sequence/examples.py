"""The wire of `streamgr.examples`: what the sequencer says and the trainer learns from.

An example is one user's targets closed by one step of the watermark, with the window of the sequence that they are
judged in. Its position (offset, n) is the source record that moved the watermark and its rank among that record's
outputs; `prev` is the position of its partition's previous example, so that a reader knows at once what is missing
or repeated. Progress records say how far the source has been read; they are learned by nobody and chained to nothing.

msgpack arrays, tagged; columns are little-endian bytes. Golden bytes are held by a test.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamgr.errors import DataError
from streamgr.events import History

FORMAT = 2  # 1 had no auxiliary rows
READABLE = (1, 2)
Position = tuple[int, int]  # (source offset, n-th output of that record)
BEFORE_ALL: Position = (-1, -1)


class WireExample(msgspec.Struct, array_like=True, frozen=True, tag="example", gc=False):
    """See `Example`; columns as bytes."""

    format: int
    fingerprint: str
    position: Position
    prev: Position
    user: str
    watermark: int
    append_ms: int
    kinds: bytes
    items: bytes
    times: bytes
    requests: bytes
    target_index: bytes
    target_labels: bytes
    target_append_ms: bytes
    target_items: list[str]
    target_events: list[str]


class Progress(msgspec.Struct, array_like=True, frozen=True, tag="progress", gc=False):
    """Everything before source `offset` has been answered. watermark: event ms; append_ms: of the last record read."""

    format: int
    fingerprint: str
    offset: int
    watermark: int
    append_ms: int


@dataclass(frozen=True, slots=True)
class Example:
    """One user's targets closed by one watermark step.

    history: the window, ending at the last target. target_index i64[m]: which tokens of it are targets now, ascending
    (an impression is a ranking target; an action is an organic retrieval target). target_labels u32[m]: bit b set when
    action kind b was joined in time. target_append_ms i64[m]: broker append time of the target's own record.
    append_ms: append time of the record that closed them.
    """

    fingerprint: str
    position: Position
    prev: Position
    user: str
    watermark: int
    append_ms: int
    history: History
    target_index: NDArray[np.int64]
    target_labels: NDArray[np.uint32]
    target_append_ms: NDArray[np.int64]
    target_items: list[str]
    target_events: list[str]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(WireExample | Progress)


def encode(output: Example | WireExample | Progress) -> bytes:
    """The bytes of one record of `streamgr.examples`."""
    if not isinstance(output, Example):
        return _encoder.encode(output)
    h = output.history
    return _encoder.encode(
        WireExample(
            FORMAT,
            output.fingerprint,
            output.position,
            output.prev,
            output.user,
            output.watermark,
            output.append_ms,
            h.kinds.astype("<u1", copy=False).tobytes(),
            h.items.astype("<u8", copy=False).tobytes(),
            h.times.astype("<i8", copy=False).tobytes(),
            h.requests.astype("<u8", copy=False).tobytes(),
            output.target_index.astype("<u4").tobytes(),
            output.target_labels.astype("<u4").tobytes(),
            output.target_append_ms.astype("<i8").tobytes(),
            output.target_items,
            output.target_events,
        )
    )


def decode(value: bytes) -> Example | Progress:
    """Read one record; raises `DataError` on anything this version cannot read."""
    try:
        wire = _decoder.decode(value)
        if wire.format not in READABLE:
            raise DataError(f"format {wire.format}, this version reads {READABLE}", remedy="upgrade the readers first")
        if isinstance(wire, Progress):
            return wire
        history = History(
            np.frombuffer(wire.kinds, "<u1"),
            np.frombuffer(wire.items, "<u8"),
            np.frombuffer(wire.times, "<i8"),
            np.frombuffer(wire.requests, "<u8"),
        )
        index = np.frombuffer(wire.target_index, "<u4").astype(np.int64)
        labels = np.frombuffer(wire.target_labels, "<u4")
        appended = np.frombuffer(wire.target_append_ms, "<i8")
        n, m = len(history), len(index)
        columns = {len(history.items), len(history.times), len(history.requests)}
        targets = {len(labels), len(appended), len(wire.target_items), len(wire.target_events)}
        if columns != {n} or targets != {m} or (m and int(index.max()) >= n):
            raise DataError("columns of different lengths", remedy="the record is damaged; see the sequencer's log")
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError) as error:
        raise DataError(f"not an example: {error}", remedy="only the sequencer may write this topic") from None
    return Example(
        wire.fingerprint,
        wire.position,
        wire.prev,
        wire.user,
        wire.watermark,
        wire.append_ms,
        history,
        index,
        labels,
        appended,
        wire.target_items,
        wire.target_events,
    )
