"""One copy of network and table: it takes versions, proves that it is what the trainer has, and can be put back.

A version is judged where it will be served from, after it was written and before anybody reads it:

- The state digest. The copy keeps a sum over the bytes that its own table now holds; it must be the manifest's.
- The probe. The copy answers the trainer's question with its own vectors, as it would answer a user.

Whatever is overwritten is kept (`Undo`), so a version that fails leaves no trace, and one that was served can be taken
back. A manifest without a digest or a probe is refused like one with a wrong one: nobody may publish unproven state.
"""

from collections.abc import Mapping

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from streamgr.config import Model, Table
from streamgr.errors import DataError
from streamgr.model import probe
from streamgr.model.hashing import U64
from streamgr.model.recommender import Recommender
from streamgr.model.table import BLOCK, IdTable
from streamgr.serve.undo import Undo
from streamgr.weights.digest import StateDigest, row_hashes
from streamgr.weights.manifest import Manifest, Rejected
from streamgr.weights.payload import Payload


class Architecture(msgspec.Struct, frozen=True):
    """`Manifest.model`: what the weights belong to; `table` is as large as the trainer's has grown. window_ms: the
    attribution window, which summed tokens depend on."""

    model: Model
    table: Table
    actions: tuple[str, ...]
    window_ms: int


class Copy:
    """Written only while nobody reads it; `readers` belongs to `LiveWeights`.

    inverse_norms f32[R] follows the table's rows, for retrieval.
    """

    def __init__(self, architecture: Architecture) -> None:
        a = architecture
        self.recommender = Recommender(a.model, a.actions, 0, a.window_ms).eval().requires_grad_(False)
        self.table = IdTable(architecture.table, architecture.model.dim, seed=0)
        self.inverse_norms = torch.zeros(len(self.table.weight))
        self.digest = StateDigest(len(self.table.weight))
        self.readers = 0
        self._dense = {f"dense/{name}": tensor for name, tensor in self.recommender.state_dict().items()}

    def vectors(self, keys: U64, watermark_ms: int) -> tuple[torch.Tensor, NDArray[np.bool_]]:
        """f32[n, D] for keys u64[n], and which of them have no slot and are answered by the shared rows."""
        lookup = self.table.lookup(keys, watermark_ms=watermark_ms)
        return self.table.vectors(lookup), lookup.rows_a < self.table.first_slot

    def check(self, payload: Payload, *, whole: bool) -> None:
        """Raises `Rejected` unless the payload's tensors are this copy's; `whole`: all there is, so every one."""
        theirs = {name: tensor for name, tensor in payload.items() if name.startswith("dense/")}
        odd = self._dense.keys() ^ theirs.keys() if whole else theirs.keys() - self._dense.keys()
        odd |= {name for name in self._dense.keys() & theirs.keys() if self._dense[name].shape != theirs[name].shape}
        if odd:
            raise Rejected("shape", f"not this model's tensors: {', '.join(sorted(odd)[:5])}")
        if "table/rows" not in payload:
            raise Rejected("schema", "without a table")
        rows, weight, table = payload["table/rows"], payload["table/weight"], self.table
        first, last = (int(rows.min()), int(rows.max())) if len(rows) else (1, 1)
        if first < 1 or last >= len(table.weight) or weight.shape[1:] != (table.dim,):
            held = f"rows 1..{len(table.weight) - 1} of {table.dim} numbers"
            raise Rejected("shape", f"not this table's rows: it has {held}", where="table/rows")
        if whole and int((rows < table.first_slot).sum()) != table.first_slot - 1:
            raise Rejected("schema", "without all the shared rows", where="table/rows")

    def before(self, payload: Payload) -> Undo:
        """What taking a checked payload would overwrite."""
        rows = payload["table/rows"].numpy()
        dense = {name: tensor.clone() for name, tensor in self._dense.items() if name in payload}
        return Undo(self.table.rows(rows), self.digest.hashes[rows], dense)

    def take(self, payload: Payload) -> None:
        """Hold what a checked payload says. Raises `Rejected`, before any change, for keys that cannot be where it has
        them.
        """
        with torch.inference_mode():
            part = {name.removeprefix("table/"): t for name, t in payload.items() if name.startswith("table/")}
            try:
                self._write(part, payload)
            except DataError as error:
                raise Rejected("shape", error.what, where=error.where) from None

    def put_back(self, undo: Undo) -> None:
        """Hold again what was there before a payload; of several, undo the newest first."""
        with torch.inference_mode():
            self._write(undo.rows, undo.dense, nothing=undo.hashes == 0)

    def undo_to(self, other: "Copy") -> Undo:
        """What makes `other`, of the same architecture, hold what this copy does: the rows whose hashes differ."""
        rows = np.flatnonzero(self.digest.hashes != other.digest.hashes)
        dense = {name: tensor.clone() for name, tensor in self._dense.items()}
        return Undo(self.table.rows(rows), self.digest.hashes[rows], dense)

    def require(self, manifest: Manifest) -> None:
        """Raises `Rejected` ("digest", "probe") unless this copy is what the trainer had when it wrote the manifest."""
        if self.digest.text != manifest.state_digest:
            said = manifest.state_digest or "nothing"
            raise Rejected(
                "digest", f"the state is {self.digest.text}, the manifest says {said}", where=manifest.name()
            )
        asked, expected = manifest.probe.keys, manifest.probe.logits
        shape = (probe.CANDIDATES, len(self.recommender.actions))
        sound = len(asked) == probe.KEYS and all(0 <= key < 1 << 64 for key in asked)
        if not sound or [len(row) for row in expected] != [shape[1]] * shape[0]:
            raise Rejected("probe", f"it asks {len(asked)} ids, expects {len(expected)} answers", where=manifest.name())
        keys = np.array(asked, np.uint64)
        answered = probe.ask(self.recommender, self.vectors(keys, manifest.watermark_ms)[0]).numpy()
        if not np.allclose(answered, expected, rtol=probe.TOLERANCE, atol=probe.TOLERANCE):
            off = float(np.abs(answered - np.array(expected)).max())
            raise Rejected("probe", f"we answer otherwise, by up to {off:.3g} of a logit", where=manifest.name())

    def _write(
        self, part: Mapping[str, torch.Tensor], dense: Payload, nothing: NDArray[np.bool_] | None = None
    ) -> None:
        """Rows as `IdTable.rows` gives them (`nothing`: those that hold nothing, to the digest), and dense tensors."""
        self.table.put_rows(part)
        rows, weight = part["rows"], part["weight"]
        for at in range(0, len(rows), BLOCK):
            norms = torch.linalg.vector_norm(weight[at : at + BLOCK].float(), dim=1)
            self.inverse_norms[rows[at : at + BLOCK]] = 1.0 / norms.clamp_min(1e-12)
        hashes = row_hashes(self.table.rows(rows.numpy()))
        if nothing is not None:
            hashes[nothing] = 0
        self.digest.replace(rows.numpy(), hashes)
        for name in dense.keys() & self._dense.keys():
            self._dense[name].copy_(dense[name])
