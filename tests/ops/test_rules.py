"""The rules name what exists, hold what they promise, and every alert has its tests and its paragraph.

What promtool judges is skipped where it is missing (Debian: `apt-get install prometheus`); the rest never is.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamgr.config import Config, Trainer, flatten
from streamgr.kafka.topics import load_specs, specs_path
from streamgr.serve.http import STALE_SECONDS
from tests.ops import metrics, promql

CONFIG = Path(__file__).resolve().parents[2] / "config"
PROMETHEUS = CONFIG / "prometheus"
OBJECTIVE = 0.01  # what may be stale


@dataclass(frozen=True)
class Rule:
    """A rule with the file it stands in."""

    file: str
    content: dict[str, Any]

    @property
    def expression(self) -> str:
        return str(self.content["expr"])

    @property
    def alert(self) -> str:
        return str(self.content["alert"])


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


RULES = [
    Rule(path.name, content)
    for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
    for group in load(path)["groups"]
    for content in group["rules"]
]
RECORDED = {
    rule.content["record"]: metrics.recorded_labels(rule.expression) for rule in RULES if "record" in rule.content
}
ALERTS = [rule for rule in RULES if "alert" in rule.content]
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


def unknown_settings(text: str) -> Iterator[str]:
    """What a text names as `section.key` and the configuration does not have."""
    settings = flatten(Config())
    sections = {name.partition(".")[0] for name in settings}
    for name in re.findall(r"\b([a-z]+\.[a-z_]+)\b(?![.(])", text):
        if name.partition(".")[0] in sections and name not in settings and not name.endswith((".toml", ".py")):
            yield name


@pytest.fixture
def promtool() -> str:
    if (found := shutil.which("promtool")) is None:
        pytest.skip("no promtool on the PATH: apt-get install prometheus")
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_configuration_and_the_rules(promtool: str) -> None:
    run(promtool, "check", "config", "--lint=all", "--lint-fatal", PROMETHEUS / "prometheus.yml")
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", *(PROMETHEUS / "rules").glob("*.yml"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_must_and_only_then(promtool: str, path: Path) -> None:
    run(promtool, "test", "rules", path)


def test_each_alert_is_tested_to_fire_and_not_to() -> None:
    fires, silent = set[str](), set[str]()
    for path in TESTS:
        for test in load(path)["tests"]:
            for case in test["promql_expr_test"]:
                for selector in promql.read(case["expr"]).selectors:
                    pattern = next((value for label, _, value in selector.matchers if label == "alertname"), "")
                    names = {rule.alert for rule in ALERTS if re.fullmatch(pattern, rule.alert)}
                    (fires if case["exp_samples"] else silent).update(names)
    assert fires == silent == {rule.alert for rule in ALERTS}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.content.get("alert") or rule.content["record"])
def test_a_rule_names_only_what_exists(rule: Rule) -> None:
    assert list(metrics.complaints(rule.expression, RECORDED)) == []


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_tests_feed_only_what_exists(path: Path) -> None:
    """A test of a series that nobody exports would prove nothing."""
    for test in load(path)["tests"]:
        for series in test.get("input_series", []):
            assert list(metrics.complaints(series["series"], RECORDED)) == [], test["name"]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.alert)
def test_an_alert_says_how_urgent_it_is_what_is_wrong_and_where_to_read_on(rule: Rule) -> None:
    assert rule.content["labels"]["severity"] in ("page", "ticket")
    notes = rule.content["annotations"]
    assert notes["runbook"] == f"config/RUNBOOK.md#{rule.alert.lower()}"
    named = promql.read(rule.expression)
    has = metrics.TARGET_LABELS | named.grouped | named.made
    for selector in named.selectors:
        has |= set(
            metrics.samples()[selector.name].labels if selector.name in metrics.samples() else RECORDED[selector.name]
        )
    assert set(re.findall(r"\$labels\.(\w+)", notes["summary"])) <= has


def test_a_name_is_given_once() -> None:
    names = [rule.content.get("alert") or rule.content["record"] for rule in RULES]
    assert len(names) == len(set(names))


def test_the_runbook_has_a_paragraph_for_each_alert_and_none_for_others() -> None:
    text = (CONFIG / "RUNBOOK.md").read_text(encoding="utf-8")
    paragraphs = dict(re.findall(r"^### (\w+)\n\n(.*?)(?=\n##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert sorted(paragraphs) == sorted(rule.alert for rule in ALERTS)
    for name, body in paragraphs.items():
        for part in ("**Means**", "**Users**", "**Look**", "**Do**", "**Wait**"):
            assert part in body, f"{name} does not say {part}"


def test_the_runbook_names_only_what_exists() -> None:
    """Metrics, settings and the events of the log."""
    text = (CONFIG / "RUNBOOK.md").read_text(encoding="utf-8")
    for expression in re.findall(r"`((?:streamgr|process)_[a-z_]+(?:{[^}`]*})?)`", text):
        if f"{expression}_bucket" not in metrics.samples():
            assert list(metrics.complaints(expression, RECORDED)) == []
    assert list(unknown_settings(text)) == []
    code = "".join(path.read_text(encoding="utf-8") for path in (CONFIG.parent / "streamgr").rglob("*.py"))
    for event in re.findall(r"`([a-z]+_[a-z_]+)`", re.sub(r"`(streamgr|process|kafka_consumer)\w+.*?`", "", text)):
        assert f'"{event}"' in code, event


def test_the_objective_is_the_same_everywhere() -> None:
    """The rules' threshold is the one at which answers call themselves stale, and the share is one number."""
    for rule in RULES:
        for selector in promql.read(rule.expression).selectors:
            if selector.name == "streamgr_score_model_age_seconds_bucket":
                assert [float(value) for label, _, value in selector.matchers if label == "le"] == [STALE_SECONDS]
    burns = [
        re.findall(r"> \(([\d.]+) \* ([\d.]+)\)", rule.expression) for rule in RULES if "Budget" in str(rule.content)
    ]
    assert [burn for burn in burns if burn] == [[(f, "0.01")] * 2 for f in ("14.4", "6", "1")]
    assert float("0.01") == OBJECTIVE
    left = next(rule for rule in RULES if rule.content.get("record") == "streamgr:freshness_budget_left:ratio")
    assert left.expression.endswith(f"/ {OBJECTIVE}")


def test_retention_near_is_half_of_what_the_topics_keep() -> None:
    expression = next(rule.expression for rule in ALERTS if rule.alert == "RetentionNear")
    days = dict(re.findall(r'\\\\\.(\w+)"} > (\d+) \* 86400', expression))
    kept = {
        spec.name.rpartition(".")[2]: spec.config.get("retention.ms") for spec in load_specs(specs_path(), "streamgr")
    }
    for topic, half in days.items():
        assert int(kept[topic] or 0) == 2 * int(half) * 86_400_000
    assert sorted(days) == ["events", "examples"]


def test_ages_leave_the_intervals_of_the_defaults_room() -> None:
    """A checkpoint or a pair of versions is late at ten times its interval, not at one."""
    expression = next(rule.expression for rule in ALERTS if rule.alert == "CheckpointOld")
    assert float(expression.rpartition(">")[2]) >= 10 * Trainer().checkpoint_seconds
    versions = next(rule.expression for rule in ALERTS if rule.alert == "ScorersDiverge")
    assert float(versions.rpartition(">")[2]) >= 10


def test_every_role_is_scraped_where_it_exports() -> None:
    scrape = {each["job_name"]: each for each in load(PROMETHEUS / "prometheus.yml")["scrape_configs"]}
    (found,) = scrape["streamgr"]["dns_sd_configs"]
    assert set(found["names"]) == metrics.ROLES
    assert found["port"] == 9464
    assert {"kafka", "prometheus"} <= scrape.keys()


def test_expressions_are_read_as_prometheus_reads_them() -> None:
    named = promql.read(
        'label_replace(sum by (le, x) (rate(a_bucket{le="1.0",b=~"c|d\\\\.e"}[5m:15s])) / on (y) group_left (z) '
        'f offset 5m > bool 1.5e3 and -up{job!="p"}, "hop", "v", "", "")'
    )
    assert [selector.name for selector in named.selectors] == ["a_bucket", "f", "up"]
    assert named.selectors[0].matchers == (("le", "=", "1.0"), ("b", "=~", "c|d\\.e"))
    assert named.selectors[2].matchers == (("job", "!=", "p"),)
    assert (named.grouped, named.made) == ({"le", "x", "y", "z"}, {"hop"})
    for wrong in ('{job="x"}', "a{b}", 'a{b="c"', "a ; b"):
        with pytest.raises(ValueError, match=r".+"):
            promql.read(wrong)


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("sum(streamgr_evnts_total)", "no such metric: streamgr_evnts_total"),
        ("streamgr_events", "no such metric: streamgr_events"),
        ('streamgr_events_total{type="click"}', "has no label type"),
        ('streamgr_deadletters_total{instance="a"} and sum by (kind) (streamgr_ready)', "the label kind"),
        ('streamgr_score_model_age_seconds_bucket{le="45.0"}', "no bucket up to 45.0"),
        ('streamgr_score_model_age_seconds_bucket{le="60"}', "no bucket up to 60"),
        ('streamgr_scores_total{outcome="overlaod"}', "never has outcome=overlaod"),
        ('streamgr_scores_total{outcome=~"error|overlaod"}', "never has outcome=overlaod"),
        ('streamgr_ready{role="scoring"}', "never has role=scoring"),
    ],
)
def test_what_does_not_exist_is_found(expression: str, complaint: str) -> None:
    assert any(complaint in found for found in metrics.complaints(expression, RECORDED))
