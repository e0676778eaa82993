"""Real logs through the real pipeline, where they are at hand: every event once, every target once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DATA = os.environ.get("STREAMGR_TEST_DATA", "")


@pytest.mark.skipif(not DATA, reason="no real logs: STREAMGR_TEST_DATA names no directory")
@pytest.mark.parametrize(
    ("log", "events", "targets"),
    [
        # a click row stands for an impression and a click: 9,801 impressions + 2 x 1,047 clicks
        ("ebnerd_slice/events.csv.gz", 11_895, {"impression": 10_848}),
    ],
)
def test_every_event_is_in_one_sequence_and_every_target_learned_once(
    kafka: str, prefix: str, log: str, events: int, targets: dict[str, int]
) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "streamgr", "evaluate", str(Path(DATA) / log), "--bootstrap", kafka, "--json",
            "--set", f"kafka.topic_prefix={prefix}", "--set", "sequence.history_length=64",
        ],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["events"], report["census"]["found"], report["census"]["exact"]) == (events, events, True)
    assert report["targets"] == targets
    assert report["targets_learned_once"]
    assert report["retrieval"]["impression"]["models"]["hstu"]["hit_rate_at_10"] > 0.1  # by chance: under .01
