"""`streamgr evaluate`, the whole of it, on a small log and a real Kafka."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = [
    "sequence.attribution_window_seconds=2.0", "sequence.lateness_seconds=1.0", "sequence.close_step_seconds=0.5",
    "sequence.history_length=16", "model.dim=8", "model.layers=1", "model.negatives=8", "table.slots=1024",
    "trainer.threads=1", "trainer.batch_tokens=1024",
]  # fmt: skip


def small_log(path: Path) -> Path:
    """120 users' lists of three, one of them clicked and some clicks followed by a comment."""
    rows = []
    for n in range(120):
        at, user = 1_700_000_000_000 + n * 1_000, f"u{n % 12}"
        common = {"user_id": user, "request_id": n, "event_time": at}
        rows += [{"type": "impression", "item_id": f"i{(n + k) % 9}", **common} for k in range(3)]
        rows.append({"type": "click", "item_id": f"i{n % 9}", **common, "event_time": at + 500})
        if n % 4 == 0:
            rows.append({"type": "comment", "item_id": f"i{n % 5}", "user_id": user, "event_time": at + 800})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(*argv: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "KAFKA_HOME"}
    command = [sys.executable, "-m", "streamgr", "evaluate", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == code, done.stderr[-4000:]
    return done


def test_a_log_through_the_real_pipeline(kafka: str, prefix: str, tmp_path: Path) -> None:
    log = small_log(tmp_path / "log.jsonl")
    done = evaluate(
        str(log), "--bootstrap", kafka, "--json", "--set", f"kafka.topic_prefix={prefix}",
        *(part for key in SETTINGS for part in ("--set", key)),
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["events"] == 120 * 4 + 30
    assert report["census"]["exact"]
    assert (report["census"]["expected"], report["census"]["found"], report["census"]["users"]) == (510, 510, 12)
    assert report["actions"] == ["click", "like", "comment"]
    assert report["targets"]["impression"] == 360  # every label is closed
    assert report["targets_learned_once"]
    click = report["ranking"]["click"]
    assert (click["targets"], click["base_rate"]) == (360, pytest.approx(1 / 3))
    for model in ("hstu", "popularity"):
        assert 0.3 < click["models"][model]["normalized_entropy"] < 3
    retrieval = report["retrieval"]
    assert set(retrieval["any"]["models"]) == {"hstu", "popularity", "popularity-1h", "recency", "recency-global"}
    assert retrieval["impression"]["models"]["popularity"]["hit_rate_at_10"] > 0.9  # there are nine items
    assert "every event in exactly one sequence" in done.stderr


def test_unknown_models_and_too_much_for_the_mock_are_refused_at_once(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log.jsonl")
    refused = evaluate(str(log), "--models", "hstu,oracle", code=2)
    assert "known: hstu, popularity, popularity-1h, " in refused.stderr
    log.write_text(log.read_text() * 5)
    assert "KAFKA_HOME" in evaluate(str(log), code=78).stderr
