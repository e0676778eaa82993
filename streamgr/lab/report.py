"""The demo's face: what is shown while it runs, and its summary as text and as the contract's JSON object.

Pure: figures in, something to print out. What is not known is None here, a dash on the screen and null in JSON.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Figure = float | None
Quantiles = Mapping[str, Figure]

LABELS = {
    "continuous": "continuous (learns on)",
    "frozen": "frozen at a third",
    "popularity": "popularity",
    "oracle": "oracle (the best possible)",
}


@dataclass(frozen=True, slots=True)
class Figures:
    """The state of a run. Times in seconds; quantiles by name ("p50", …); quality by model."""

    seconds: float = 0.0
    events: int = 0  # committed to sequences, heartbeats excluded
    dead_letters: int = 0
    targets_learned: int = 0
    weights_version: int = 0
    event_to_serving: Quantiles = field(default_factory=dict)
    label_to_serving: Quantiles = field(default_factory=dict)
    model_age: Quantiles = field(default_factory=dict)
    normalized_entropy: Mapping[str, Figure] = field(default_factory=dict)
    hit_rate: Mapping[str, Figure] = field(default_factory=dict)
    slots: int = 0
    used: int = 0
    admissions: int = 0
    evictions: int = 0
    # on the screen only
    rate: Figure = None  # events per second, lately
    lag: Mapping[str, Figure] = field(default_factory=dict)  # role -> records behind the end
    weights_age: Figure = None  # now - horizon
    ranked: int = 0  # targets on which the models' probabilities are compared
    retrieved: int = 0  # and those on which their lists are
    frozen_version: int | None = None
    learned_at_freeze: int = 0
    left_out: int = 0
    served: int = 0  # targets learned that have reached serving
    rankings: Mapping[str, int] = field(default_factory=dict)  # source -> slates

    @property
    def events_per_second(self) -> float:
        return self.events / self.seconds if self.seconds else 0.0


def summary_json(f: Figures) -> dict[str, Any]:
    """The object of `streamgr demo --json`, exactly as the contract has it."""
    return {
        "seconds": round(f.seconds, 3),
        "events": f.events,
        "events_per_second": round(f.events_per_second, 1),
        "dead_letters": f.dead_letters,
        "targets_learned": f.targets_learned,
        "weights_version": f.weights_version,
        "event_to_serving_seconds": _numbers(f.event_to_serving, ("p50", "p95", "p99")),
        "label_to_serving_seconds": _numbers(f.label_to_serving, ("p50", "p95", "p99")),
        "model_age_seconds": _numbers(f.model_age, ("p50", "p99")),
        "normalized_entropy": _numbers(f.normalized_entropy, ("continuous", "frozen", "popularity", "oracle")),
        "hit_rate_at_10": _numbers(f.hit_rate, ("continuous", "frozen", "popularity")),
        "table": {"slots": f.slots, "used": f.used, "admissions": f.admissions, "evictions": f.evictions},
    }


def screen(f: Figures, title: str, note: str) -> RenderableType:
    """The live table."""
    flow = Table.grid(padding=(0, 2))
    flow.add_column(style="bold")
    flow.add_column(justify="right")
    flow.add_row("events / s", f"{_show(f.rate, 0)}  (total {f.events:,}, dead letters {f.dead_letters:,})")
    flow.add_row("records behind", ", ".join(f"{role} {_show(n, 0)}" for role, n in f.lag.items()) or "-")
    flow.add_row("targets learned", f"{f.targets_learned:,}")
    flow.add_row("weights served", f"version {f.weights_version}, know all up to {_show(f.weights_age, 1)} s ago")
    flow.add_row(
        "event to serving",
        f"p50 {_show(f.event_to_serving.get('p50'), 1)} s, p99 {_show(f.event_to_serving.get('p99'), 1)} s",
    )
    flow.add_row("ID table", f"{f.used:,} of {f.slots:,} slots, {f.admissions:,} admitted, {f.evictions:,} evicted")
    if f.rankings:
        flow.add_row("slates ordered by", ", ".join(f"{source} {n:,}" for source, n in f.rankings.items() if n))
    quality = Table(box=None, padding=(0, 2), pad_edge=False)
    quality.add_column("now, on the same targets")
    quality.add_column("normalized entropy", justify="right")
    quality.add_column("HR@10", justify="right")
    for model, label in LABELS.items():
        quality.add_row(label, _show(f.normalized_entropy.get(model), 3), _show(f.hit_rate.get(model), 3))
    return Panel(Group(flow, Text(), quality, Text(), Text(note, style="dim")), title=title, title_align="left")


def line(f: Figures) -> str:
    """One line of progress, for where there is no screen."""
    ne, ets = f.normalized_entropy, f.event_to_serving
    return (
        f"{f.seconds:5.0f} s  {_show(f.rate, 0)} events/s  learned {f.targets_learned:,}  version {f.weights_version}  "
        f"event to serving p50 {_show(ets.get('p50'), 1)} p99 {_show(ets.get('p99'), 1)} s  NE "
        + " ".join(f"{model} {_show(ne.get(model), 3)}" for model in LABELS)
    )


def summary_text(f: Figures) -> str:
    """The summary for people."""
    ets, lts, age = f.event_to_serving, f.label_to_serving, f.model_age
    frozen = "-" if f.frozen_version is None else f"version {f.frozen_version}, after {f.learned_at_freeze:,} targets"
    rows = [
        ("events", f"{f.events:,} in {f.seconds:.1f} s ({f.events_per_second:.0f}/s), {f.dead_letters:,} dead letters"),
        ("targets learned", f"{f.targets_learned:,}"),
        ("weights served", f"version {f.weights_version}"),
        ("event to serving", _quantiles(ets) + "  (the label's wait included)"),
        ("label to serving", _quantiles(lts)),
        ("model age at a score", _quantiles(age)),
        ("ID table", f"{f.used:,} of {f.slots:,} slots, {f.admissions:,} admitted, {f.evictions:,} evicted"),
        ("frozen", frozen),
    ]
    text = [f"{name:22}{value}" for name, value in rows]
    text.append(f"{'after the freeze':22}{'normalized entropy':>20}{'HR@10':>10}")
    for model, label in LABELS.items():
        ne, hits = f.normalized_entropy.get(model), f.hit_rate.get(model)
        text.append(f"  {label:26}{_show(ne, 4):>14}{_show(hits, 4):>10}")
    left_out = f"; {f.left_out:,} left out, by user" if f.left_out else ""
    text.append(f"Compared on the same {f.ranked:,} shown and {f.retrieved:,} engaged targets{left_out}.")
    text.append("Percentiles are read from the scorer's histograms, linear within a bucket.")
    return "\n".join(text)


def _quantiles(quantiles: Quantiles) -> str:
    return ", ".join(f"{name} {_show(value, 2)} s" for name, value in quantiles.items()) or "-"


def _show(value: Figure, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _numbers(values: Mapping[str, Figure], names: tuple[str, ...]) -> dict[str, Figure]:
    return {
        name: round(value, 6) if (value := values.get(name)) is not None and math.isfinite(value) else None
        for name in names
    }
