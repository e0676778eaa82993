"""The guard before publishing: what scorers must not get stays here, and the operator hears why.

    nonfinite       a value that is not finite
    dense, row      the norm of the network's weights, or of one row of the table, is beyond its limit
    gradient        so was the gradient of a step since the last candidate
    entropy         a task's prequential NE over the newest targets rose above the median of the last versions'

A version that fails is withheld: scorers keep what they have, training goes on, and the next candidate is cut against
the last version that was published, so it lacks nothing. What follows when one after another is withheld:

Weights that are broken do not mend, since a loss that is not finite teaches nothing, and a trainer that ended would
walk the same steps to the same weights. So it goes on, not ready, and keeps no checkpoint of them: started again with
other settings, such as a lower learning rate, it learns the steps since the last good one anew.

A rise of NE says that something has changed, the model or the world. At first the model is suspected. After
`max_withheld` versions in a row it is the world: what scorers hold grows older all the while, and nobody has asked what
NE that would have today. The comparison then starts again, and the next version goes out.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from streamgr import config
from streamgr.telemetry import Log, counter

Reason = Literal["nonfinite", "dense", "row", "gradient", "entropy"]
WITHHELD = counter("weights_withheld", "Versions that were cut and not published.", ("reason",))
LET_GO = counter("weights_comparisons_restarted", "Times that NE stayed so high that it became the measure.")
for _reason in ("nonfinite", "dense", "row", "gradient", "entropy"):
    WITHHELD.labels(_reason)

CLASS_TARGETS = 20  # of each class: with fewer, NE is mostly chance
BROKEN = (
    "scorers keep the last version, and no checkpoint is taken; start again with lower learning rates: what was "
    "learned since the last checkpoint is then learned anew"
)
LIMIT = "; or raise weights.{key}, if these weights are as they should be"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a version is withheld."""

    reason: Reason
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is judged. dense: the network's weights; rows i64[k] and weight f32 or bf16[k, D] of the table.

    gradient_norm: the greatest since the last candidate; entropy: by task, see `Prequential.recent_entropy`.
    """

    dense: Mapping[str, Tensor]
    rows: Tensor
    weight: Tensor
    gradient_norm: float = 0.0
    entropy: Mapping[str, float] = field(default_factory=dict)


class Guard:
    """Judges candidates in order; `inspect` alone may be asked from another thread."""

    def __init__(self, settings: config.Weights, log: Log) -> None:
        self._settings, self._log = settings, log
        self._published: deque[Mapping[str, float]] = deque(maxlen=settings.compared_versions)
        self._rises = 0  # versions in a row withheld for their entropy

    def judge(self, candidate: Candidate) -> Verdict | None:
        """Why this version must not be published; None: it may."""
        verdict = self.inspect(candidate) or self._gradient(candidate) or self._entropy(candidate)
        self._rises = self._rises + 1 if verdict is not None and verdict.reason == "entropy" else 0
        if verdict is not None and self._rises > self._settings.max_withheld:
            LET_GO.inc()
            self._log.warning("weights_comparison_restarted", f"{verdict.what}, for {self._rises} versions: let go")
            self._published.clear()
            self._rises, verdict = 0, None
        if verdict is not None:
            WITHHELD.labels(verdict.reason).inc()
        return verdict

    def published(self, candidate: Candidate) -> None:
        """It is out: what the next ones are compared with."""
        self._published.append(candidate.entropy)

    def inspect(self, candidate: Candidate) -> Verdict | None:
        """Judge the weights alone."""
        norms = {name: torch.linalg.vector_norm(tensor) for name, tensor in candidate.dense.items()}
        dense = torch.stack(list(norms.values())).norm() if norms else torch.zeros(())
        rows = torch.linalg.vector_norm(candidate.weight, dim=1, dtype=torch.float32)
        largest = rows.max() if len(rows) else torch.zeros(())  # NaN where any is
        for name, norm in norms.items():
            if not bool(torch.isfinite(norm)):
                return Verdict("nonfinite", f"{name} holds values that are not finite", BROKEN)
        if not bool(torch.isfinite(largest)):
            bad = candidate.rows[~torch.isfinite(rows)]
            what = f"{len(bad)} rows of the table, first of them {int(bad[0])}, hold values that are not finite"
            return Verdict("nonfinite", what, BROKEN)
        if float(dense) > (limit := self._settings.max_dense_norm):
            what = f"the network's weights have a norm of {float(dense):.4g}, at most {limit:g} is published"
            return Verdict("dense", what, BROKEN + LIMIT.format(key="max_dense_norm"))
        if float(largest) > (limit := self._settings.max_row_norm):
            row = int(candidate.rows[int(rows.argmax())])
            what = f"row {row} of the table has a norm of {float(largest):.4g}, at most {limit:g} is published"
            return Verdict("row", what, BROKEN + LIMIT.format(key="max_row_norm"))
        return None

    def _gradient(self, candidate: Candidate) -> Verdict | None:
        limit = self._settings.max_gradient_norm
        if candidate.gradient_norm <= limit:
            return None
        return Verdict(
            "gradient",
            f"a gradient had a norm of {candidate.gradient_norm:.4g}, at most {limit:g} is published",
            "none while it passes: the next version is judged anew; if it repeats, lower the learning rates, or raise "
            "weights.max_gradient_norm",
        )

    def _entropy(self, candidate: Candidate) -> Verdict | None:
        if len(self._published) < self._settings.compared_versions:
            return None
        for task, entropy in candidate.entropy.items():
            before = [version[task] for version in self._published if task in version]
            if not before:
                continue
            limit = median(before) * (1 + self._settings.max_entropy_rise)
            if entropy > limit:
                return Verdict(
                    "entropy",
                    f"normalized entropy of {task} rose to {entropy:.4f}, the last versions' allows {limit:.4f}",
                    f"look at what came in; after {self._settings.max_withheld} versions in a row it is published all "
                    "the same; weights.max_entropy_rise sets the limit",
                )
        return None
