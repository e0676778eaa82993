"""Files cut off or changed at any byte: what comes back is what was written, or an error with a name.

A crash may take what was not synced from a file's end, and nothing else; a disk may do worse. `whole` is what a reader
must come to after the first, and may come to or refuse by name after the second. There is no third.
"""

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgr.clock import ManualClock
from streamgr.config import Telemetry
from streamgr.errors import DataError
from streamgr.telemetry import Log
from streamgr.train.checkpoint import Checkpoints, Facts
from streamgr.train.lane import LaneState
from streamgr.train.steplog import Step, StepLog

MODEL = {"model": {"dim": 8}, "actions": ["click"]}
OLDER, NEWER, LAST = 3, 6, 9  # steps: of the two checkpoints, of the step log
STEPS = [Step(n, {0: (11 * n, 0), 1: (1_000 + n, n % 3)}) for n in range(1, LAST + 1)]
DEEP = b'{"format":' + b"[" * 100_000
Damage = Callable[[bytes], bytes]


def facts(step: int) -> Facts:
    return Facts(
        step=step,
        watermark_ms=1_000 * step,
        targets_learned=6 * step,
        architecture=MODEL,
        seed=1,
        lanes={p: LaneState(next_offset=20 * step, mark=end) for p, end in STEPS[step - 1].ends.items()},
        version=step,
        horizon_ms=11,
        log_bytes=12,
        written_ms=13,
    )


def tensors(step: int) -> dict[str, Tensor]:
    return {"table/weight": torch.arange(8.0) + step, "adamw/step/heads": torch.tensor(float(step))}


def checkpoints(state: Path) -> Checkpoints:
    return Checkpoints(state / "checkpoints", Log("trainer", Telemetry(log_level="error"), ManualClock()))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trainer's state: checkpoints of steps 3 and 6, the steps 4 to 9."""
    state = tmp_path_factory.mktemp("state")
    log = StepLog(state / "steps.jsonl")
    for step in STEPS:
        log.append(step)
        if step.step in (OLDER, NEWER):
            log.forget(checkpoints(state).save(facts(step.step), tensors(step.step)))
    log.sync()
    log.close()
    return state


def recovered(state: Path) -> tuple[int, list[Step]]:
    """What a trainer starts from: the checkpoint's step and the steps after it. Raises `DataError`."""
    found = checkpoints(state).load(MODEL, 1)
    assert found is not None
    step = found[0].step
    assert found[0] == facts(step)
    assert found[1].keys() == tensors(step).keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in tensors(step).items())
    log = StepLog(state / "steps.jsonl")
    try:
        return step, log.after(step)
    finally:
        log.close()


def damaged(written: Path, name: str, damage: Damage) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        state = Path(shutil.copytree(written, Path(directory) / "state"))
        path = state / name
        path.write_bytes(damage(path.read_bytes()))
        yield state


def flip(at: float, bit: int) -> Damage:
    def apply(data: bytes) -> bytes:
        place = int(at * len(data))
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    return apply


def garble(at: float, seed: int, length: int) -> Damage:
    def apply(data: bytes) -> bytes:
        place = int(at * len(data))
        return data[:place] + random.Random(seed).randbytes(length) + data[place + length :]

    return apply


SHARE = st.floats(0, 1, exclude_max=True)
DAMAGES = st.one_of(
    st.builds(lambda at: lambda data: data[: int(at * len(data))], SHARE),
    st.builds(flip, SHARE, st.integers(0, 7)),
    st.builds(garble, SHARE, st.integers(0, 1 << 16), st.integers(1, 40)),
    st.binary(max_size=60).map(lambda garbage: lambda _: garbage),
    st.just(lambda _: DEEP),
    st.just(lambda _: b'{"format":2,"code":"\xff"'),
)
NAMES = st.sampled_from(["checkpoint.json", "tensors.safetensors"])


def test_undamaged_it_is_the_newest(written: Path) -> None:
    assert recovered(written) == (NEWER, STEPS[NEWER:])


@settings(max_examples=150, deadline=None)
@given(name=NAMES, damage=DAMAGES)
def test_a_damaged_newest_checkpoint_costs_time_and_no_step(written: Path, name: str, damage: Damage) -> None:
    for state in damaged(written, f"checkpoints/{NEWER:012d}/{name}", damage):
        original = (written / f"checkpoints/{NEWER:012d}/{name}").read_bytes()
        if damage(original) == original:
            continue
        try:
            step, steps = recovered(state)
        except DataError as error:
            assert "format" in error.what, error  # of another version, by its own word
            continue
        assert (step, steps) in [(OLDER, STEPS[OLDER:]), (NEWER, STEPS[NEWER:])]
        if step == NEWER:
            same_but_for_its_code(state, written)


def same_but_for_its_code(state: Path, written: Path) -> None:
    """Of all bytes, only those that say which version of the code wrote a checkpoint may differ unseen."""
    mine, theirs = (
        msgspec.json.decode((at / f"checkpoints/{NEWER:012d}/checkpoint.json").read_bytes()) for at in (state, written)
    )
    assert mine | {"code": ""} == theirs | {"code": ""}


@settings(max_examples=150, deadline=None)
@given(damage=DAMAGES)
@example(damage=lambda data: data[:-1] + b"x")
@example(damage=lambda data: b"\n" + data)
@example(damage=lambda data: data[:-1])
def test_a_damaged_step_log_is_refused_or_ends_sooner(written: Path, damage: Damage) -> None:
    """It ends sooner exactly if bytes are gone from its end; then the steps that are left are those that were taken."""
    original = (written / "steps.jsonl").read_bytes()
    data = damage(original)
    for state in damaged(written, "steps.jsonl", damage):
        try:
            step, steps = recovered(state)
        except DataError:
            continue
        assert step == NEWER
        assert steps == STEPS[NEWER : NEWER + len(steps)]
        whole = len(original[: len(data)].splitlines(keepends=True)) - (not original[: len(data)].endswith(b"\n"))
        assert len(steps) == max(0, whole - (NEWER - OLDER)), data


def test_a_crash_at_any_byte_of_the_last_line_leaves_the_steps_before_it(written: Path) -> None:
    """Every prefix of a line that a killed process was writing."""
    original = (written / "steps.jsonl").read_bytes()
    last = original.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(last, len(original)):
        for state in damaged(written, "steps.jsonl", lambda data, end=end: data[:end]):
            assert recovered(state) == (NEWER, STEPS[NEWER:-1])
            log = StepLog(state / "steps.jsonl")
            log.append(STEPS[-1])  # formed anew
            log.close()
            assert recovered(state) == (NEWER, STEPS[NEWER:])
