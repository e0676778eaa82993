"""Judging: every model on the same targets, in the same order, each asked before it is told (test-then-train).

The prequential log is the model's own testimony, written before each target was learned. Baselines are asked about all
targets that one record closed before they learn any of them. Two questions:

    ranking    of each impression: how likely is each action kind? Normalized entropy, AUC, calibration per kind
    retrieval  of each positively engaged target: where does its item stand among all known items? HR@10, NDCG@10 per
               kind of event; an impression counts where an action followed it
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamgr.lab import metrics
from streamgr.lab.baselines import Baseline, Target
from streamgr.lab.compare import Row, closed_together

Json = dict[str, Any]
MODEL = "hstu"
CUT = 10


@dataclass(slots=True)
class Columns:
    """What one model answered, target by target."""

    p: dict[str, list[float]] = field(default_factory=dict)  # action kind → of each impression
    ranks: dict[str, list[int]] = field(default_factory=dict)  # event kind → of each retrieval target


@dataclass(slots=True)
class Verdict:
    """Labels by action kind (of each impression), answers by model, and how many targets there were by event kind."""

    actions: list[str]
    labels: dict[str, list[bool]]
    answers: dict[str, Columns]
    targets: dict[str, int] = field(default_factory=dict)

    def report(self) -> Json:
        """{"targets": {kind: n}, "ranking": {task: …}, "retrieval": {kind: …}}; what is undefined is null."""
        ranking: Json = {}
        for kind in self.actions:
            labels = self.labels[kind]
            if not any(labels):
                continue
            ranking[kind] = {"targets": len(labels), "base_rate": metrics.base_rate(labels), "models": {}}
            for model, columns in self.answers.items():
                if (p := columns.p.get(kind)) is not None:
                    ranking[kind]["models"][model] = {
                        "normalized_entropy": metrics.normalized_entropy(labels, p),
                        "auc": metrics.auc(labels, p),
                        "calibration": metrics.calibration(labels, p),
                    }
        retrieval: Json = {}
        for kind, ranks in self._ranks().items():
            retrieval[kind] = {"targets": len(next(iter(ranks.values()))), "models": {}}
            for model, column in ranks.items():
                retrieval[kind]["models"][model] = {
                    "hit_rate_at_10": metrics.hit_rate(column, CUT),
                    "ndcg_at_10": metrics.ndcg(column, CUT),
                    "unknown_item": sum(rank < 1 for rank in column) / len(column),
                }
        return {"targets": dict(self.targets), "ranking": ranking, "retrieval": retrieval}

    def _ranks(self) -> dict[str, dict[str, list[int]]]:
        """Event kind (and "any", all of them) → model → ranks."""
        kinds = sorted({kind for columns in self.answers.values() for kind in columns.ranks})
        ranks = {kind: {model: columns.ranks[kind] for model, columns in self.answers.items()} for kind in kinds}
        if len(kinds) > 1:
            models = self.answers
            ranks["any"] = {model: [rank for kind in kinds for rank in ranks[kind][model]] for model in models}
        return ranks


def judge(rows: Iterable[Row], actions: list[str], baselines: Mapping[str, Baseline], *, model: str = MODEL) -> Verdict:
    """Ask everybody about every row of the log, in its order. `model` is the name the log's own answers go under."""
    verdict = Verdict(actions, {k: [] for k in actions}, {m: Columns() for m in (model, *baselines)})
    for group in closed_together(rows):
        targets = [Target(r.user, r.item, r.time, r.p is not None, frozenset(r.labels)) for r in group]
        for row, target in zip(group, targets, strict=True):
            verdict.targets[row.kind] = verdict.targets.get(row.kind, 0) + 1
            answers = {model: (row.p, row.rank)} | {
                name: (baseline.probabilities(target), None if row.rank is None else baseline.rank(target))
                for name, baseline in baselines.items()
            }
            if target.shown:
                for kind in actions:
                    verdict.labels[kind].append(kind in target.labels)
            for name, (p, rank) in answers.items():
                columns = verdict.answers[name]
                if target.shown and p is not None:
                    for kind in actions:
                        columns.p.setdefault(kind, []).append(p[kind])
                if rank is not None:
                    columns.ranks.setdefault(row.kind, []).append(rank)
        for target in targets:
            for baseline in baselines.values():
                baseline.learn(target)
    return verdict
