"""The metrics that exist: those that the code registers, and the few of others that rules and dashboards use.

`python -m tests.ops.metrics` imports every module of streamgr and prints what they have registered; in a process of its
own, since some of them change the one that imports them.
"""

import functools
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.ops import promql

TARGET_LABELS = frozenset({"role", "instance", "job"})  # given at the scrape, whatever the metric
ROLES = {"sequencer", "trainer", "scorer", "monitor"}
# What the expressions use of others: https://github.com/danielqsj/kafka_exporter and Prometheus itself.
OTHERS = {
    "kafka_consumergroup_lag": ("consumergroup", "topic", "partition"),
    "up": (),
    "ALERTS": ("alertname", "alertstate", "severity"),
}
# Registered by the monitor; read from the code itself where it is there.
MONITOR = {
    "streamgr_canary_sequence_seconds": ("histogram", ()),
    "streamgr_canary_weights_seconds": ("histogram", ()),
    "streamgr_canary_lost": ("counter", ("hop",)),
    "streamgr_online_normalized_entropy": ("gauge", ("task",)),
    "streamgr_online_calibration_ratio": ("gauge", ("task",)),
    "streamgr_online_auc_ratio": ("gauge", ("task",)),
    "streamgr_online_ctr_ratio": ("gauge", ("task",)),
    "streamgr_online_scores_joined": ("counter", ("outcome",)),
    "streamgr_monitor_source_up": ("gauge", ("source",)),
    "streamgr_dead_letters_seen": ("counter", ("reason",)),
}


@dataclass(frozen=True)
class Metric:
    """What a sample's name stands for. values: of a label that has them from the start; edges: of a histogram."""

    labels: tuple[str, ...]
    values: dict[str, frozenset[str]]
    edges: tuple[float, ...] = ()


@functools.cache
def samples() -> dict[str, Metric]:
    """Every sample's name that a role of ours, or one of the others, can export."""
    listed = subprocess.run(
        [sys.executable, "-m", "tests.ops.metrics"], check=True, capture_output=True, text=True, timeout=180
    )
    found = {name: Metric(labels, {}) for name, labels in OTHERS.items()}
    for name, kind, labels, children, edges in json.loads(listed.stdout.splitlines()[-1]):
        values = {label: frozenset(child[i] for child in children) for i, label in enumerate(labels) if children}
        if kind == "histogram":
            found[f"{name}_bucket"] = Metric((*labels, "le"), values, tuple(edges))
            found |= {f"{name}_{part}": Metric(tuple(labels), values) for part in ("count", "sum")}
        else:
            found[f"{name}_total" if kind == "counter" else name] = Metric(tuple(labels), values)
    return found


def complaints(expression: str, recorded: dict[str, frozenset[str]]) -> Iterator[str]:
    """What an expression names that does not exist. recorded: the labels of the recording rules' series."""
    named = promql.read(expression)
    known = set(TARGET_LABELS | named.made)
    for selector in named.selectors:
        if selector.name in recorded:
            labels, metric = set(recorded[selector.name]), None
        elif metric := samples().get(selector.name):
            labels = set(metric.labels) | TARGET_LABELS
        else:
            yield f"no such metric: {selector.name}"
            continue
        known |= labels
        for label, operator, value in selector.matchers:
            if label not in labels:
                yield f"{selector.name} has no label {label}"
            elif metric is not None and "$" not in value:
                yield from _unknown_values(selector.name, metric, label, operator, value)
    for label in sorted(named.grouped - known):
        yield f"nothing in it has the label {label}: {expression}"


def recorded_labels(expression: str) -> frozenset[str]:
    """The labels that a recorded series can have: those that its aggregations keep."""
    return promql.read(expression).grouped


def _unknown_values(name: str, metric: Metric, label: str, operator: str, value: str) -> Iterator[str]:
    if label == "le":
        if value != "+Inf" and (value != repr(float(value)) or float(value) not in metric.edges):
            yield f"{name} has no bucket up to {value}: {metric.edges}"
        return
    if label == "role":
        possible = ROLES
    elif not (possible := set(metric.values.get(label, ()))):
        return
    if operator in ("=", "!="):
        wrong = {value} - possible
    else:  # an alternative that nothing matches is a misspelling
        wrong = {part for part in value.split("|") if not any(re.fullmatch(part, each) for each in possible)}
    if wrong:
        yield f"{name} never has {label}={', '.join(sorted(wrong))}; it has {', '.join(sorted(possible))}"


def _list() -> list[tuple[str, str, list[str], list[list[str]], list[float]]]:
    import prometheus_client
    from prometheus_client.metrics import MetricWrapperBase

    import streamgr

    found = {}
    for module in pkgutil.walk_packages(streamgr.__path__, "streamgr."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, MetricWrapperBase):
                edges = [e for e in getattr(value, "_upper_bounds", ()) if e != float("inf")]
                labels = list(value._labelnames)
                children = [list(child) for child in value._metrics] if labels else []
                found[value._name] = (value._name, value._type, labels, children, edges)
    for family in prometheus_client.REGISTRY.collect():
        if family.name.startswith("process_"):
            found[family.name] = (family.name, family.type, [], [], [])
    if importlib.util.find_spec("streamgr.monitor") is None:
        from streamgr.telemetry import FRESHNESS_BUCKETS

        for name, (kind, names) in MONITOR.items():
            found[name] = (name, kind, list(names), [], list(FRESHNESS_BUCKETS) if kind == "histogram" else [])
    return list(found.values())


if __name__ == "__main__":
    print(json.dumps(_list()))
