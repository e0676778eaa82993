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
from streamgr.monitor import figures
from streamgr.monitor.outcomes import Outcomes, Score
from streamgr.monitor.readings import AWAY_SECONDS, Readings, Target
from streamgr.monitor.sums import Sums, total
from streamgr.monitor.timeline import Timeline
from streamgr.monitor.windows import Windows
from streamgr.scrape import Metrics
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
    """Takes records, readings, canaries and comparisons; `settle` and `tick` once a second, `snapshot` when asked."""

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
        self._began_ms, self._heard_ms = now_ms, 0
        self._canary: dict[str, deque[tuple[int, float]]] = {
            hop: deque(maxlen=CANARIES) for hop in ("sequence", "weights")
        }
        self._lost: dict[str, int] = {}
        self._compared: dict[str, Mapping[str, float | None]] = {}
        self._compared_ms: int | None = None
        self._points: deque[dict[str, float | int | None]] = deque(maxlen=POINTS)

    # --- records ---

    def heard(self, now_ms: int) -> None:
        """The broker has answered."""
        with self._lock:
            self._heard_ms = now_ms

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
            readings = self._readings
            return {
                "format": FORMAT,
                "title": self._title,
                "now_ms": now_ms,
                "window_seconds": self._monitor.window_seconds,
                "away_seconds": AWAY_SECONDS,
                "freshness": figures.freshness(readings, self._monitor.target_seconds, now_ms),
                "hops": figures.hops(readings),
                "lag": figures.lag(readings),
                "traffic": figures.traffic(readings),
                "quality": figures.learning(readings) | self._comparison(),
                "vocabulary": figures.vocabulary(readings),
                "weights": self._timeline.show() | figures.served(readings),
                "dead_letters": self._dead_letters(now_ms),
                "online": self._online(now_ms),
                "canary": self._canaries(),
                "broker": {"as_of_ms": self._heard_ms or None},
                "sources": [self._broker(now_ms), *readings.show(now_ms)],
                "points": list(self._points),
            }

    def summary(self, now_ms: int) -> dict[str, Any]:
        """The record of `<prefix>.freshness`: the snapshot without what is only for the eye."""
        whole = self.snapshot(now_ms)
        return {key: value for key, value in whole.items() if key not in ("title", "points", "weights", "away_seconds")}

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
            lines.append({"first": first, "last": last, "tasks": {t: figures.judged(s) for t, s in tasks.items()}})
        return {
            "window_seconds": self._monitor.online_window_seconds,
            "samples": self._samples,
            "unreadable": self._unreadable,
            "tasks": {task: figures.judged(s) for task, s in self._by_task(now_ms).items()},
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
                "last": figures.rounded(seen[-1][1], 3) if seen else None,
                "p50": figures.rounded(figures.rank(seconds, 0.5), 3),
                "p99": figures.rounded(figures.rank(seconds, 0.99), 3),
                "as_of_ms": seen[-1][0] if seen else None,
            }
        return shown

    def _broker(self, now_ms: int) -> dict[str, Any]:
        """The broker as a source among the others."""
        silent = (now_ms - (self._heard_ms or self._began_ms)) / 1000
        up = bool(self._heard_ms) and silent < AWAY_SECONDS
        return {"name": "broker", "role": None, "up": up, "ready": up, "why": None, "silent_seconds": round(silent, 1)}

    def _comparison(self) -> dict[str, Any]:
        return {
            "compared": {
                name: {model: figures.rounded(value, 5) for model, value in models.items()}
                for name, models in self._compared.items()
            },
            "compared_as_of_ms": self._compared_ms,
        }

    def _point(self, now_ms: int) -> dict[str, float | int | None]:
        """One moment of the sparklines; what is not known now leaves a gap."""
        readings, since = self._readings, now_ms - AWAY_SECONDS * 1000
        freshness = figures.freshness(readings, self._monitor.target_seconds, now_ms)
        traffic, learning, vocabulary = (f(readings) for f in (figures.traffic, figures.learning, figures.vocabulary))
        frozen = self._compared.get("normalized_entropy", {}).get("frozen")

        def now(value: Any, as_of: int | None) -> Any:
            return value if as_of is not None and as_of > since else None

        lag = [row["records"] for row in figures.lag(readings) if row["as_of_ms"] > since]
        task = learning["tasks"].get(self._kinds[0], {})
        return {
            "ms": now_ms,
            "age": now(freshness["age_seconds"], freshness["as_of_ms"]),
            "events": now(traffic["events_per_second"], traffic["as_of_ms"]),
            "lag": sum(lag) if lag else None,
            "ne": now(task.get("normalized_entropy"), learning["as_of_ms"]),
            "frozen": now(frozen, self._compared_ms),
            "used": now(vocabulary["used"], vocabulary["as_of_ms"]),
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
