"""The command line: exit codes, help with an example, and no torch on the stream side."""

import argparse
import os
import subprocess
import sys

import pytest

from streamgr.cli import _parser, main


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("name", sorted(commands(_parser())))
def test_every_command_has_help_with_an_example(name: str) -> None:
    assert "example: streamgr " + name in commands(_parser())[name].format_help()


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["config", "check"], 0),
        (["config", "check", "--set", "scorer.port=x"], 78),
        (["config", "check", "--set", "scorer"], 2),
        (["config", "check", "--config", "absent.toml"], 78),
        (["sequences", "show", "u", "--url", "ftp://x"], 2),
    ],
)
def test_exit_codes(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    assert (code == 0) == (capsys.readouterr().err == "")


def test_a_wrong_command_is_usage() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["nonsense"])
    assert caught.value.code == 2


STREAM_SIDE = [
    "streamgr.cli", "streamgr.sequence.sequencer", "streamgr.sequence.follower", "streamgr.sequence.views",
    "streamgr.lab.produce", "streamgr.kafka.topics", "streamgr.monitor.monitor",
]  # fmt: skip


def test_the_stream_side_starts_without_torch() -> None:
    code = f"import sys\nfor m in {STREAM_SIDE!r}: __import__(m)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_command_without_its_extra_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; from streamgr.cli import main; sys.exit(main(['trainer']))"
    environment = os.environ | {"STREAMGR_TELEMETRY__PORT": "0"}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 78
    assert b"pip install 'streamgr[model]'" in done.stderr
