"""Reading other processes' `/metrics` and `/readyz`: what the page and the demo show is what an operator would see.

Percentiles come from the histograms' buckets by linear interpolation, as Prometheus does it: exact to a bucket.
"""

import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_SECONDS = 2.0
MAX_BYTES = 8 << 20  # of an answer; a role's metrics take some ten kilobytes
Buckets = dict[float, float]  # upper edge -> cumulative count


class Metrics:
    """One reading of a process's metrics."""

    def __init__(self, text: str = "") -> None:
        self._samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over all series of `streamgr_<name>` that carry these labels; None where there is none."""
        found = [
            value
            for sample, has, value in self._samples
            if sample == f"streamgr_{name}" and labels.items() <= has.items()
        ]
        return math.fsum(found) if found else None

    def count(self, name: str, **labels: str) -> int:
        """`total` of something counted; 0 where there is none."""
        return round(self.total(name, **labels) or 0)

    def quantile(self, name: str, q: float) -> float | None:
        """The `q` quantile of the histogram `streamgr_<name>`; None where nothing was observed."""
        return quantile(self.buckets(name), q)

    def buckets(self, name: str) -> Buckets:
        """The histogram `streamgr_<name>`, all of its series together; empty where there is none."""
        buckets: Buckets = {}
        for sample, labels, value in self._samples:
            if sample == f"streamgr_{name}_bucket":
                edge = float(labels["le"])
                buckets[edge] = buckets.get(edge, 0.0) + value
        return buckets

    def by(self, name: str, label: str) -> dict[str, float]:
        """The series of `streamgr_<name>` summed by one of their labels."""
        found: dict[str, float] = {}
        for sample, labels, value in self._samples:
            if sample == f"streamgr_{name}" and label in labels:
                found[labels[label]] = found.get(labels[label], 0.0) + value
        return found


def events(sequencer: Metrics) -> int:
    """Events committed to sequences: heartbeats and erasures are none."""
    others = sum(sequencer.count("events_total", kind=kind) for kind in ("heartbeat", "erasure"))
    return sequencer.count("events_total") - others


def quantile(buckets: Mapping[float, float], q: float) -> float | None:
    """The `q` quantile of a histogram given as upper edge -> cumulative count, linear within a bucket.

    None without observations; beyond the last finite edge, that edge.
    """
    edges = sorted(buckets)
    if not edges or not buckets[edges[-1]]:
        return None
    wanted, low, below = q * buckets[edges[-1]], 0.0, 0.0
    for edge in edges:
        if buckets[edge] >= wanted and buckets[edge] > below:
            return low if math.isinf(edge) else low + (edge - low) * (wanted - below) / (buckets[edge] - below)
        low, below = edge, buckets[edge]
    return low


def metrics(port: int, host: str = "127.0.0.1") -> Metrics | None:
    """What `/metrics` says now; None while nobody answers."""
    try:
        return read(f"http://{host}:{port}")
    except OSError:
        return None


def read(url: str, timeout_seconds: float = TIMEOUT_SECONDS) -> Metrics:
    """What `<url>/metrics` says now. Raises `OSError` where nobody answers, or answers something else."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=timeout_seconds) as answer:  # noqa: S310 (configured)
            content = answer.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise OSError(f"an answer of more than {MAX_BYTES} bytes")
        return Metrics(content.decode())
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"not metrics: {error}") from None


def why_not_ready(port: int, host: str = "127.0.0.1") -> str:
    """Empty when the process is ready, else what it waits for."""
    try:
        return readiness(f"http://{host}:{port}")
    except OSError:
        return "not answering yet"


def readiness(url: str, timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """Empty when `<url>/readyz` is content, else what it waits for. Raises `OSError` where nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=timeout_seconds):  # noqa: S310 (configured)
            return ""
    except urllib.error.HTTPError as error:
        with error:
            try:
                conditions = json.loads(error.read(MAX_BYTES))
                return ", ".join(f"{name}: {why}" for name, why in conditions.items() if why != "ok") or "not ready"
            except (ValueError, AttributeError):
                return f"status {error.code}"
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"no answer to understand: {error}") from None
