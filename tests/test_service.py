"""A role's life by signals, on a real process."""

import signal
import subprocess
import sys

ROLE = """
import sys
from streamgr.service import Stop
stop = Stop().on_signals()
print("up", flush=True)
while not stop.wait(30): pass
print("draining", flush=True)
if "slow" in sys.argv:
    import threading; threading.Event().wait(30)
"""


def start(*argv: str) -> "subprocess.Popen[str]":
    role = subprocess.Popen([sys.executable, "-c", ROLE, *argv], stdout=subprocess.PIPE, text=True)
    assert role.stdout is not None
    assert role.stdout.readline() == "up\n"
    return role


def test_the_first_signal_drains() -> None:
    with start() as role:
        role.send_signal(signal.SIGTERM)
        assert role.wait(10) == 0


def test_the_second_signal_leaves_at_once() -> None:
    with start("slow") as role:
        role.send_signal(signal.SIGTERM)
        assert role.stdout is not None
        assert role.stdout.readline() == "draining\n"
        role.send_signal(signal.SIGTERM)
        assert role.wait(10) == 130


SET_ANYWHERE = """
import sys
from streamgr.service import Stop
for place in range(60):
    stop, left = Stop(), [place]
    def handler(frame, event, argument):  # as a signal handler does, between any two steps
        left[0] -= 1
        if left[0] == 0:
            stop.set()
        return handler
    sys.settrace(handler)
    stop.wait(0.001)
    sys.settrace(None)
    stop.set()
    assert stop and stop.wait(0)
"""


def test_a_signal_in_the_middle_of_a_wait_is_no_deadlock() -> None:
    assert subprocess.run([sys.executable, "-c", SET_ANYWHERE], timeout=20, check=False).returncode == 0
