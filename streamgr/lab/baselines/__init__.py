"""Baselines that the model must beat: each sees the targets of the prequential log, in its order, test-then-train.

A baseline answers a target before it is told what came of it, and learns a target only when its label has closed, the
same moment the trainer does. Ranks are among all items learned so far; -1 where the item is not one of them; ties
count against. `Catalogue` holds one number an item.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streamgr.lab.metrics import pessimistic_rank


@dataclass(frozen=True, slots=True)
class Target:
    """One closed target. `shown`: an impression (else an organic action); `labels`: the kinds that came of it."""

    user: str
    item: str
    time_ms: int
    shown: bool
    labels: frozenset[str]


class Baseline(Protocol):
    """Predicts, then learns."""

    def probabilities(self, target: Target) -> dict[str, float] | None:
        """Per action kind the probability that it follows the impression; None where the model has no notion of it."""

    def rank(self, target: Target) -> int:
        """The place of the target's item among all known items, 1 = best, -1 = unknown."""

    def learn(self, target: Target) -> None:
        """What came of the target is known now."""


class Catalogue:
    """Items and a column f64 of their scores; grows by doubling."""

    def __init__(self, initial: float) -> None:
        """`initial`: the score of an item that has just become known."""
        self._initial = initial
        self._index: dict[str, int] = {}
        self._scores: NDArray[np.float64] = np.full(256, initial)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, item: str) -> bool:
        return item in self._index

    def get(self, item: str) -> float:
        """The item's score, the initial one if it is unknown."""
        k = self._index.get(item)
        return self._initial if k is None else float(self._scores[k])

    def put(self, item: str, score: float) -> None:
        k = self._index.setdefault(item, len(self._index))
        if k == len(self._scores):
            self._scores = np.concatenate([self._scores, np.full(k, self._initial)])
        self._scores[k] = score

    def rank(self, item: str) -> int:
        """1 + how many other items score at least as high; -1 if the item is unknown."""
        k = self._index.get(item)
        if k is None:
            return -1
        return pessimistic_rank(self._scores[: len(self._index)], k)
