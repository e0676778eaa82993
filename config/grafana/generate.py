"""Writes the dashboards' JSON, which is for Grafana, from boards/*.yaml, which is for people.

    python config/grafana/generate.py

A panel says what to do in `about`. Its curves are `queries`, an expression by legend, or `percentiles` of a histogram
(p50 and p99 over all processes, apart only by the label `by`); percentiles of hops do not add, so nothing is stacked.
`unit`, `min`, `max`, `decimals` and `noValue` are Grafana's; `colors` the thresholds of a `kind: stat`; `width` is of
24 columns.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
HERE = Path(__file__).parent
SOURCE = {"type": "prometheus", "uid": "prometheus"}
SCHEMA_VERSION = 41  # Grafana 12.0 and later
COLUMNS = 24
AXIS = ("unit", "min", "max", "decimals", "noValue")

ANNOTATIONS = [
    # A restart stands at the moment that the process itself says that it started.
    ("Restarts", "blue", 'process_start_time_seconds{job="streamgr"} * 1000', "{{role}} started", True),
    ("Rollbacks", "orange", 'min(delta(streamgr_weights_version{role="scorer"}[1m])) < 0', "rolled back", False),
    ("Pins", "purple", "max(changes(streamgr_weights_pinned_version[1m])) > 0", "pin set or removed", False),
    ("Pages", "red", 'ALERTS{alertstate="firing",severity="page"}', "{{alertname}}", False),
]


def boards() -> list[str]:
    """The dashboards' names."""
    return sorted(path.stem for path in (HERE / "boards").glob("*.yaml"))


def text(name: str) -> str:
    """The file of a dashboard."""
    board = yaml.safe_load((HERE / "boards" / f"{name}.yaml").read_text(encoding="utf-8"))
    return json.dumps(dashboard(name, board), indent=2, ensure_ascii=False) + "\n"


def dashboard(name: str, board: Json) -> Json:
    """Grafana's model of it: rows from top to bottom, in each the panels from left to right."""
    panels: list[Json] = []
    y = 0
    for row in board["rows"]:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row["row"],
                "collapsed": False,
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
                "panels": [],
            }
        )
        x, y, height = 0, y + 1, 0
        for member in row["panels"]:
            width = member.get("width", 8)
            if x + width > COLUMNS:
                x, y = 0, y + height
            height = 4 if member.get("kind") == "stat" else 8
            place = {"h": height, "w": width, "x": x, "y": y}
            panels.append({"id": len(panels) + 1, **panel(member), "gridPos": place})
            x += width
        y += height
    return {
        "uid": f"streamgr-{name}",
        "title": board["title"],
        "description": board["about"],
        "tags": ["streamgr"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [{"type": "dashboards", "title": "streamgr", "tags": ["streamgr"], "asDropdown": False}],
        "annotations": {"list": [annotation(*each) for each in ANNOTATIONS]},
        "templating": {"list": [INSTANCES] if "$instance" in str(panels) else []},
        "panels": panels,
    }


def panel(member: Json) -> Json:
    """A panel without its place."""
    defaults: Json = {"unit": "short"} | {name: member[name] for name in AXIS if name in member}
    if colors := member.get("colors"):
        steps = [{"color": color, "value": value} for value, color in map(_step, colors)]
        defaults |= {"color": {"mode": "thresholds"}, "thresholds": {"mode": "absolute", "steps": steps}}
    queries = _percentiles(member) | member.get("queries", {})
    if member.get("kind") == "stat":
        named = any("{{" in legend for legend in queries)
        shown = {"graphMode": "none", "textMode": "value_and_name" if named else "value"}
        options: Json = {"reduceOptions": {"calcs": ["lastNotNull"]}, **shown}
    else:
        legend, tooltip = {"displayMode": "list", "placement": "bottom"}, {"mode": "multi", "sort": "desc"}
        options = {"legend": legend, "tooltip": tooltip}
    return {
        "type": member.get("kind", "timeseries"),
        "title": member["title"],
        "description": member["about"],
        "datasource": SOURCE,
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(queries.items())
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def _percentiles(member: Json) -> dict[str, str]:
    if "percentiles" not in member:
        return {}
    metric, selector = re.fullmatch(r"(\w+)({.*})?", member["percentiles"]).groups("")  # type: ignore[union-attr]
    by = member.get("by", "")
    labels, apart = (f"le, {by}", f"{{{{{by}}}}} ") if by else ("le", "")
    rates = f"sum by ({labels}) (rate({metric}_bucket{selector}[$__rate_interval]))"
    return {f"{apart}p{p}": f"histogram_quantile(0.{p}, {rates})" for p in (50, 99)}


def _step(color: str | dict[float, str]) -> tuple[float | None, str]:
    """A threshold: the first colour holds from below, each further one from its value on."""
    return (None, color) if isinstance(color, str) else next(iter(color.items()))


def annotation(name: str, color: str, expression: str, title: str, at_value: bool) -> Json:
    """Moments that are marked in every panel: where the expression has a value, or, `at_value`, at that value (ms)."""
    return {
        "name": name,
        "datasource": SOURCE,
        "enable": True,
        "iconColor": color,
        "expr": expression,
        "titleFormat": title,
        "step": "15s",
        "useValueForTime": at_value,
    }


INSTANCES = {
    "name": "instance",
    "label": "instance",
    "description": "of scorers and processes; what sums over all of them is not affected",
    "type": "query",
    "datasource": SOURCE,
    "query": {"query": 'label_values(up{job="streamgr"}, instance)', "refId": "instance"},
    "refresh": 2,
    "sort": 1,
    "multi": True,
    "includeAll": True,
    "allValue": ".*",
    "current": {"text": ["All"], "value": ["$__all"]},
}


if __name__ == "__main__":
    for each in boards():
        (HERE / "dashboards" / f"{each}.json").write_text(text(each), encoding="utf-8")
