"""The wire of the examples: what was written yesterday reads today, and damage is an error by name."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgr.errors import DataError
from streamgr.events import IMPRESSION, History
from streamgr.sequence.examples import BEFORE_ALL, Example, Progress, decode, encode

GOLDEN = bytes.fromhex(
    "dc0011a76578616d706c6502a466616365920700"
    "92ffffa275310563c4020102c41001000000000000000200000000000000c4100a000000000000000b00000000000000"
    "c41005000000000000000500000000000000c40400000000c40401000000c4086200000000000000"
    "91a169" + "91a165"
)


def some_example(n: int = 2, m: int = 1, user: str = "u1") -> Example:
    return Example(
        fingerprint="face",
        position=(7, 0),
        prev=BEFORE_ALL,
        user=user,
        watermark=5,
        append_ms=99,
        history=History(
            np.arange(IMPRESSION, IMPRESSION + n, dtype=np.uint8),
            np.arange(1, n + 1, dtype=np.uint64),
            np.arange(10, 10 + n, dtype=np.int64),
            np.full(n, 5, np.uint64),
        ),
        target_index=np.arange(m, dtype=np.int64),
        target_labels=np.ones(m, np.uint32),
        target_append_ms=np.full(m, 98, np.int64),
        target_items=["i"] * m,
        target_events=["e"] * m,
    )


def assert_same(a: Example, b: Example) -> None:
    for name in Example.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, History):
            for column in History.__slots__:
                assert np.array_equal(getattr(x, column), getattr(y, column))
        elif isinstance(x, np.ndarray):
            assert np.array_equal(x, y)
        else:
            assert x == y


def test_the_golden_bytes_are_written_and_read() -> None:
    assert encode(some_example()).hex() == GOLDEN.hex()
    read = decode(GOLDEN)
    assert isinstance(read, Example)
    assert_same(read, some_example())


def test_what_the_version_before_wrote_is_read() -> None:
    before = bytearray(GOLDEN)
    before[11] = 1
    read = decode(bytes(before))
    assert isinstance(read, Example)
    assert_same(read, some_example())


def test_progress_goes_round() -> None:
    progress = Progress(1, "face", 8, 5, 99)
    assert encode(progress) == bytes.fromhex("96a870726f677265737301a466616365080563")
    assert decode(encode(progress)) == progress


@given(st.integers(1, 50), st.integers(0, 50), st.text(max_size=20).filter(lambda t: t.isprintable()))
def test_every_example_goes_round(n: int, m: int, user: str) -> None:
    example = some_example(n, min(n, m), user)
    read = decode(encode(example))
    assert isinstance(read, Example)
    assert_same(read, example)


@given(st.integers(0, len(GOLDEN) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_an_example_or_an_error_never_a_crash(at: int, flip: int) -> None:
    damaged = bytearray(GOLDEN)
    damaged[at] ^= flip
    try:
        read = decode(bytes(damaged))
    except DataError:
        return
    assert isinstance(read, Example)
    assert len(read.target_index) == len(read.target_items) <= len(read.history) + 1


@pytest.mark.parametrize("cut", range(0, len(GOLDEN), 7))
def test_a_truncated_record_is_an_error(cut: int) -> None:
    with pytest.raises(DataError):
        decode(GOLDEN[:cut])


def test_a_newer_format_is_refused_with_the_remedy() -> None:
    newer = msgspec.msgpack.decode(GOLDEN)
    newer[1] = 3
    with pytest.raises(DataError, match=r"format 3, this version reads .*2.*upgrade"):
        decode(msgspec.msgpack.encode(newer))
