"""Stored bytes are held: what was written by an earlier release must be read by this one."""

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgr.errors import DataError
from streamgr.state import codec
from streamgr.state.codec import Stored

FULL = Stored("e1", 2**64 - 1, 1_700_000_000_123, 1_700_000_600_000, True, 42, "r1", "home", 3, {"a": "x", "b": 7})
BARE = Stored("é", 0, 0, codec.NEVER, False, 0, "", "", -1, None)


def test_golden_bytes_of_an_event() -> None:
    assert codec.encode_event(FULL).hex() == (
        "019aa26531cfffffffffffffffffcf0000018bcfe5687bcf0000018bcfee8fc0c32aa27231a4686f6d650382a161a178a16207"
    )
    assert codec.encode_event(BARE).hex() == "019aa2c3a90000ffc200a0a0ffc0"
    assert codec.decode_event(codec.encode_event(FULL)) == FULL
    assert codec.decode_event(codec.encode_event(BARE)) == BARE


def test_golden_bytes_of_the_keys() -> None:
    user = codec.uid("u1")
    assert user.hex() == "44f597451069192865eb2bbd610ed0fb"
    assert codec.event_key(user, 1_700_000_000_123, 3, "e1").hex() == user.hex() + "fffffe74301a9784031b5d5e51f54f0f04"
    assert codec.item_bytes(1).hex() == "0000000000000001"
    assert codec.due_key(200).hex() == "00000000000000c8"
    assert codec.due_key(200, user).hex() == "00000000000000c8" + user.hex()
    assert codec.due_key(200, user, 7).hex() == "00000000000000c8" + user.hex() + "0000000000000007"


def test_another_format_is_refused_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"format 2.*remedy"):
        codec.decode_event(b"\x02" + codec.encode_event(FULL)[1:])
    with pytest.raises(DataError, match="empty"):
        codec.decode_event(b"")
    with pytest.raises(DataError, match="damaged"):
        codec.decode_event(codec.encode_event(FULL)[:-1])


TIMES = st.integers(0, 2**63 - 1)


@given(TIMES, TIMES, st.integers(0, 31), st.text(min_size=1, max_size=128))
def test_keys_run_from_new_to_old_and_give_time_and_kind_back(a: int, b: int, kind: int, event_id: str) -> None:
    user = codec.uid("u")
    one, two = codec.event_key(user, a, kind, event_id), codec.event_key(user, b, kind, event_id)
    assert len(one) == codec.EVENT_KEY_BYTES
    assert (one < two) == (a > b)
    assert codec.split_event_key(one) == (a, kind)
    assert (one >= codec.scan_key(user, b + 1)) == (a <= b)


@given(st.integers(0, 2**63 - 1), st.one_of(st.none(), TIMES), st.text(min_size=1, max_size=256))
def test_timers_give_step_user_and_time_back(step: int, behind: int | None, user: str) -> None:
    uid = codec.uid(user)
    key = codec.due_key(step, uid, behind)
    assert codec.split_due_key(key) == (step, uid, behind)
    assert codec.due_key(step) < key < codec.due_key(step + 1)


def test_a_tuple_of_the_same_fields_has_the_same_bytes() -> None:
    for event in (FULL, BARE):
        fields = tuple(getattr(event, name) for name in event.__struct_fields__)
        assert codec.encode_event(fields) == codec.encode_event(event)


@given(st.binary(min_size=16, max_size=16), TIMES, st.integers(0, 31), st.text(min_size=1, max_size=128))
def test_many_at_once_are_as_one_by_one(user: bytes, time: int, kind: int, event_id: str) -> None:
    rows = [(event_id, *msgspec.structs.astuple(FULL)[1:]), msgspec.structs.astuple(BARE)]
    plain = [(codec.event_key(user, time, kind, row[0]), codec.encode_event(row)) for row in rows]
    assert codec.encode_events(user, time, kind, rows) == plain
    assert plain[0][0].endswith(hashlib.blake2b(event_id.encode(), digest_size=8).digest())
