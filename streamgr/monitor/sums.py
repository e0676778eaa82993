"""What predictions were worth, as sums: two windows, two partitions or two runs of the monitor simply add up.

Normalized entropy, calibration and the action rate come out exactly. The area under the ROC curve is read from
counts by bins of the logit, an eighth wide, where scores of one bin count as ties: it is off by at most half the share
of (positive, negative) pairs that fall into one bin, and a windowed table need not hold every prediction for it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

EPSILON = 1e-7  # a probability of exactly 0 or 1 would cost infinitely much once it is wrong
BINS_A_UNIT, LAST_BIN = 8, 128  # bins of 1/8 of logit, from -16 to 16

Bins = dict[int, tuple[int, int]]  # bin -> how many (negatives, positives)


@dataclass(frozen=True, slots=True)
class Sums:
    """Over judged targets of one action kind. `loss`: of -(y ln p + (1-y) ln(1-p)), nats; `predicted`: of p."""

    targets: int = 0
    positives: int = 0
    predicted: float = 0.0
    loss: float = 0.0
    bins: Bins = field(default_factory=dict)

    @classmethod
    def of(cls, p: float, label: bool) -> "Sums":
        """One target: what was predicted, and what happened."""
        q = min(max(p, EPSILON), 1 - EPSILON)
        place = max(-LAST_BIN, min(LAST_BIN, math.floor(math.log(q / (1 - q)) * BINS_A_UNIT)))
        return cls(1, int(label), p, -math.log(q if label else 1 - q), {place: (int(not label), int(label))})

    def __add__(self, other: "Sums") -> "Sums":
        bins = dict(self.bins)
        for place, (negatives, positives) in other.bins.items():
            n, p = bins.get(place, (0, 0))
            bins[place] = n + negatives, p + positives
        return Sums(
            self.targets + other.targets,
            self.positives + other.positives,
            self.predicted + other.predicted,
            self.loss + other.loss,
            bins,
        )

    @property
    def rate(self) -> float | None:
        """Positives a target: of clicks, the click-through rate."""
        return self.positives / self.targets if self.targets else None

    @property
    def normalized_entropy(self) -> float | None:
        """Log loss over the entropy of these targets' own rate; None where there is nothing to divide by."""
        if not 0 < self.positives < self.targets:
            return None
        rate = self.positives / self.targets
        return self.loss / self.targets / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))

    @property
    def calibration(self) -> float | None:
        """Predicted over seen positives: 1 is calibrated."""
        return self.predicted / self.positives if self.positives else None

    @property
    def auc(self) -> float | None:
        """The chance that a positive scores above a negative, ties half (to a bin's width)."""
        negatives = self.targets - self.positives
        if not negatives or not self.positives:
            return None
        below, won = 0, 0.0
        for place in sorted(self.bins):
            n, p = self.bins[place]
            won += p * (below + n / 2)
            below += n
        return won / (negatives * self.positives)

    def pack(self) -> list[Any]:
        """As plain JSON."""
        bins = [[place, *counts] for place, counts in sorted(self.bins.items())]
        return [self.targets, self.positives, self.predicted, self.loss, bins]

    @classmethod
    def unpack(cls, packed: list[Any]) -> "Sums":
        """The inverse of `pack`."""
        targets, positives, predicted, loss, bins = packed
        return cls(targets, positives, predicted, loss, {place: (n, p) for place, n, p in bins})


def total(parts: Iterable[Sums]) -> Sums:
    """All of them together."""
    whole = Sums()
    for part in parts:
        whole = whole + part
    return whole
