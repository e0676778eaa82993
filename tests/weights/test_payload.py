"""Tensors to bytes and back: equal, or refused by name."""

import json
from hashlib import sha256

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from streamgr.weights.manifest import Rejected, TensorSpec
from streamgr.weights.payload import DTYPES, Payload, check, decode, encode, overlay, require_same_form, split


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    names = draw(st.lists(st.text("abc./_é", min_size=1, max_size=6), max_size=4, unique=True))
    payload: Payload = {}
    for name in names:
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        payload[f"dense/{name}"] = torch.randint(0, 200, shape, generator=generator).to(dtype)
    if draw(st.booleans()):
        rows = draw(st.lists(st.integers(0, 2**40), max_size=6, unique=True))
        n, width = len(rows), draw(st.integers(1, 3))
        payload |= {
            "table/rows": torch.tensor(rows, dtype=torch.int64),
            "table/keys": torch.tensor(
                draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n)), dtype=torch.int64
            ),
            "table/until_ms": torch.arange(n),
            "table/field": torch.randint(0, 3, (n,), generator=generator).to(torch.uint8),
            "table/weight": torch.randn(n, width, generator=generator).bfloat16(),
        }
    return payload


@given(payloads(), st.integers(1, 300))
def test_round_trip(payload: Payload, chunk_bytes: int) -> None:
    data, specs = encode(payload)
    parts = split(data, chunk_bytes)
    assert all(len(part) == chunk_bytes for part in parts[:-1])
    back = decode(b"".join(parts), specs)
    assert back.keys() == payload.keys()
    for name, tensor in payload.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert encode(back) == (data, specs), "the same tensors give the same bytes"


SMALL: Payload = {
    "dense/w": torch.tensor([[1.0, 2.0], [3.0, -4.0]]),
    "table/rows": torch.tensor([0, 7]),
    "table/keys": torch.tensor([11, -(2**63) + 5]),
    "table/until_ms": torch.tensor([1, 2]),
    "table/field": torch.tensor([0, 1], dtype=torch.uint8),
    "table/weight": torch.tensor([[0.5], [0.25]]).bfloat16(),
}
DATA, SPECS = encode(SMALL)


@given(st.integers(0, len(DATA) * 8 - 1))
def test_every_flipped_bit_is_named(bit: int) -> None:
    damaged = bytearray(DATA)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        back = decode(bytes(damaged), SPECS)
    except Rejected as rejected:
        assert rejected.reason in ("schema", "digest", "shape")
    else:  # a bit of the header that says nothing (a space, an escape)
        assert all(torch.equal(back[name], tensor) for name, tensor in SMALL.items())


@given(
    st.integers(0, len(DATA) - 1).map(lambda n: DATA[:n])
    | st.binary(max_size=60)
    | st.binary(min_size=1, max_size=4).map(lambda b: DATA + b)
)
def test_foreign_bytes_are_named(data: bytes) -> None:
    with pytest.raises(Rejected) as raised:
        decode(data, SPECS)
    assert raised.value.reason == "schema"


def test_a_header_may_not_be_large() -> None:
    header = json.dumps({"__metadata__": {"x": "y" * (5 << 20)}}).encode()
    with pytest.raises(Rejected, match="a safetensors header of"):
        decode(len(header).to_bytes(8, "little") + header, {})


def _spec(name: str, **changes: object) -> dict[str, TensorSpec]:
    spec = SPECS[name]
    fields = {"dtype": spec.dtype, "shape": spec.shape, "sha256": spec.sha256} | changes
    return SPECS | {name: TensorSpec(**fields)}  # type: ignore[arg-type]


@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 299), st.booleans())
def test_one_value_that_is_not_finite_is_seen_wherever_it_stands(kind: torch.dtype, at: int, nan: bool) -> None:
    values = torch.arange(300.0).to(kind).reshape(30, 10)
    check({"dense/w": values, "dense/none": values[:0]})
    values.view(-1)[at] = float("nan") if nan else float("-inf")
    with pytest.raises(Rejected, match="not finite"):
        check({"dense/w": values})


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ({n: s for n, s in SPECS.items() if n != "dense/w"}, "schema"),
        (SPECS | {"dense/other": SPECS["dense/w"]}, "schema"),
        (_spec("dense/w", dtype="I32"), "schema"),
        (_spec("dense/w", shape=[4]), "shape"),
        (_spec("dense/w", shape=[2, 3]), "shape"),
        (_spec("table/keys", sha256="0" * 64), "digest"),
    ],
)
def test_the_manifest_decides(specs: dict[str, TensorSpec], reason: str) -> None:
    with pytest.raises(Rejected) as raised:
        decode(DATA, specs)
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dense/w": torch.tensor([float("nan")])}, "nonfinite"),
        ({"dense/w": torch.tensor([float("-inf")], dtype=torch.bfloat16)}, "nonfinite"),
        ({"table/weight": torch.tensor([[1.0], [float("nan")]]).bfloat16()}, "nonfinite"),
        ({"dense/w": torch.zeros(1, dtype=torch.complex64)}, "schema"),
        ({"dense/w": torch.zeros(1, dtype=torch.bool)}, "schema"),
        ({"state/w": torch.zeros(1)}, "schema"),
        ({"table/more": torch.zeros(1)}, "schema"),
        ({"table/rows": torch.tensor([0, 7], dtype=torch.int32)}, "schema"),
        ({"table/keys": torch.tensor([11, 12], dtype=torch.int32)}, "schema"),
        ({"table/until_ms": torch.tensor([5, 6], dtype=torch.int32)}, "schema"),
        ({"table/field": torch.zeros(2, dtype=torch.int64)}, "schema"),
        ({"table/weight": torch.zeros(2, 1)}, "schema"),
        ({"table/rows": torch.tensor([0, 1, 2])}, "shape"),
        ({"table/weight": torch.zeros(1, 1).bfloat16()}, "shape"),
        ({"table/rows": torch.tensor([7, 7])}, "shape"),
        ({"table/rows": torch.tensor([-1, 7])}, "shape"),
    ],
)
def test_what_is_no_payload_is_refused_on_both_sides(changes: Payload, reason: str) -> None:
    with pytest.raises(Rejected) as raised:
        encode(SMALL | changes)
    assert raised.value.reason == reason
    data = save({name: tensor.contiguous() for name, tensor in (SMALL | changes).items()})
    specs = dict(SPECS)
    for name, tensor in changes.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.complex64: "C64", torch.bool: "BOOL"} | {t: n for n, t in DTYPES.items()}
        specs[name] = TensorSpec(dtype[tensor.dtype], list(tensor.shape), sha256(raw).hexdigest())
    with pytest.raises(Rejected) as raised:
        decode(data, specs)
    assert raised.value.reason == reason


def test_a_delta_has_its_parents_form_whatever_its_number_of_rows() -> None:
    fewer = SPECS | {
        name: TensorSpec(SPECS[name].dtype, [1, *SPECS[name].shape[1:]], "")
        for name in SPECS
        if name.startswith("table/")
    }
    require_same_form(fewer, SPECS)
    for other in (
        _spec("dense/w", shape=[2, 3]),
        _spec("table/weight", shape=[2, 2]),
        _spec("table/weight", dtype="F32"),
        {n: s for n, s in SPECS.items() if n != "dense/w"},
    ):
        with pytest.raises(Rejected, match="not of its parent's form"):
            require_same_form(other, SPECS)


@given(st.integers(0, 4_000), st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.sampled_from([*DTYPES]))
def test_one_value_that_is_not_finite_is_found_wherever_it_is(at: int, value: float, name: str) -> None:
    dtype = DTYPES[name]
    if not dtype.is_floating_point:
        return
    tensor = torch.randn(4_001, generator=torch.Generator().manual_seed(at)).to(dtype)
    check({"dense/w": tensor})
    tensor[at] = value
    with pytest.raises(Rejected, match="not finite"):
        check({"dense/w": tensor})


@given(st.lists(st.lists(st.integers(0, 9), max_size=6, unique=True), min_size=1, max_size=4))
def test_an_overlay_is_what_the_parts_come_to_one_after_the_other(rows: list[list[int]]) -> None:
    parts: list[Payload] = []
    expected: dict[int, tuple[int, float]] = {}
    for n, named in enumerate(rows):
        weight = torch.arange(len(named)).float() + 10 * n
        parts.append(_table(named, [100 * n + row for row in named], weight) | {"dense/w": torch.tensor([float(n)])})
        expected |= {row: (100 * n + row, float(w)) for row, w in zip(named, weight, strict=True)}
    whole = overlay(parts)
    assert whole["dense/w"].item() == len(rows) - 1
    found = zip(whole["table/keys"].tolist(), whole["table/weight"][:, 0].tolist(), strict=True)
    assert dict(zip(whole["table/rows"].tolist(), found, strict=True)) == expected
    check(whole)


def _table(rows: list[int], keys: list[int], weight: torch.Tensor) -> Payload:
    return {
        "table/rows": torch.tensor(rows, dtype=torch.int64),
        "table/keys": torch.tensor(keys, dtype=torch.int64),
        "table/until_ms": torch.zeros(len(rows), dtype=torch.int64),
        "table/field": torch.zeros(len(rows), dtype=torch.uint8),
        "table/weight": weight[:, None].bfloat16(),
    }
