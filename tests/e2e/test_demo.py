"""`streamgr demo --json`: the contract's object, on both brokers, and nothing left behind."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SHAPE = {
    "seconds": float,
    "events": int,
    "events_per_second": float,
    "dead_letters": int,
    "targets_learned": int,
    "weights_version": int,
    "event_to_serving_seconds": {"p50", "p95", "p99"},
    "label_to_serving_seconds": {"p50", "p95", "p99"},
    "model_age_seconds": {"p50", "p99"},
    "normalized_entropy": {"continuous", "frozen", "popularity", "oracle"},
    "hit_rate_at_10": {"continuous", "frozen", "popularity"},
    "table": {"slots", "used", "admissions", "evictions"},
}


@pytest.mark.parametrize("broker", ["kafka", "mock"])
def test_the_demo_ends_with_its_summary(broker: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    if broker == "mock":
        environment.pop("KAFKA_HOME", None)
    elif "KAFKA_HOME" not in environment:
        pytest.skip("no KAFKA_HOME: the embedded broker would be the mock")
    assert tempfile.gettempdir()
    done = subprocess.run(
        [sys.executable, "-m", "streamgr", "demo", "--seconds", "20", "--json"],
        check=False, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert "live page: http://" in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary.keys() == SHAPE.keys()
    for key, shape in SHAPE.items():
        if isinstance(shape, set):
            assert summary[key].keys() == shape
        else:
            assert isinstance(summary[key], (int, float) if shape is float else int)
    assert summary["events"] > 0
    assert summary["targets_learned"] > 0
    assert summary["dead_letters"] == 0
    assert summary["event_to_serving_seconds"]["p50"] > 1.5, "the window is part of it"
    assert not list(tmp_path.iterdir()), "temporary files left behind"
