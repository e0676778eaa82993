"""A trainer that is killed at the points of its life: the same bits as one that never was; and the check can fail.

The long one, with every point, is a command's: `make crash-test-trainer N=100`.
"""

from dataclasses import replace
from pathlib import Path

from tests.crash.ordeal import Ordeal, Plan

POINTS = (
    "in_recovery",
    "mid_append",
    "after_append",
    "in_learning",
    "after_cut",
    "between_chunks",
    "in_manifest",
    "after_manifest",
    "mid_tensors",
    "after_rename",
    "mid_removal",
    "before_replace",
)
BRISK = Plan(points=POINTS, seed=3)


def test_a_trainer_killed_at_any_point_learns_the_same_bits(kafka: str, tmp_path: Path) -> None:
    result = Ordeal(BRISK, tmp_path, kafka).run()
    assert result["exact"], result["problems"]
    assert result["points"] == dict.fromkeys(sorted(POINTS), 1)
    assert result["targets_twice"] == result["targets_missing"] == result["versions_different"] == 0
    assert result["versions_compared"] == result["versions"] > len(POINTS)
    assert result["targets"] > 1_000 and result["steps"] > 200
    assert result["power_failures"] > 3 and result["bytes_lost"] > 0, "no loss of power has cost anything"
    assert result["evictions"] > 50 and result["slots"] == 64, "the table has neither evicted nor grown"


def test_a_version_of_steps_that_are_not_durable_is_found_out(kafka: str, tmp_path: Path) -> None:
    """What was published is lost with the machine, and formed anew in other steps."""
    points = ("after_manifest", "after_noted")
    result = Ordeal(replace(BRISK, points=points, power=1.0, control="unsynced"), tmp_path, kafka).run()
    assert not result["exact"]
    assert result["targets_twice"] == result["targets_missing"] == 0, "by targets alone it would have passed"
