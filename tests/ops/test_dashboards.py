"""The dashboards are what their source says, ask only for what exists, and no panel is without advice."""

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ops import metrics
from tests.ops.test_rules import ALERTS, CONFIG, RECORDED, unknown_settings

GRAFANA = CONFIG / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
BOARDS: dict[str, Any] = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, board in BOARDS.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]


def queries(board: dict[str, Any]) -> dict[str, str]:
    """Every expression of a dashboard, by where it stands."""
    found = {f"{p['title']} {t['refId']}": t["expr"] for p in board["panels"] for t in p.get("targets", [])}
    found |= {f"annotation {each['name']}": each["expr"] for each in board["annotations"]["list"]}
    for variable in board["templating"]["list"]:
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert asked is not None
        found[f"variable {variable['name']}"] = f"count by ({asked[2]}) ({asked[1]})"
    return found


def test_the_files_are_what_the_generator_writes() -> None:
    generate = runpy.run_path(str(GRAFANA / "generate.py"))
    assert generate["boards"]() == sorted(BOARDS)
    for path in FILES:
        assert path.read_text(encoding="utf-8") == generate["text"](path.stem), "python config/grafana/generate.py"


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_a_dashboard_asks_only_for_what_exists(name: str) -> None:
    wrong = {where: list(metrics.complaints(query, RECORDED)) for where, query in queries(BOARDS[name]).items()}
    assert {where: found for where, found in wrong.items() if found} == {}


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_promtool_takes_the_queries(name: str, tmp_path: Path) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("no promtool on the PATH: apt-get install prometheus")
    rules = [
        {"record": f"query:{i}", "expr": query.replace("$__rate_interval", "1m").replace("$instance", ".*")}
        for i, query in enumerate(queries(BOARDS[name]).values())
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
    done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_to_do_and_where_its_data_come_from(panel: dict[str, Any]) -> None:
    assert len(panel["description"].split()) >= 10
    assert panel["datasource"] == {"type": "prometheus", "uid": "prometheus"}
    assert panel["targets"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(references) == len(set(references))
    for alert in re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", panel["description"]):
        assert alert in {rule.alert for rule in ALERTS}
    assert list(unknown_settings(panel["description"])) == []


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_panels_lie_beside_each_other(name: str) -> None:
    taken = set[tuple[int, int]]()
    for panel in BOARDS[name]["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARDS[name]["panels"]}) == len(BOARDS[name]["panels"])


def test_the_freshness_dashboard_goes_the_way_of_the_data() -> None:
    rows = [panel["title"] for panel in BOARDS["freshness"]["panels"] if panel["type"] == "row"]
    assert rows == [
        "Is it fresh?", "The hops", "Lag and watermark", "Training", "Table", "Weights", "Scoring", "Process",
    ]  # fmt: skip


def test_every_metric_of_ours_is_looked_at_somewhere() -> None:
    """Each one in a dashboard or an alert, or here with the reason why not."""
    needless = {
        "build_info": "what runs, for whoever asks",
        "feed_events_total": "the demo's feed, not a role",
        "feed_rankings_total": "as above",
        "feed_waits_total": "as above",
        "feed_first_event_timestamp_seconds": "as above",
        "feed_closed": "as above",
        "open_impressions": "follows events and window",
        "targets_total": "examples_total has the rate, train_targets_total the labels",
        "snapshot_copied_bytes_total": "a cost, no sign",
        "checkpoint_duration_seconds": "a cost, no sign",
        "train_checkpoint_duration_seconds": "a cost, no sign",
        "train_steps_total": "examples learned say the same",
        "train_incarnations_total": "says that a topic was recreated, which is logged and done on purpose",
        "weights_published_total": "the versions say the same",
        "weights_comparisons_restarted_total": "logged; withheld versions have come before",
        "weights_undo_bytes": "bounded by its setting",
        "consumer_stray_records_total": "harmless by design",
        "consumer_rebalances_total": "restarts say the same",
        "consumer_renewals_total": "logged; what it costs is lag",
        "monitor_restarts_total": "logged; where it fails for long the monitor is not ready, and NotReady tells",
        "monitor_watchers": "who looks at the live page is no affair of a dashboard",
    }
    asked = {
        selector.name.removesuffix("_bucket").removesuffix("_count")
        for expression in [
            *(query for board in BOARDS.values() for query in queries(board).values()),
            *(rule.expression for rule in ALERTS),
        ]
        for selector in metrics.promql.read(expression).selectors
    }
    known = {name.removesuffix("_bucket") for name in metrics.samples() if not name.endswith(("_count", "_sum"))}
    ours = {name for name in known if name.startswith("streamgr_")}
    assert {name.removeprefix("streamgr_") for name in ours - asked} <= needless.keys()
    assert {f"streamgr_{name}" for name in needless} & asked == set()


def test_provisioning_names_the_data_source_and_the_folder() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    scrape = yaml.safe_load((CONFIG / "prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert (source["uid"], source["type"], source["jsonData"]["timeInterval"]) == ("prometheus", "prometheus", scrape)
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/streamgr.yaml").read_text())["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
