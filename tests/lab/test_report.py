"""What the demo shows: the contract's object to the letter, and no number that is not known."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from streamgr.lab.report import Figures, line, screen, summary_json, summary_text
from streamgr.scrape import Metrics, events, quantile

FULL = Figures(
    seconds=35.0,
    events=11_900,
    targets_learned=9_000,
    weights_version=36,
    event_to_serving={"p50": 2.7, "p95": 4.6, "p99": 4.9},
    label_to_serving={"p50": 0.7, "p95": 1.7, "p99": 1.9},
    model_age={"p50": 1.3, "p99": 2.1},
    normalized_entropy={"continuous": 0.9, "frozen": 0.99, "popularity": 0.97, "oracle": math.nan},
    hit_rate={"continuous": 0.25, "frozen": 0.13, "popularity": None},
    slots=8192,
    used=230,
    admissions=230,
    rate=340.2,
    lag={"sequencer": 3.0, "trainer": None},
    frozen_version=14,
    learned_at_freeze=2_900,
    rankings={"scorer": 800, "slow": 0},
)

CONTRACT = {
    "seconds": None,
    "events": None,
    "events_per_second": None,
    "dead_letters": None,
    "targets_learned": None,
    "weights_version": None,
    "event_to_serving_seconds": ["p50", "p95", "p99"],
    "label_to_serving_seconds": ["p50", "p95", "p99"],
    "model_age_seconds": ["p50", "p99"],
    "normalized_entropy": ["continuous", "frozen", "popularity", "oracle"],
    "hit_rate_at_10": ["continuous", "frozen", "popularity"],
    "table": ["slots", "used", "admissions", "evictions"],
}


@pytest.mark.parametrize("figures", [FULL, Figures()])
def test_the_json_object_has_exactly_the_contracts_keys(figures: Figures) -> None:
    summary = json.loads(json.dumps(summary_json(figures), allow_nan=False))
    assert list(summary) == list(CONTRACT)
    for key, inner in CONTRACT.items():
        assert (list(summary[key]) if inner else inner) == inner


def test_what_is_not_known_is_null() -> None:
    summary = summary_json(FULL)
    assert summary["normalized_entropy"]["oracle"] is None and summary["hit_rate_at_10"]["popularity"] is None
    assert summary_json(Figures())["event_to_serving_seconds"] == {"p50": None, "p95": None, "p99": None}


def test_the_rate_is_of_the_whole_run() -> None:
    assert summary_json(FULL)["events_per_second"] == 340.0
    assert summary_json(Figures())["events_per_second"] == 0.0


@pytest.mark.parametrize("figures", [FULL, Figures()])
def test_the_texts_can_be_printed_with_and_without_figures(figures: Figures) -> None:
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(screen(figures, "title", "note"))
    shown = console.export_text() + summary_text(figures) + line(figures)
    assert "nan" not in shown and "None" not in shown
    assert "normalized entropy" in shown
    if figures is FULL:
        assert all(text in shown for text in ("version 36", "p50 2.7", "0.900", "scorer 800")) and "slow" not in shown


# -- percentiles and metrics

EXPOSED = """\
# TYPE streamgr_events counter
streamgr_events_total{kind="impression"} 100.0
streamgr_events_total{kind="click"} 20.0
streamgr_events_total{kind="heartbeat"} 999.0
streamgr_events_total{kind="erasure"} 1.0
# TYPE streamgr_wait_seconds histogram
streamgr_wait_seconds_bucket{le="1.0"} 0.0
streamgr_wait_seconds_bucket{le="2.0"} 50.0
streamgr_wait_seconds_bucket{le="4.0"} 100.0
streamgr_wait_seconds_bucket{le="+Inf"} 100.0
streamgr_wait_seconds_count 100.0
streamgr_wait_seconds_sum 200.0
"""


def test_metrics_are_summed_over_their_series() -> None:
    metrics = Metrics(EXPOSED)
    assert metrics.count("events_total") == 1120
    assert metrics.count("events_total", kind="click") == 20
    assert metrics.total("events_total", kind="like") is None and metrics.count("absent") == 0
    assert events(metrics) == 120, "heartbeats and erasures are no events"


def test_percentiles_are_linear_within_a_bucket() -> None:
    metrics = Metrics(EXPOSED)
    assert metrics.quantile("wait_seconds", 0.5) == 2.0
    assert metrics.quantile("wait_seconds", 0.25) == 1.5
    assert metrics.quantile("wait_seconds", 0.99) == pytest.approx(3.96)
    assert metrics.quantile("absent", 0.5) is None


def test_beyond_the_last_edge_is_the_last_edge() -> None:
    assert quantile({1.0: 0.0, 2.0: 1.0, math.inf: 10.0}, 0.9) == 2.0
    assert quantile({}, 0.5) is None and quantile({1.0: 0.0, math.inf: 0.0}, 0.5) is None


@given(
    st.lists(st.floats(0.01, 9.0), min_size=1, max_size=200),
    st.sampled_from([0.5, 0.95, 0.99]),
)
def test_a_percentile_lies_in_the_bucket_of_the_true_one(samples: list[float], q: float) -> None:
    edges = [0.5, 1.0, 2.0, 5.0, 10.0]
    buckets = {edge: float(sum(sample <= edge for sample in samples)) for edge in edges} | {math.inf: len(samples)}
    true = sorted(samples)[max(0, math.ceil(q * len(samples)) - 1)]
    found = quantile(buckets, q)
    high = next(edge for edge in edges if true <= edge)
    low = max((edge for edge in edges if edge < high), default=0.0)
    assert found is not None and low <= found <= high
