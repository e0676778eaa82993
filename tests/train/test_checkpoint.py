import errno
import os
from pathlib import Path

import pytest
import torch

from streamgr.clock import ManualClock
from streamgr.config import Telemetry
from streamgr.errors import ConfigError, DataError, StateNotWritable, TryAgain
from streamgr.telemetry import Log
from streamgr.train.checkpoint import Checkpoints, Facts, lock
from streamgr.train.lane import LaneState
from streamgr.train.steplog import Step, StepLog

MODEL = {"model": {"dim": 8}, "actions": ["click"]}


def facts(step: int) -> Facts:
    return Facts(
        step=step,
        watermark_ms=5,
        targets_learned=6,
        architecture=MODEL,
        seed=1,
        lanes={2: LaneState(next_offset=7, mark=(8, 9), fingerprint="f")},
        version=10,
        horizon_ms=11,
        log_bytes=12,
        written_ms=13,
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "c", Log("trainer", Telemetry(log_level="error"), ManualClock()))


def test_what_is_saved_comes_back_and_two_are_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in (1, 2, 10):
        oldest = checkpoints.save(facts(step), {"w": torch.full((2,), float(step))})
    assert oldest == 2
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["000000000002", "000000000010"]
    found = checkpoints.load(MODEL, 1)
    assert found is not None
    assert found[0] == facts(10)
    assert found[1]["w"].tolist() == [10, 10]


def test_the_same_step_again_removes_nothing_before_it_is_there(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(12):
        oldest = checkpoints.save(facts(7), {"w": torch.full((1,), float(n))})
    assert oldest == 7
    assert len(list((tmp_path / "c").iterdir())) == 2
    found = checkpoints.load(MODEL, 1)
    assert found is not None and found[1]["w"].tolist() == [11]
    with monkeypatch.context() as crash:
        crash.setattr(Path, "rename", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            checkpoints.save(facts(7), {"w": torch.zeros(1)})
    found = checkpoints.load(MODEL, 1)
    assert found is not None and found[1]["w"].tolist() == [11]


def test_nothing_saved_is_none(checkpoints: Checkpoints) -> None:
    assert checkpoints.load(MODEL, 1) is None


def test_another_model_is_refused_by_name(checkpoints: Checkpoints) -> None:
    checkpoints.save(facts(1), {})
    with pytest.raises(ConfigError, match=r"model.dim: 8 is not 16.*remedy: start with the settings"):
        checkpoints.load({"model": {"dim": 16}, "actions": ["click"]}, 1)
    with pytest.raises(ConfigError, match=r"trainer.seed: 1 is not 2"):
        checkpoints.load(MODEL, 2)


@pytest.mark.parametrize("name", ["tensors.safetensors", "checkpoint.json"])
def test_a_damaged_newest_is_passed_over(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:
    checkpoints.save(facts(1), {"w": torch.ones(3)})
    checkpoints.save(facts(2), {"w": torch.ones(3)})
    path = tmp_path / "c" / "000000000002" / name
    path.write_bytes(path.read_bytes()[:-1])
    found = checkpoints.load(MODEL, 1)
    assert found is not None
    assert found[0].step == 1
    path.parent.joinpath("../000000000001", name).write_bytes(b"")
    with pytest.raises(DataError, match="no checkpoint can be read"):
        checkpoints.load(MODEL, 1)


def test_a_newer_format_is_refused_not_passed_over(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(facts(1), {})
    checkpoints.save(facts(2), {})
    path = tmp_path / "c" / "000000000002" / "checkpoint.json"
    path.write_text('{"format": 99, "code": "7.0", "else": 1}')
    with pytest.raises(DataError, match=r"format 99.*7\.0"):
        checkpoints.load(MODEL, 1)


def test_a_half_written_one_does_not_exist(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(facts(1), {})
    (tmp_path / "c" / ".000000000002").mkdir()
    found = checkpoints.load(MODEL, 1)
    assert found is not None
    assert found[0].step == 1
    checkpoints.save(facts(3), {})
    assert not list((tmp_path / "c").glob(".*"))


def test_a_directory_belongs_to_one_trainer(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(TryAgain, match="another trainer holds the directory"):
        lock(tmp_path)
    lock(tmp_path).close()
    (tmp_path / "file").touch()
    with pytest.raises(StateNotWritable):
        lock(tmp_path / "file")


def test_the_step_log_survives_a_torn_line_and_names_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    steps = [Step(n, {0: (n, 0), 1: (7, n)}) for n in range(1, 6)]
    for step in steps:
        log.append(step)
    log.sync()
    log.close()
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[-1][:-3])
    again = StepLog(path)
    assert again.after(2) == steps[2:]
    again.append(Step(6, {}))
    again.forget(3)
    again.append(Step(7, {}))
    again.close()
    last = StepLog(path)
    assert [s.step for s in last.after(3)] == [4, 5, 6, 7]
    with pytest.raises(DataError, match="the steps after 2 are not all there"):
        last.after(2)
    last.close()
    path.write_bytes(b"nonsense\n")
    with pytest.raises(DataError, match="not a step log"):
        StepLog(path)


def test_a_disk_that_refuses_the_step_log_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = StepLog(tmp_path / "steps.jsonl")
    log.append(Step(1, {}))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateNotWritable, match=r"No space left.*remedy: free space"):
        log.sync()
    log.close()
