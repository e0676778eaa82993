"""The crash storm in short: exact after every kind of death; and the check that it could have found otherwise.

The long ones are a command's: `make crash-test N=100`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.crash.hosts import Broker
from tests.crash.storm import KINDS, Plan, Storm, controlled

Json = dict[str, Any]
POINTS = ("in_produce", "before_confirm", "between_two_writes", "after_write", "in_assign", "mid_snapshot")
BRISK = Plan(kills=8, seconds=120.0, rate=600.0, session_seconds=2.0, pause=(0.3, 1.2), armed=0.8, points=POINTS)


def assert_exact(result: Json) -> None:
    assert result["exact"], result["problems"]
    wrong = ("lost", "doubled", "targets_twice", "targets_missing", "gaps", "contradictions", "came_after_the_end")
    assert not any(result[what] for what in wrong), result


def test_a_storm_leaves_no_trace(kafka_home: Path, tmp_path: Path) -> None:
    with Broker(tmp_path / "kafka", kafka_home) as broker:
        result = Storm(BRISK, tmp_path, broker.bootstrap, broker).run()
    assert_exact(result)
    assert result["deaths"] >= BRISK.kills
    assert all(result["kills"][kind] for kind in KINDS), result["kills"]
    assert result["restarts"] and result["bad_records"] and result["dead_letters"]
    assert result["targets"] > 2_000 and result["users"] > 50


def test_progress_kept_by_the_group_is_found_out(kafka: str, tmp_path: Path) -> None:
    """The usual wrong way: what was written before the group was told is applied again."""
    result = Storm(controlled("kafka-offsets", BRISK), tmp_path, kafka, None).run()
    assert result["doubled"] > 0
    assert not result["exact"]


def test_workers_that_come_and_go_lose_and_double_nothing(kafka: str, tmp_path: Path) -> None:
    """A rebalance storm of workers that would not know an event again: only where the offset is kept saves them."""
    plan = replace(BRISK, kills=0, seconds=20.0, pause=(0.5, 2.0), kinds=("term",), control="store-offsets")
    result = Storm(plan, tmp_path, kafka, None).run()
    assert_exact(result)
    assert result["kills"]["term"] > 5
