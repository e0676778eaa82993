"""The payload: named tensors to bytes and back, with every byte accounted for.

A payload is a dict of tensors: `dense/<parameter>` for the network and, for the ID table, what `IdTable.rows` gives:
`table/rows`, `table/keys`, `table/until_ms` i64[n], `table/field` u8[n] and `table/weight` bf16[n, D]. A snapshot holds
all used rows (whoever applies it has no others), a delta every dense parameter and the rows that changed.

On the wire it is one safetensors file cut into chunks. Records of the weights topic can be written by more than the
trainer, so they are untrusted input: nothing executable is ever read (safetensors, no pickle), the header is bounded,
dtypes come from a short list, and names, dtypes, shapes and digests must be the manifest's own. safetensors checks no
values, so finiteness is checked here.
"""

import math
from collections.abc import Mapping
from hashlib import sha256

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from streamgr.weights.manifest import Rejected, TensorSpec

Payload = dict[str, Tensor]

MAX_HEADER_BYTES = 4 << 20
TABLE = ("table/rows", "table/keys", "table/until_ms", "table/field", "table/weight")
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U64": torch.uint64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(payload: Payload) -> tuple[bytes, dict[str, TensorSpec]]:
    """The bytes of a payload and what the manifest says of each tensor.

    Raises `Rejected` (schema, shape, nonfinite) for what no reader would accept: better here than at every scorer.
    """
    specs = {}
    plain: Payload = {}
    storages: set[int] = set()
    for name in sorted(payload):
        tensor = payload[name].detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:  # tied parameters: safetensors wants each on its own
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
        if tensor.dtype not in _NAMES:
            raise Rejected("schema", f"dtype {tensor.dtype} may not cross the wire", where=name)
        specs[name] = TensorSpec(_NAMES[tensor.dtype], list(tensor.shape), sha256(_raw(tensor)).hexdigest())
    check(plain)
    return save(plain), specs


def decode(data: bytes, specs: Mapping[str, TensorSpec]) -> Payload:
    """The payload in `data` if it is exactly what `specs` names; raises `Rejected` by reason if not."""
    header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header > min(MAX_HEADER_BYTES, len(data) - 8):
        raise Rejected("schema", f"a safetensors header of {header} bytes in {len(data)}")
    try:
        views = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise Rejected("schema", f"not safetensors: {error}") from None
    if views.keys() != specs.keys():
        odd = sorted(views.keys() ^ specs.keys())
        raise Rejected("schema", f"tensors missing or not in the manifest: {', '.join(odd[:5])}")
    payload: Payload = {}
    for name, view in views.items():
        spec, raw = specs[name], view["data"]
        if view["dtype"] != spec.dtype or spec.dtype not in DTYPES:
            raise Rejected("schema", f"dtype {view['dtype']}, the manifest says {spec.dtype}", where=name)
        if list(view["shape"]) != spec.shape:
            raise Rejected("shape", f"shape {view['shape']}, the manifest says {spec.shape}", where=name)
        if sha256(raw).hexdigest() != spec.sha256:
            raise Rejected("digest", "the tensor's bytes are not what was written", where=name)
        flat = torch.frombuffer(raw, dtype=DTYPES[spec.dtype]) if raw else torch.empty(0, dtype=DTYPES[spec.dtype])
        payload[name] = flat.reshape(spec.shape)
    check(payload)
    return payload


def check(payload: Payload) -> None:
    """Whether the tensors form a payload with finite values; raises `Rejected` (schema, shape, nonfinite)."""
    for name, tensor in payload.items():
        if not name.startswith("dense/") and name not in TABLE:
            raise Rejected("schema", "neither `dense/<parameter>` nor a column of the table", where=name)
        if tensor.is_floating_point() and not _finite(tensor):
            raise Rejected("nonfinite", "values that are not finite", where=name)
    present = [name for name in TABLE if name in payload]
    if not present:
        return
    if len(present) < len(TABLE):
        raise Rejected("schema", f"a table needs {', '.join(TABLE)}; here are {', '.join(present)}")
    rows, keys, until, field, weight = (payload[name] for name in TABLE)
    kinds_right = rows.dtype == keys.dtype == until.dtype == torch.int64 and field.dtype == torch.uint8
    if not (kinds_right and weight.dtype == torch.bfloat16):
        kinds = ", ".join(f"{name} {payload[name].dtype}" for name in TABLE)
        raise Rejected("schema", f"columns of other kinds than a table has: {kinds}", where="table")
    columns = (keys.shape, until.shape, field.shape, weight.shape[:-1])
    if rows.dim() != 1 or any(shape != rows.shape for shape in columns):
        raise Rejected("shape", f"columns {[tuple(payload[name].shape) for name in TABLE]}", where="table")
    if len(rows) and (int(rows.min()) < 0 or len(torch.unique(rows)) != len(rows)):
        raise Rejected("shape", "rows that are negative or named twice", where="table/rows")


def require_same_form(specs: Mapping[str, TensorSpec], parent: Mapping[str, TensorSpec]) -> None:
    """A delta has its parent's dense tensors and its table's width; raises `Rejected` ("shape") if not."""
    mine, theirs = _form(specs), _form(parent)
    if mine != theirs:
        odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        raise Rejected("shape", f"not of its parent's form: {', '.join(odd[:5])}")


def split(data: bytes, chunk_bytes: int) -> list[bytes]:
    """`data` in pieces of `chunk_bytes`, the last one shorter."""
    return [data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes)]


def _finite(tensor: Tensor) -> bool:
    """By its least and greatest value, which carry a NaN on: a thirtieth of what asking each value costs in bf16."""
    return not tensor.numel() or all(math.isfinite(x) for x in map(float, torch.aminmax(tensor)))


def _form(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape by name, where the number of table rows counts for nothing."""
    return {name: (s.dtype, s.shape[1:] if name in TABLE else s.shape) for name, s in specs.items()}


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, uncopied (numpy knows no bfloat16, so as u8)."""
    if not math.prod(tensor.shape):
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data
