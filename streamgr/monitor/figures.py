"""Figures from readings: what the roles' metrics say, as the groups of the snapshot.

Pure functions of `Readings`. What nobody has said is null, and each group carries the time of the oldest reading
behind it, since a figure without its age is only half of one.
"""

import math
from collections.abc import Mapping
from typing import Any

from streamgr.monitor.readings import AWAY_SECONDS, HOPS, Readings
from streamgr.monitor.sums import Sums
from streamgr.scrape import Buckets, quantile

Json = dict[str, Any]


def freshness(readings: Readings, target: float, now_ms: int) -> Json:
    """The oldest horizon that is served, and the age at each answer lately, against the target."""
    horizons = [
        (source.last_ms, at)
        for source, metrics in readings.each("model_horizon_timestamp_seconds")
        if (at := metrics.total("model_horizon_timestamp_seconds", role="scorer"))
    ]
    answers = readings.lately("score_model_age_seconds")
    age = max((max(0.0, read_ms / 1000 - at) for read_ms, at in horizons), default=None)
    as_of = min((read_ms for read_ms, _ in horizons), default=None)
    known = age is not None and as_of is not None and now_ms - as_of < AWAY_SECONDS * 1000
    return {
        "target_seconds": target,
        "age_seconds": rounded(age, 3),
        "status": ("fresh" if age is not None and age <= target else "stale") if known else "unknown",
        "answered": _quantiles(answers),
        "share_within_target": rounded(_share(answers, target), 5),
        "as_of_ms": as_of,
    }


def hops(readings: Readings) -> list[Json]:
    """The four hops of an event, lately."""
    return [
        {
            "name": name,
            "label": label,
            "as_of_ms": readings.as_of(f"{name}_count"),
            **_quantiles(readings.lately(name)),
        }
        for name, label in HOPS.items()
    ]


def lag(readings: Readings) -> list[Json]:
    """Who is how far behind on which topic."""
    rows = []
    for source, metrics in readings.each("consumer_lag_records"):
        positions = metrics.by("consumer_position_timestamp_seconds", "topic")
        for topic, records in sorted(metrics.by("consumer_lag_records", "topic").items()):
            at = positions.get(topic)
            rows.append(
                {
                    "source": source.name,
                    "topic": topic,
                    "records": round(records),
                    "seconds": round(max(0.0, source.last_ms / 1000 - at), 1) if at and records else 0.0,
                    "as_of_ms": source.last_ms,
                }
            )
    return rows


def traffic(readings: Readings) -> Json:
    """Rates, lately."""
    return {
        "events_per_second": rounded(readings.per_second("events_total"), 1),
        "targets_per_second": rounded(readings.per_second("train_targets_total"), 1),
        "answers": _quantiles(readings.lately("score_duration_seconds")),
        "as_of_ms": readings.as_of("events_total"),
    }


def learning(readings: Readings) -> Json:
    """The trainer's own test-then-train figures, by task."""
    names = ("normalized_entropy", "auc_ratio", "calibration_ratio", "base_rate_ratio")
    figures = {name: readings.by(f"prequential_{name}", "task") for name in names}
    tasks = {
        task: {name.removesuffix("_ratio"): rounded(figures[name].get(task), 5) for name in names}
        for task in sorted({task for values in figures.values() for task in values})
    }
    return {
        "tasks": tasks,
        "as_of_ms": readings.as_of("prequential_normalized_entropy"),
    }


def vocabulary(readings: Readings) -> Json:
    """The ID table: its slots, and what came and went."""
    return {
        "slots": _whole(readings.total("table_slots")),
        "used": _whole(readings.total("table_used_slots")),
        "admissions": _whole(readings.total("table_admissions_total")),
        "evictions": {k: round(v) for k, v in sorted(readings.by("table_evictions_total", "reason").items())},
        "admissions_per_second": rounded(readings.per_second("table_admissions_total"), 2),
        "evictions_per_second": rounded(readings.per_second("table_evictions_total"), 2),
        "as_of_ms": readings.as_of("table_slots"),
    }


def served(readings: Readings) -> Json:
    """What the scorers serve, the least of them first; and what was refused or held back."""
    versions = {
        source.name: (source.last_ms, round(version))
        for source, metrics in readings.each("weights_version")
        if (version := metrics.total("weights_version", role="scorer")) is not None
    }
    return {
        "served": min((version for _, version in versions.values()), default=None),
        "served_by": {name: version for name, (_, version) in versions.items()},
        "rejected": _some(readings.by("weights_rejected_total", "reason")),
        "withheld": _some(readings.by("weights_withheld_total", "reason")),
        "as_of_ms": min((read_ms for read_ms, _ in versions.values()), default=None),
    }


def judged(sums: Sums) -> Json:
    """What served scores were worth."""
    return {
        "targets": sums.targets,
        "normalized_entropy": rounded(sums.normalized_entropy, 4),
        "calibration": rounded(sums.calibration, 4),
        "auc": rounded(sums.auc, 4),
        "ctr": rounded(sums.rate, 4),
    }


def _quantiles(buckets: Buckets) -> Json:
    n = max(buckets.values(), default=0.0)
    return {"n": round(n), "p50": rounded(quantile(buckets, 0.5), 4), "p99": rounded(quantile(buckets, 0.99), 4)}


def _share(buckets: Buckets, edge: float) -> float | None:
    """The share of observations at or below an edge (the largest one that is not above it)."""
    n = max(buckets.values(), default=0.0)
    return max((count for le, count in buckets.items() if le <= edge), default=0.0) / n if n else None


def rank(ordered: list[float], q: float) -> float | None:
    """The nearest-rank quantile."""
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)] if ordered else None


def _some(counts: Mapping[str, float]) -> dict[str, int]:
    return {key: round(value) for key, value in sorted(counts.items()) if value}


def rounded(value: float | None, digits: int) -> float | None:
    """None also where it is no finite number."""
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
