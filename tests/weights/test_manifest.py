"""The manifest's wire: golden bytes, round trips, and every damage under its name."""

import json
from hashlib import sha256

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgr.errors import DataError
from streamgr.weights.manifest import (
    CLAIM_KEY,
    MAX_LEARNED,
    PIN_KEY,
    Chunk,
    ClaimRecord,
    Learned,
    Manifest,
    PackedLearned,
    PinRecord,
    Probe,
    Rejected,
    TensorSpec,
    Unpinned,
    decode,
    encode,
    manifest_key,
    model_differences,
    model_digest,
    require_model,
)

MODEL = {"dim": 2, "actions": ["click"], "table": {"rows": 4}}
MANIFEST = Manifest(
    kind="delta",
    epoch=3,
    version=4101,
    parent=4100,
    model=MODEL,
    model_digest=model_digest(MODEL),
    step=12,
    targets_learned=340,
    horizon_ms=1_700_000_000_123,
    watermark_ms=1_700_000_000_000,
    positions={"streamgr.examples": {0: 17, 2: 5}},
    published_ms=1_700_000_000_456,
    tensors={"dense/w": TensorSpec("F32", [2, 2], "ab" * 32)},
    chunks=[Chunk(7, 100, "cd" * 32), Chunk(8, 28, "ef" * 32)],
    bytes=128,
    quality={"normalized_entropy": 0.91, "auc": None},
    learned=PackedLearned(2, 0, b""),
    state_digest="0123456789abcdef",
    probe=Probe([2**64 - 1, 5], [[0.5, -1.25]]),
    code="0.1.0",
)
MODEL_DIGEST = sha256(b'{"actions":["click"],"dim":2,"table":{"rows":4}}').hexdigest()
GOLDEN_BODY = (
    '{"kind":"delta","epoch":3,"version":4101,"parent":4100,"model":{"dim":2,"actions":["click"],"table":{"rows":4}},'
    f'"model_digest":"{MODEL_DIGEST}","step":12,"targets_learned":340,"horizon_ms":1700000000123,'
    '"watermark_ms":1700000000000,"positions":{"streamgr.examples":{"0":17,"2":5}},"published_ms":1700000000456,'
    f'"tensors":{{"dense/w":["F32",[2,2],"{"ab" * 32}"]}},"chunks":[[7,100,"{"cd" * 32}"],[8,28,"{"ef" * 32}"]],'
    '"bytes":128,"quality":{"normalized_entropy":0.91,"auc":null},'
    '"learned":{"total":2,"count":0,"columns":""},"state_digest":"0123456789abcdef",'
    '"probe":{"keys":[18446744073709551615,5],"logits":[[0.5,-1.25]]},"code":"0.1.0"}'
)


def test_golden_bytes() -> None:
    digest = sha256(GOLDEN_BODY.encode()).hexdigest()
    golden = f'{{"format":2,"sha256":"{digest}","body":{GOLDEN_BODY}}}'.encode()
    assert encode(MANIFEST) == golden
    assert decode(b"manifest/5", golden, 9) == MANIFEST


def test_a_claim_and_a_pin() -> None:
    claim = ClaimRecord(claimed_ms=5, last_version=3)
    assert decode(CLAIM_KEY, encode(claim), 0) == claim
    pin = PinRecord(epoch=3, version=7, pinned_ms=5, why="the one before is ill")
    assert decode(PIN_KEY, encode(pin), 0) == pin
    assert decode(PIN_KEY, None, 0) == Unpinned()
    with pytest.raises(Rejected, match="not a PinRecord"):
        decode(PIN_KEY, b"whatever a later version writes", 0)


numbers = st.integers(0, 2**53)
quality = st.dictionaries(st.text(max_size=8), st.none() | st.floats(allow_nan=False, allow_infinity=False), max_size=4)


@given(numbers, numbers, quality, st.dictionaries(st.text(max_size=5), st.dictionaries(numbers, numbers), max_size=3))
def test_round_trip(horizon: int, step: int, facts: dict, positions: dict) -> None:
    manifest = msgspec.structs.replace(MANIFEST, horizon_ms=horizon, step=step, quality=facts, positions=positions)
    assert decode(manifest_key(manifest.version), encode(manifest), 100) == manifest


WIRE = encode(MANIFEST)


@given(st.integers(0, len(WIRE) * 8 - 1))
def test_every_flipped_bit_is_named(bit: int) -> None:
    damaged = bytearray(WIRE)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        assert decode(b"manifest/5", bytes(damaged), 9) == MANIFEST, "damage passed for something else"
    except Rejected as rejected:
        assert rejected.reason in ("schema", "digest")


@given(
    st.binary(max_size=200) | st.integers(0, len(WIRE) - 1).map(lambda n: WIRE[:n]),
    st.sampled_from([b"claim", b"x", None]),
)
def test_foreign_bytes_are_named(value: bytes, key: bytes | None) -> None:
    with pytest.raises(Rejected) as raised:
        decode(key, value, 9)
    assert raised.value.reason in ("schema", "digest")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": 9}, "epoch"),
        ({"epoch": -1}, "epoch"),
        ({"version": 4102}, "schema"),
        ({"version": 5 - 4096, "parent": None, "kind": "snapshot"}, "schema"),
        ({"model": MODEL | {"dim": 3}}, "digest"),
        ({"parent": None}, "schema"),
        ({"parent": 4101}, "schema"),
        ({"kind": "snapshot"}, "schema"),
        ({"bytes": 129}, "schema"),
        ({"chunks": [], "bytes": 0}, "schema"),
        ({"chunks": [Chunk(-1, 128, "")]}, "schema"),
        ({"chunks": [Chunk(7, 0, ""), Chunk(8, 128, "")]}, "schema"),
        ({"learned": PackedLearned(1, 1, b"not deflated")}, "schema"),
    ],
)
def test_a_well_signed_contradiction_is_named(changes: dict, reason: str) -> None:
    with pytest.raises(Rejected) as raised:
        decode(b"manifest/5", encode(msgspec.structs.replace(MANIFEST, **changes)), 9)
    assert raised.value.reason == reason


def test_another_format_is_refused_by_number() -> None:
    wire = json.loads(WIRE)
    wire["format"] = 1
    with pytest.raises(Rejected, match="format 1, this version reads 2"):
        decode(b"manifest/5", json.dumps(wire).encode(), 9)


def test_keys_keep_4096_versions() -> None:
    assert manifest_key(1) == manifest_key(4097) != manifest_key(2)
    assert len({manifest_key(v) for v in range(1, 10_000)}) == 4096


def test_models_differ_by_name() -> None:
    other = {"dim": 2, "actions": ["click", "like"], "table": {"rows": 8}, "layers": 1}
    assert model_differences(MODEL, other) == [
        "actions: ['click'] is not ['click', 'like']",
        "layers: None is not 1",
        "table.rows: 4 is not 8",
    ]
    assert model_differences(MODEL, dict(reversed(MODEL.items()))) == []
    with pytest.raises(DataError, match=r"table\.rows: 4 is not 8"):
        require_model(MANIFEST, other)
    require_model(MANIFEST, dict(reversed(MODEL.items())))


columns = st.lists(st.tuples(*[st.integers(0, 2**44)] * 3), max_size=50)


@given(columns)
def test_learned_columns_round_trip(rows: list[tuple[int, int, int]]) -> None:
    table = np.array(rows, np.int64).reshape(-1, 3)
    learned = Learned(table[:, 0], table[:, 1], table[:, 2], 2 * len(rows))
    packed = msgspec.json.decode(msgspec.json.encode(learned.pack()), type=PackedLearned)
    back = Learned.unpack(packed)
    assert back.total == (2 * len(rows))
    assert np.array_equal(np.stack([back.target_append_ms, back.closing_append_ms, back.gradient_ms], 1), table)


def test_learned_columns_are_sampled_evenly_and_small() -> None:
    times = np.arange(10_000, dtype=np.int64) * 3 + 1_700_000_000_000
    packed = Learned(times, times + 1500, times + 1700, 10_000).pack()
    back = Learned.unpack(packed)
    assert (packed.count, back.total) == (MAX_LEARNED, 10_000)
    assert back.target_append_ms[0] == times[0] and back.target_append_ms[-1] == times[-1]
    assert np.array_equal(back.gradient_ms - back.target_append_ms, np.full(MAX_LEARNED, 1700))
    assert len(packed.columns) < 8_000


@pytest.mark.parametrize(
    "packed",
    [
        PackedLearned(1, MAX_LEARNED + 1, b""),
        PackedLearned(1, -1, b""),
        PackedLearned(1, 1, b"not deflated"),
        msgspec.structs.replace(Learned(*[np.arange(9)] * 3, 9).pack(), count=8),
        msgspec.structs.replace(Learned(*[np.arange(9)] * 3, 9).pack(), count=10),
    ],
)
def test_damaged_learned_columns_are_named(packed: PackedLearned) -> None:
    with pytest.raises(DataError, match="learned targets"):
        Learned.unpack(packed)
