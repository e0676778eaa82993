"""The board: everything the monitor knows, folded from records and readings into one JSON snapshot.

No I/O: records, readings and the time come in as arguments, `snapshot` comes out; the same board stands behind the
role (fed by Faust or by the plain client) and behind the demo. Any thread may call, one lock keeps them apart.

Every group of figures says as of when it is (`as_of_ms`); what was never read is null. Whoever shows it can tell what
is old, and the rule is that nothing old is shown as if it were now.
"""

import math
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from streamgr.config import Config
from streamgr.decoder import REASONS, Decoder
from streamgr.events import Event, Heartbeat, Records
from streamgr.monitor.outcomes import Outcomes, Score
from streamgr.monitor.readings import AWAY_SECONDS, HOPS, Readings, Target
from streamgr.monitor.sums import Sums, total
from streamgr.monitor.timeline import Timeline
from streamgr.monitor.windows import Windows
from streamgr.scrape import Buckets, Metrics, quantile
from streamgr.telemetry import counter, gauge
from streamgr.weights.log import Entry

NE = gauge("online_normalized_entropy", "Of served scores against what users did: log loss over entropy.", ("task",))
CALIBRATION = gauge("online_calibration_ratio", "Of served scores: predicted over seen actions.", ("task",))
AUC = gauge("online_auc_ratio", "Of served scores: area under the ROC curve, to an eighth of logit.", ("task",))
CTR = gauge("online_ctr_ratio", "Actions a shown item whose score was sampled.", ("task",))
LETTERS = counter("dead_letters_seen", "Dead letters that the monitor has read.", ("reason",))
for _reason in (*REASONS, "other"):
    LETTERS.labels(_reason)  # 0 is a value too

FORMAT = 1
LETTER_STEP_MS, LETTER_KEEP_MS = 60_000, 3_600_000  # dead letters: by the minute, for an hour
GRACE_MS = 5_000  # how far apart the topics may be read
IDLE_MS = 3_000  # no event for so long: the wall clock says how far we have read
QUALITY_STEPS = 20  # windows of online quality within `monitor.online_window_seconds`
GROUP_TARGETS, GROUPS = 200, 6  # versions are shown together until they have so many targets; so many lines
POINTS, POINT_SECONDS = 150, 2.0  # of the sparklines
CANARIES = 100  # the latest, for percentiles


class Kept(NamedTuple):
    """A value that a windowed table may keep: of which table, key and window, and the whole value now."""

    table: str
    key: str
    at_ms: int
    value: Any


class _Item(msgspec.Struct, frozen=True):
    item_id: str
    probabilities: dict[str, float] = {}


class _Answer(msgspec.Struct, frozen=True):
    items: list[_Item]
    weights_version: int


class _Sample(msgspec.Struct, frozen=True):
    """A record of `<prefix>.scores`, as `serve.samples` writes it."""

    kind: str
    user_id: str
    time: int
    answer: _Answer


class Board:
    """`score`, `events`, `dead_letter`, `manifest` take records, `answered` and `silent` readings; `tick` once a second."""

    def __init__(self, config: Config, now_ms: int, *, title: str = "streamgr") -> None:
        sequence, monitor = config.sequence, config.monitor
        self._title, self._monitor, self._kinds = title, monitor, sequence.actions
        self._lock = threading.RLock()
        self._window_ms = round(monitor.window_seconds * 1000)
        self._readings = Readings(map(Target.of, monitor.scrape), self._window_ms, now_ms)
        self._timeline = Timeline()
        self._letters: Windows[int] = Windows(LETTER_STEP_MS, LETTER_KEEP_MS)
        self._online_ms = round(monitor.online_window_seconds * 1000)
        self.quality_step_ms = max(1_000, self._online_ms // QUALITY_STEPS // 1_000 * 1_000)
        self._quality: Windows[Sums] = Windows(self.quality_step_ms, self._online_ms)
        self._outcomes = Outcomes(
            sequence.actions,
            round(sequence.attribution_window_seconds * 1000),
            round(monitor.serve_seconds * 1000),
            GRACE_MS,
        )
        self._decoder = Decoder(sequence.actions, round(sequence.max_future_seconds * 1000))
        self._sample = msgspec.json.Decoder(_Sample)
        self._newest_ms = self._arrived_ms = 0  # of the events: the newest append time; when that came
        self._samples = self._unreadable = 0
        self._canary: dict[str, deque[tuple[int, float]]] = {
            hop: deque(maxlen=CANARIES) for hop in ("sequence", "weights")
        }
        self._lost: dict[str, int] = {}
        self._compared: dict[str, Mapping[str, float | None]] = {}
        self._compared_ms: int | None = None
        self._points: deque[dict[str, float | int | None]] = deque(maxlen=POINTS)

    # --- records ---

    def manifests_anew(self) -> None:
        """The manifests are about to be read from their beginning."""
        with self._lock:
            self._timeline = Timeline()

    def manifest(self, entry: Entry, now_ms: int) -> None:
        """The next entry of the manifests."""
        with self._lock:
            self._timeline.take(entry, now_ms)

    def dead_letter(self, reason: str, at_ms: int, partition: int) -> Kept:
        """A dead letter, by its header."""
        known = reason if reason in REASONS else "other"
        LETTERS.labels(known).inc()
        with self._lock:
            key = f"{known}/{partition}"
            return Kept("dead_letters", key, at_ms, self._letters.add(key, at_ms, 1))

    def score(self, value: bytes | None) -> None:
        """A record of the scores; what cannot be read is counted, what was not a ranking says nothing here."""
        try:
            sample = self._sample.decode(value or b"")
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._unreadable += 1
            return
        with self._lock:
            self._samples += 1
            p = {item.item_id: item.probabilities for item in sample.answer.items if item.probabilities}
            if p:
                self._outcomes.score(Score(sample.user_id, sample.time, sample.answer.weights_version, p))

    def events(self, records: Records, now_ms: int) -> None:
        """Records of the events; bad ones are the sequencer's to judge."""
        found = self._decoder.decode(records)
        with self._lock:
            for event, append_ms in zip(found, records.append_ms, strict=True):
                if isinstance(event, Event):
                    self._outcomes.event(event, append_ms, records.partition)
                if isinstance(event, Event | Heartbeat) and append_ms > self._newest_ms:
                    self._newest_ms, self._arrived_ms = append_ms, now_ms

    def settle(self, now_ms: int) -> list[Kept]:
        """Judge what has become of served scores by now; the windows that this changes."""
        with self._lock:
            idle = now_ms - self._arrived_ms >= IDLE_MS
            fresh: dict[tuple[str, int], Sums] = {}
            for judged in self._outcomes.settle(now_ms if idle else self._newest_ms):
                for task, p in judged.p.items():
                    where = (f"{judged.version}/{task}/{judged.partition}", judged.at_ms)
                    fresh[where] = fresh.get(where, Sums()) + Sums.of(p, task in judged.labels)
            return [
                Kept("quality", key, at_ms, self._quality.add(key, at_ms, sums).pack())
                for (key, at_ms), sums in fresh.items()
            ]

    def restore(self, table: str, key: str, start_ms: int, value: Any) -> None:
        """Take back what a windowed table has kept. Raises `ValueError`, `TypeError` on what is none of ours."""
        with self._lock:
            if table == "dead_letters":
                self._letters.put(key, start_ms, int(value))
            else:
                self._quality.put(key, start_ms, Sums.unpack(value))

    # --- readings, the canary, the comparison ---

    def answered(self, name: str, metrics: Metrics, why_not_ready: str, at_ms: int) -> None:
        with self._lock:
            self._readings.answered(name, metrics, why_not_ready, at_ms)

    def silent(self, name: str, why: str, at_ms: int) -> None:
        with self._lock:
            self._readings.silent(name, why, at_ms)

    def canary(self, hop: str, seconds: float | None, now_ms: int) -> None:
        """A canary was seen after so many seconds, or (None) was lost at a hop."""
        with self._lock:
            if seconds is None:
                self._lost[hop] = self._lost.get(hop, 0) + 1
            else:
                self._canary[hop].append((now_ms, seconds))

    def compare(self, figures: Mapping[str, Mapping[str, float | None]], now_ms: int) -> None:
        """Models judged side by side elsewhere: measure -> model -> value."""
        with self._lock:
            self._compared, self._compared_ms = {name: dict(models) for name, models in figures.items()}, now_ms

    # --- what comes out ---

    def tick(self, now_ms: int) -> None:
        """Once a second: the gauges, the sparklines, and letting go of what is old."""
        with self._lock:
            self._letters.forget(now_ms)
            self._quality.forget(now_ms)
            for task, sums in self._by_task(now_ms).items():
                for figure, value in (
                    (NE, sums.normalized_entropy),
                    (CALIBRATION, sums.calibration),
                    (AUC, sums.auc),
                    (CTR, sums.rate),
                ):
                    figure.labels(task).set(math.nan if value is None else value)
            if not self._points or now_ms - (self._points[-1]["ms"] or 0) >= POINT_SECONDS * 1000 - 50:
                self._points.append(self._point(now_ms))

    def snapshot(self, now_ms: int) -> dict[str, Any]:
        """All of it as plain JSON: times in ms since 1970, durations in seconds, unknown is null."""
        with self._lock:
            return {
                "format": FORMAT,
                "title": self._title,
                "now_ms": now_ms,
                "window_seconds": self._monitor.window_seconds,
                "away_seconds": AWAY_SECONDS,
                "freshness": self._freshness(now_ms),
                "hops": self._hops(),
                "lag": self._lag(now_ms),
                "traffic": self._traffic(),
                "quality": self._learning(),
                "vocabulary": self._vocabulary(),
                "weights": self._weights(),
                "dead_letters": self._dead_letters(now_ms),
                "online": self._online(now_ms),
                "canary": self._canaries(),
                "sources": self._readings.show(now_ms),
                "points": list(self._points),
            }

    def summary(self, now_ms: int) -> dict[str, Any]:
        """The record of `<prefix>.freshness`: the snapshot without what is only for the eye."""
        whole = self.snapshot(now_ms)
        return {key: value for key, value in whole.items() if key not in ("title", "points", "weights", "away_seconds")}

    def _freshness(self, now_ms: int) -> dict[str, Any]:
        horizons = [
            (source.last_ms, at)
            for source, metrics in self._readings.each("model_horizon_timestamp_seconds")
            if (at := metrics.total("model_horizon_timestamp_seconds", role="scorer"))
        ]
        answers = self._readings.lately("score_model_age_seconds")
        target = self._monitor.target_seconds
        age = max((max(0.0, read_ms / 1000 - at) for read_ms, at in horizons), default=None)
        as_of = min((read_ms for read_ms, _ in horizons), default=None)
        known = age is not None and as_of is not None and now_ms - as_of < AWAY_SECONDS * 1000
        return {
            "target_seconds": target,
            "age_seconds": _round(age, 3),
            "status": ("fresh" if age is not None and age <= target else "stale") if known else "unknown",
            "answered": _quantiles(answers),
            "share_within_target": _round(_share(answers, target), 5),
            "as_of_ms": as_of,
        }

    def _hops(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "label": label,
                "as_of_ms": self._readings.as_of(f"{name}_count"),
                **_quantiles(self._readings.lately(name)),
            }
            for name, label in HOPS.items()
        ]

    def _lag(self, now_ms: int) -> list[dict[str, Any]]:
        rows = []
        for source, metrics in self._readings.each("consumer_lag_records"):
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

    def _traffic(self) -> dict[str, Any]:
        return {
            "events_per_second": _round(self._readings.per_second("events_total"), 1),
            "targets_per_second": _round(self._readings.per_second("train_targets_total"), 1),
            "answers": _quantiles(self._readings.lately("score_duration_seconds")),
            "as_of_ms": self._readings.as_of("events_total"),
        }

    def _learning(self) -> dict[str, Any]:
        """The trainer's own test-then-train figures, and models compared elsewhere."""
        names = ("normalized_entropy", "auc_ratio", "calibration_ratio", "base_rate_ratio")
        figures = {name: self._readings.by(f"prequential_{name}", "task") for name in names}
        tasks = {
            task: {name.removesuffix("_ratio"): _round(figures[name].get(task), 5) for name in names}
            for task in sorted({task for values in figures.values() for task in values})
        }
        return {
            "tasks": tasks,
            "as_of_ms": self._readings.as_of("prequential_normalized_entropy"),
            "compared": {
                name: {model: _round(v, 5) for model, v in models.items()} for name, models in self._compared.items()
            },
            "compared_as_of_ms": self._compared_ms,
        }

    def _vocabulary(self) -> dict[str, Any]:
        readings = self._readings
        return {
            "slots": _whole(readings.total("table_slots")),
            "used": _whole(readings.total("table_used_slots")),
            "admissions": _whole(readings.total("table_admissions_total")),
            "evictions": {k: round(v) for k, v in sorted(readings.by("table_evictions_total", "reason").items())},
            "admissions_per_second": _round(readings.per_second("table_admissions_total"), 2),
            "evictions_per_second": _round(readings.per_second("table_evictions_total"), 2),
            "as_of_ms": readings.as_of("table_slots"),
        }

    def _weights(self) -> dict[str, Any]:
        served = {
            source.name: round(version)
            for source, metrics in self._readings.each("weights_version")
            if (version := metrics.total("weights_version", role="scorer")) is not None
        }
        return self._timeline.show() | {
            "served": min(served.values(), default=None),
            "served_by": served,
            "rejected": _some(self._readings.by("weights_rejected_total", "reason")),
            "withheld": _some(self._readings.by("weights_withheld_total", "reason")),
            "as_of_ms": self._readings.as_of("weights_version"),
        }

    def _dead_letters(self, now_ms: int) -> dict[str, Any]:
        by_reason: dict[str, int] = {}
        for key, count in self._letters.since(now_ms - LETTER_KEEP_MS).items():
            reason = key.partition("/")[0]
            by_reason[reason] = by_reason.get(reason, 0) + count
        minutes = [[start, sum(window.values())] for start, window in self._letters.each(now_ms - LETTER_KEEP_MS)]
        ranked = dict(sorted(by_reason.items(), key=lambda pair: (-pair[1], pair[0])))
        return {"hour": sum(by_reason.values()), "by_reason": ranked, "minutes": minutes}

    def _sums(self, now_ms: int) -> dict[tuple[int, str], Sums]:
        """By weights version and task."""
        found: dict[tuple[int, str], Sums] = {}
        for key, sums in self._quality.since(now_ms - self._online_ms).items():
            version, task, _ = key.split("/")
            found[int(version), task] = found.get((int(version), task), Sums()) + sums
        return found

    def _by_task(self, now_ms: int) -> dict[str, Sums]:
        found = self._sums(now_ms)
        return {task: total(sums for (_, t), sums in found.items() if t == task) for task in self._kinds}

    def _online(self, now_ms: int) -> dict[str, Any]:
        sums = self._sums(now_ms)
        groups = group_versions({v: sums[v, t].targets for v, t in sums if t == self._kinds[0]})
        lines = []
        for first, last in groups:
            tasks = {
                t: total(s for (v, task), s in sums.items() if task == t and first <= v <= last) for t in self._kinds
            }
            lines.append({"first": first, "last": last, "tasks": {t: _figures(s) for t, s in tasks.items()}})
        return {
            "window_seconds": self._monitor.online_window_seconds,
            "samples": self._samples,
            "unreadable": self._unreadable,
            "tasks": {task: _figures(s) for task, s in self._by_task(now_ms).items()},
            "versions": lines,
        }

    def _canaries(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "every_seconds": self._monitor.canary_seconds,
            "lost": dict(sorted(self._lost.items())),
        }
        for hop, seen in self._canary.items():
            seconds = sorted(value for _, value in seen)
            shown[hop] = {
                "n": len(seconds),
                "last": _round(seen[-1][1], 3) if seen else None,
                "p50": _round(_rank(seconds, 0.5), 3),
                "p99": _round(_rank(seconds, 0.99), 3),
                "as_of_ms": seen[-1][0] if seen else None,
            }
        return shown

    def _point(self, now_ms: int) -> dict[str, float | int | None]:
        """One moment of the sparklines; what is not known now leaves a gap."""
        freshness, lag, learning = self._freshness(now_ms), self._lag(now_ms), self._learning()
        traffic, since = self._traffic(), now_ms - AWAY_SECONDS * 1000
        task = learning["tasks"].get(self._kinds[0], {})
        compared = learning["compared"].get("normalized_entropy", {})

        def now(value: Any, as_of: int | None) -> Any:
            return value if as_of is not None and as_of > since else None

        known = [row["records"] for row in lag if row["as_of_ms"] > since]
        return {
            "ms": now_ms,
            "age": now(freshness["age_seconds"], freshness["as_of_ms"]),
            "events": now(traffic["events_per_second"], traffic["as_of_ms"]),
            "lag": sum(known) if known else None,
            "ne": now(task.get("normalized_entropy"), learning["as_of_ms"]),
            "frozen": now(compared.get("frozen"), learning["compared_as_of_ms"]),
            "used": now(self._vocabulary()["used"], self._vocabulary()["as_of_ms"]),
        }


def group_versions(targets: Mapping[int, int]) -> list[tuple[int, int]]:
    """Neighbouring versions put together from the newest back, until each group has some hundred targets.

    (first, last) version of each of the newest groups, newest first; an oldest group with too few is left out unless it
    is the only one.
    """
    groups: list[tuple[int, int]] = []
    last, held = 0, 0
    for version in sorted(targets, reverse=True):
        last, held = (last or version), held + targets[version]
        if held >= GROUP_TARGETS:
            groups.append((version, last))
            last = held = 0
    if held and not groups:
        groups.append((min(targets), last))
    return groups[:GROUPS]


def _figures(sums: Sums) -> dict[str, Any]:
    return {
        "targets": sums.targets,
        "normalized_entropy": _round(sums.normalized_entropy, 4),
        "calibration": _round(sums.calibration, 4),
        "auc": _round(sums.auc, 4),
        "ctr": _round(sums.rate, 4),
    }


def _quantiles(buckets: Buckets) -> dict[str, Any]:
    n = max(buckets.values(), default=0.0)
    return {"n": round(n), "p50": _round(quantile(buckets, 0.5), 4), "p99": _round(quantile(buckets, 0.99), 4)}


def _share(buckets: Buckets, edge: float) -> float | None:
    """The share of observations at or below an edge (the largest one that is not above it)."""
    n = max(buckets.values(), default=0.0)
    return max((count for le, count in buckets.items() if le <= edge), default=0.0) / n if n else None


def _rank(ordered: list[float], q: float) -> float | None:
    """The nearest-rank quantile."""
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)] if ordered else None


def _some(counts: Mapping[str, float]) -> dict[str, int]:
    return {key: round(value) for key, value in sorted(counts.items()) if value}


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
