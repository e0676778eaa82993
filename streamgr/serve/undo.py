"""The undo ring: what each of the last versions overwrote, so that a bad one is taken back at once, without a log.

Bounded by count and by bytes; what falls out of it can still be had from the log (`weights.subscriber`).
"""

from collections import deque
from dataclasses import dataclass

import torch

from streamgr.model.hashing import U64
from streamgr.weights.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Undo:
    """What a version has overwritten: rows as `IdTable.rows` gives them, their digest hashes u64[n] (0: held nothing),
    and the dense tensors by name.
    """

    rows: dict[str, torch.Tensor]
    hashes: U64
    dense: dict[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        tensors = [*self.rows.values(), *self.dense.values()]
        return self.hashes.nbytes + sum(tensor.nbytes for tensor in tensors)


class UndoRing:
    """The way back, newest version last. One owner."""

    def __init__(self, versions: int, max_bytes: int) -> None:
        self._limits = versions, max_bytes
        self._steps: deque[tuple[Manifest, Undo]] = deque()  # to this version, by undoing that

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(undo.bytes for _, undo in self._steps)

    def push(self, before: Manifest, undo: Undo) -> None:
        """`undo` leads back to the version `before`."""
        self._steps.append((before, undo))
        while self._steps and (len(self._steps) > self._limits[0] or self.bytes > self._limits[1]):
            self._steps.popleft()

    def way_to(self, manifest: Manifest) -> list[Undo]:
        """What to undo, in this order, to serve this version again; empty where that cannot be done."""
        way: list[Undo] = []
        for before, undo in reversed(self._steps):
            way.append(undo)
            if before.order == manifest.order:
                return way
        return []

    def forget(self, count: int) -> None:
        """The newest `count` have been undone."""
        for _ in range(count):
            self._steps.pop()

    def clear(self) -> None:
        """There is no way back any more."""
        self._steps.clear()
