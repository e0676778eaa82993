"""Prequential figures: every prediction is judged before it is learned from.

Per ranking task (action kind): normalized entropy, AUC, calibration and base rate. Per event kind, and for "any":
HR@10 and NDCG@10 of the true item among all live items. Each over the last `window_targets`, and faded with a half-life
of `fade_targets`. NE divides by the entropy of the same targets' own base rate, so a constant guess of it gives 1.0;
where a window has one class only, NE and AUC do not exist (None).

The whole state is one flat array per ring and goes into the checkpoint, so a restart does not dent the curves.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgr.telemetry import gauge

CUT = 10
ETA = 1e-7  # probabilities are clipped to [ETA, 1 - ETA] in log losses
ANY = "any"

NE = gauge("prequential_normalized_entropy", "Log loss over the entropy of the window's base rate.", ("task",))
FADED_NE = gauge("prequential_faded_normalized_entropy", "The same, faded instead of windowed.", ("task",))
AUC = gauge("prequential_auc_ratio", "Area under the ROC curve of the window.", ("task",))
CALIBRATION = gauge("prequential_calibration_ratio", "Mean prediction over mean label of the window.", ("task",))
BASE_RATE = gauge("prequential_base_rate_ratio", "Mean label of the window.", ("task",))
HIT_RATE = gauge("prequential_hit_rate_at_10_ratio", "True item among the ten best of all live items.", ("kind",))
NDCG = gauge("prequential_ndcg_at_10_ratio", "NDCG@10 of the true item among all live items.", ("kind",))

Floats = NDArray[np.float64]


class Ring:
    """The last `size` rows of `width` numbers, oldest first in `rows()`."""

    def __init__(self, size: int, width: int) -> None:
        self._rows: Floats = np.zeros((size, width))
        self._seen = 0

    def extend(self, rows: Floats) -> None:
        size = len(self._rows)
        kept = rows[-size:]
        at = (self._seen + len(rows) - len(kept) + np.arange(len(kept))) % size
        self._rows[at] = kept
        self._seen += len(rows)

    def rows(self) -> Floats:
        size = len(self._rows)
        if self._seen < size:
            return self._rows[: self._seen]
        return np.roll(self._rows, -(self._seen % size), axis=0)

    def state(self) -> Tensor:
        return torch.from_numpy(self.rows().copy())

    def load_state(self, state: Tensor) -> None:
        self._seen = 0
        self.extend(state.numpy())


class Faded:
    """Exponentially faded sums of rows of `width` numbers, with their faded count."""

    def __init__(self, half_life: float, width: int) -> None:
        self._keep = 0.5 ** (1 / half_life)
        self.sums: Floats = np.zeros(width + 1)  # the count last

    def extend(self, rows: Floats) -> None:
        weights = self._keep ** np.arange(len(rows) - 1, -1, -1.0)
        self.sums = self.sums * self._keep ** len(rows) + np.append(weights @ rows, weights.sum())


class Prequential:
    """All figures of one trainer."""

    def __init__(self, actions: Sequence[str], window_targets: int, fade_targets: float) -> None:
        self.actions = list(actions)
        self._task_rings = {task: Ring(window_targets, 2) for task in actions}  # p, y
        self._task_faded = {task: Faded(fade_targets, 3) for task in actions}  # loss, p, y
        kinds = [*actions, ANY]
        self._rank_rings = {kind: Ring(window_targets, 2) for kind in kinds}  # hit, gain
        self._rank_faded = {kind: Faded(fade_targets, 2) for kind in kinds}

    def add_ranking(self, probabilities: NDArray[np.float32], labels: NDArray[np.bool_]) -> None:
        """Judge ranking targets, in learning order: f32[m, K] against bool[m, K]."""
        for k, task in enumerate(self.actions):
            p, y = probabilities[:, k].astype(np.float64), labels[:, k].astype(np.float64)
            finite = np.isfinite(p)
            p, y = p[finite], y[finite]
            self._task_rings[task].extend(np.stack([p, y], 1))
            self._task_faded[task].extend(np.stack([log_loss(p, y), p, y], 1))

    def add_retrieval(self, ranks: NDArray[np.int64], engaged: NDArray[np.bool_]) -> None:
        """Judge retrieval targets, in learning order: rank i64[m] (1 best, -1 not live), engaged bool[m, K]."""
        hit = (ranks >= 1) & (ranks <= CUT)
        gain = np.where(hit, 1 / np.log2(np.maximum(ranks, 1) + 1.0), 0.0)
        rows = np.stack([hit.astype(np.float64), gain], 1)
        for k, kind in enumerate([*self.actions, ANY]):
            chosen = rows if kind == ANY else rows[engaged[:, k]]
            self._rank_rings[kind].extend(chosen)
            self._rank_faded[kind].extend(chosen)

    def figures(self) -> dict[str, float | None]:
        """Every figure by name, such as `normalized_entropy/click`; None where it does not exist."""
        found: dict[str, float | None] = {}
        for task, ring in self._task_rings.items():
            p, y = ring.rows().T
            loss, faded_p, faded_y, count = self._task_faded[task].sums
            found |= {
                f"normalized_entropy/{task}": normalized_entropy(float(log_loss(p, y).sum()), float(y.sum()), len(y)),
                f"auc/{task}": auc(p, y),
                f"calibration/{task}": float(p.sum() / y.sum()) if y.any() else None,
                f"base_rate/{task}": float(y.mean()) if len(y) else None,
                f"faded_normalized_entropy/{task}": normalized_entropy(loss, faded_y, count),
                f"faded_calibration/{task}": float(faded_p / faded_y) if faded_y > 0 else None,
            }
        for kind, ring in self._rank_rings.items():
            rows, (hit, gain, count) = ring.rows(), self._rank_faded[kind].sums
            found |= {
                f"hit_rate_at_10/{kind}": float(rows[:, 0].mean()) if len(rows) else None,
                f"ndcg_at_10/{kind}": float(rows[:, 1].mean()) if len(rows) else None,
                f"faded_hit_rate_at_10/{kind}": float(hit / count) if count else None,
                f"faded_ndcg_at_10/{kind}": float(gain / count) if count else None,
            }
        return found

    def recent_entropy(self, targets: int, least: int) -> dict[str, float]:
        """NE by task over the newest `targets` ranking targets; a task without so many, or with fewer than `least` of
        either class among them, is not there."""
        found = {}
        for task, ring in self._task_rings.items():
            p, y = ring.rows()[-targets:].T
            if len(y) < targets or not least <= y.sum() <= targets - least:
                continue
            if (entropy := normalized_entropy(float(log_loss(p, y).sum()), float(y.sum()), targets)) is not None:
                found[task] = entropy
        return found

    def export(self) -> dict[str, float | None]:
        """Set the gauges (NaN: does not exist) and return the figures."""
        figures = self.figures()

        def value(name: str) -> float:
            figure = figures[name]
            return float("nan") if figure is None else figure

        for task in self.actions:
            NE.labels(task).set(value(f"normalized_entropy/{task}"))
            FADED_NE.labels(task).set(value(f"faded_normalized_entropy/{task}"))
            AUC.labels(task).set(value(f"auc/{task}"))
            CALIBRATION.labels(task).set(value(f"calibration/{task}"))
            BASE_RATE.labels(task).set(value(f"base_rate/{task}"))
        for kind in [*self.actions, ANY]:
            HIT_RATE.labels(kind).set(value(f"hit_rate_at_10/{kind}"))
            NDCG.labels(kind).set(value(f"ndcg_at_10/{kind}"))
        return figures

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        state = {f"task/{task}/window": ring.state() for task, ring in self._task_rings.items()}
        state |= {f"task/{task}/faded": torch.from_numpy(f.sums.copy()) for task, f in self._task_faded.items()}
        state |= {f"rank/{kind}/window": ring.state() for kind, ring in self._rank_rings.items()}
        state |= {f"rank/{kind}/faded": torch.from_numpy(f.sums.copy()) for kind, f in self._rank_faded.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; a smaller window keeps the newest."""
        for group, rings, faded in (
            ("task", self._task_rings, self._task_faded),
            ("rank", self._rank_rings, self._rank_faded),
        ):
            for name, ring in rings.items():
                ring.load_state(state[f"{group}/{name}/window"])
                faded[name].sums = state[f"{group}/{name}/faded"].numpy().copy()


def log_loss(p: Floats, y: Floats) -> Floats:
    """Natural log loss per target."""
    p = np.clip(p, ETA, 1 - ETA)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def normalized_entropy(loss_sum: float, positives: float, count: float) -> float | None:
    """Σ log loss over the entropy of the same targets' base rate; None where that entropy is zero."""
    rate = positives / count if count else 0.0
    if not 0 < rate < 1:
        return None
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    return float(loss_sum / count / entropy)


def auc(p: Floats, y: Floats) -> float | None:
    """The chance that a positive scores above a negative, ties a half; None with one class only."""
    positives = int(y.sum())
    negatives = len(y) - positives
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(counts) - (counts - 1) / 2
    return float((mid_rank[inverse][y > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))
