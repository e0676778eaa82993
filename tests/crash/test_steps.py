"""The commit order, stopped at each of its numbered steps by the death of the process: nothing lost, nothing twice.

The storm kills at the same points, but at random; here each is sure to be reached, on a store that has work before and
after it.
"""

import itertools
import signal
from pathlib import Path

import pytest

from tests.crash import verdict
from tests.crash.feed import Stream
from tests.crash.hosts import CLOSING_MS, SETTINGS, Host
from tests.system import PARTITIONS

CHUNK = 800  # rows
STEPS = {
    1: ["after_apply"],
    2: ["in_produce", "before_confirm"],
    3: ["after_confirm"],
    4: ["before_write", "between_two_writes", "after_write"],
    5: ["after_sync"],
    6: ["before_report", "after_report"],
}
SECONDS = 60.0


def die(host: Host, point: str, role: list[str]) -> None:
    """One life of a sequencer, which must end at the point."""
    grave = host.directory / f"{point}.point"
    child = host.launch(host.directory / f"{point}.log", "--die-at", point, "--told", str(grave), role=role)
    assert child.wait(SECONDS) == -signal.SIGKILL, (host.directory / f"{point}.log").read_text()[-2_000:]
    assert grave.read_text() == point


@pytest.mark.parametrize("step", STEPS)
def test_a_death_at_each_step_leaves_no_trace(kafka: str, prefix: str, tmp_path: Path, step: int) -> None:
    host = Host(kafka, prefix, tmp_path, ["--session-seconds", "2"], **SETTINGS | {"state__sync_seconds": 0.0})
    host.command("topics", "apply")
    stream = Stream(step, PARTITIONS)
    rows = iter(stream)
    in_a_group = ["sequencer"] if step == 6 else ["sequencer", "--until-end"]  # only a group is told anything
    host.publish([*itertools.islice(rows, CHUNK)])
    host.command("sequencer", "--until-end")
    for point in STEPS[step]:
        host.publish([*itertools.islice(rows, CHUNK)])
        die(host, point, in_a_group)
    host.publish([*itertools.islice(rows, CHUNK), *stream.closing(2 * CLOSING_MS)])
    host.command("sequencer", "--until-end")
    export, _ = host.command("sequences", "export")
    counted, problems = verdict.judge(host, export)
    assert not problems, problems
    assert counted["targets"] > CHUNK
    assert counted["lost"] == counted["doubled"] == counted["targets_twice"] == counted["targets_missing"] == 0
