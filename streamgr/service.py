"""A role's life: start, turn the loop until told to stop, drain, leave.

The first SIGTERM or SIGINT only sets a flag: the loop finishes its batch, commits and closes. A second one exits at
once (130). SIGUSR1 prints every thread's stack.
"""

import faulthandler
import os
import signal
import threading
from types import FrameType


class Stop:
    """The flag a role's loop watches; waiting on it is how a loop sleeps."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but wake when told to stop; true when told."""
        return self._event.wait(seconds)

    def on_signals(self) -> "Stop":
        """Set the flag on the first SIGTERM or SIGINT; exit 130 on the second."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._event.is_set():
                os._exit(130)
            self._event.set()

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)
        faulthandler.register(signal.SIGUSR1)
        return self
