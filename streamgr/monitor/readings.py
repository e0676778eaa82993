"""What the roles say of themselves: their /metrics, read once a second, and what has moved within the last minute.

A histogram counts from its process's start, and a percentile of all that a role has ever seen says nothing of now.
So what is kept of each reading is what the page needs, for one window, and figures come from the difference between
the newest reading and the oldest of the window; a counter that went back has restarted and counts from 0.

A source that does not answer keeps its last figures with the time they were read, and is named as away: how old a
figure is, is part of the figure.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from streamgr import scrape
from streamgr.clock import Clock
from streamgr.errors import ConfigError
from streamgr.scrape import Buckets, Metrics
from streamgr.service import Stop
from streamgr.telemetry import Log, gauge

SOURCE_UP = gauge("monitor_source_up", "1 while a scraped role answers.", ("source",))

AWAY_SECONDS = 5.0  # without an answer for so long: away
SAY_AGAIN_SECONDS = 60.0
HOPS = {
    "event_to_sequence_seconds": "event to sequence",
    "label_to_gradient_seconds": "label to gradient",
    "gradient_to_serving_seconds": "gradient to serving",
    "event_to_serving_seconds": "event to serving",
}
HISTOGRAMS = (*HOPS, "label_to_serving_seconds", "score_model_age_seconds", "score_duration_seconds")
COUNTERS = ("events_total", "train_targets_total", "table_admissions_total", "table_evictions_total")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a source is read: its name, and the URL without a path."""

    name: str
    url: str

    @classmethod
    def of(cls, text: str) -> "Target":
        """From `URL` or `NAME=URL`; a URL alone is named by its host. Raises `ConfigError`."""
        name, equals, url = text.rpartition("=")
        try:
            parts = urlsplit(url.rstrip("/"))
            host, port = parts.hostname or "", parts.port
        except ValueError:
            host, port = "", None
        if not host or parts.scheme not in ("http", "https") or parts.path or (equals and not name):
            raise ConfigError(
                f"{text!r} is not http(s)://HOST:PORT",
                where="monitor.scrape",
                remedy="URL, or NAME=URL, without a path",
            )
        by_host = host if any(map(str.isalpha, host)) and host != "localhost" else f"{host}:{port or 80}"
        return cls(name or by_host, url.rstrip("/"))


@dataclass(frozen=True, slots=True)
class Reading:
    """What is kept of one answer."""

    at_ms: int
    histograms: dict[str, Buckets]
    counters: dict[str, float]
    metrics: Metrics | None = None  # of the newest reading only


@dataclass(slots=True)
class Source:
    """One scraped process. `why`: what its readiness waits for, or why it did not answer."""

    name: str
    url: str
    since_ms: int  # the last change between up and away, or the start
    role: str = ""
    up: bool = False
    why: str = "no answer yet"
    last_ms: int = 0  # the last answer
    kept: deque[Reading] = field(default_factory=deque)

    @property
    def newest(self) -> Reading | None:
        return self.kept[-1] if self.kept else None


class Readings:
    """Folds answers; pure: what was read, and when, comes in."""

    def __init__(self, targets: Iterable[Target], window_ms: int, now_ms: int) -> None:
        self._window_ms = window_ms
        self.sources = {target.name: Source(target.name, target.url, now_ms) for target in targets}

    def answered(self, name: str, metrics: Metrics, why_not_ready: str, at_ms: int) -> None:
        """A source has answered."""
        source = self.sources[name]
        if not source.up:
            source.up, source.since_ms = True, at_ms
        source.last_ms, source.why = at_ms, why_not_ready
        source.role = next(iter(metrics.by("build_info", "role")), source.role)
        counters = {name: metrics.total(name) for name in COUNTERS}
        counters["events_total"] = float(scrape.events(metrics)) if counters["events_total"] is not None else None
        if source.kept:  # the page shows series by label of the newest only
            last = source.kept[-1]
            source.kept[-1] = Reading(last.at_ms, last.histograms, last.counters)
        histograms = {name: buckets for name in HISTOGRAMS if (buckets := metrics.buckets(name))}
        source.kept.append(Reading(at_ms, histograms, {k: v for k, v in counters.items() if v is not None}, metrics))
        while len(source.kept) > 2 and source.kept[1].at_ms <= at_ms - self._window_ms:
            source.kept.popleft()

    def silent(self, name: str, why: str, at_ms: int) -> None:
        """A source has not answered."""
        source = self.sources[name]
        if source.up and at_ms - source.last_ms >= AWAY_SECONDS * 1000:
            source.up, source.since_ms = False, source.last_ms
        if not source.up:
            source.why = why

    def lately(self, histogram: str) -> Buckets:
        """What a histogram has taken within the window, over all sources."""
        found: Buckets = {}
        for source in self.sources.values():
            if source.newest is None or not (now := source.newest.histograms.get(histogram)):
                continue
            before = source.kept[0].histograms.get(histogram, {}) if len(source.kept) > 1 else now
            moved = {edge: count - before.get(edge, 0.0) for edge, count in now.items()}
            if min(moved.values()) < 0:
                moved = now
            for edge, count in moved.items():
                found[edge] = found.get(edge, 0.0) + count
        return found

    def per_second(self, counter: str) -> float | None:
        """How fast a counter has moved within the window, over all sources; None where it is not known."""
        rates = []
        for source in self.sources.values():
            if len(source.kept) > 1 and source.newest and counter in source.newest.counters:
                first, last = source.kept[0], source.kept[-1]
                moved = last.counters[counter] - first.counters.get(counter, 0.0)
                rates.append(max(0.0, moved) / max(0.001, (last.at_ms - first.at_ms) / 1000))
        return math.fsum(rates) if rates else None

    def each(self, name: str) -> list[tuple[Source, Metrics]]:
        """The newest reading of every source that has a series `streamgr_<name>`."""
        return [
            (source, source.newest.metrics)
            for source in self.sources.values()
            if source.newest and source.newest.metrics and source.newest.metrics.total(name) is not None
        ]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of the newest readings; None where there are none."""
        values = [v for _, metrics in self.each(name) if (v := metrics.total(name, **labels)) is not None]
        return math.fsum(values) if values else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """The newest readings summed by a label; values that are no numbers are left out."""
        found: dict[str, float] = {}
        for _, metrics in self.each(name):
            for key, value in metrics.by(name, label).items():
                if math.isfinite(value):
                    found[key] = found.get(key, 0.0) + value
        return found

    def as_of(self, name: str) -> int | None:
        """When the oldest of the figures behind a name was read (ms); None where there is none."""
        return min((source.last_ms for source, _ in self.each(name)), default=None)

    def show(self, now_ms: int) -> list[dict[str, Any]]:
        """The sources by name."""
        return [
            {
                "name": s.name,
                "role": s.role or None,
                "up": s.up,
                "ready": s.up and not s.why,
                "why": s.why or None,
                "silent_seconds": round((now_ms - (s.last_ms or s.since_ms)) / 1000, 1),
            }
            for s in self.sources.values()
        ]


class Scraper:
    """A thread that reads every target at once, every `every_seconds`."""

    def __init__(
        self,
        targets: Sequence[Target],
        clock: Clock,
        log: Log,
        *,
        every_seconds: float,
        timeout_seconds: float,
        answered: Callable[[str, Metrics, str, int], None],
        silent: Callable[[str, str, int], None],
    ) -> None:
        self._targets, self._clock, self._log = targets, clock, log
        self._every, self._timeout = every_seconds, timeout_seconds
        self._answered, self._silent = answered, silent
        self._said: dict[str, float] = {}  # source -> when its silence was last logged
        self._stop = Stop()
        self._pool = ThreadPoolExecutor(max(1, min(8, len(targets))), "scrape")
        self._thread = threading.Thread(target=self._run, name="scraper", daemon=True)

    def start(self) -> None:
        for target in self._targets:
            SOURCE_UP.labels(target.name).set(0)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(self._timeout + 1)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            for done in [self._pool.submit(self._read, target) for target in self._targets]:
                done.result()

    def _read(self, target: Target) -> None:
        try:
            metrics = scrape.read(target.url, self._timeout)
            why = scrape.readiness(target.url, self._timeout)
        except OSError as error:
            SOURCE_UP.labels(target.name).set(0)
            why = str(getattr(error, "reason", None) or error)
            self._silent(target.name, why, self._clock.now_ms())
            now = self._clock.monotonic()
            if now - self._said.get(target.name, -math.inf) >= SAY_AGAIN_SECONDS:
                self._said[target.name] = now
                self._log.warning("source_away", why, source=target.name, url=target.url)
            return
        self._said.pop(target.name, None)
        SOURCE_UP.labels(target.name).set(1)
        self._answered(target.name, metrics, why, self._clock.now_ms())
