"""Commands from outside: what is backed up comes back, and a bug is 1 and nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.ops.test_drain import SETTINGS, rows
from tests.system import PARTITIONS, System


def test_what_is_backed_up_comes_back_whole(kafka: str, prefix: str, tmp_path: Path) -> None:
    log, backup = tmp_path / "log.jsonl", tmp_path / "backup"
    log.write_text(rows(200))
    with System(kafka, prefix, tmp_path, **SETTINGS) as system:
        system.run("topics", "apply")
        system.run("produce", str(log), "--close")
        system.run("sequencer", "--until-end")
        before = system.run("sequences", "export")
        assert len(before.splitlines()) == 50
        assert len(system.run("state", "backup", str(backup)).splitlines()) == PARTITIONS
        shutil.rmtree(system.state)
        system.run("sequences", "export", code=65)
        restored = [json.loads(line) for line in system.run("state", "restore", str(backup)).splitlines()]
        assert [row["refused"] for row in restored] == [[]] * PARTITIONS
        assert system.run("sequences", "export") == before
        assert all(json.loads(line)["ok"] for line in system.run("state", "verify").splitlines())
        examples = list(system.examples())
        system.run("sequencer", "--until-end")  # goes on where the backup was: nothing is emitted again
        assert system.run("sequences", "export") == before
        assert list(system.examples()) == examples
        system.run("state", "restore", str(backup), code=73)


def test_a_bug_is_1(tmp_path: Path) -> None:
    code = "import sys, streamgr.cli as cli\ncli.flatten = lambda config: 1 / 0\nsys.exit(cli.main(['config', 'show']))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, check=False, timeout=60)
    assert done.returncode == 1
    assert b"ZeroDivisionError" in done.stderr
