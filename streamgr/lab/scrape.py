"""Reading other processes' `/metrics` and `/readyz`: what the demo shows is what an operator would see.

Percentiles come from the histograms' buckets by linear interpolation, as Prometheus does it: exact to a bucket.
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_SECONDS = 2.0


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
        buckets: dict[float, float] = {}
        for sample, labels, value in self._samples:
            if sample == f"streamgr_{name}_bucket":
                edge = float(labels["le"])
                buckets[edge] = buckets.get(edge, 0.0) + value
        return quantile(buckets, q)


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
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=TIMEOUT_SECONDS) as answer:
            return Metrics(answer.read().decode())
    except OSError:
        return None


def why_not_ready(port: int, host: str = "127.0.0.1") -> str:
    """Empty when the process is ready, else what it waits for."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/readyz", timeout=TIMEOUT_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        conditions = json.loads(error.read())
        return ", ".join(f"{name}: {why}" for name, why in conditions.items() if why != "ok") or "not ready"
    except OSError:
        return "not answering yet"
