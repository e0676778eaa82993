"""A role's life: start, turn the loop until told to stop, drain, leave.

The first SIGTERM or SIGINT only sets a flag: the loop finishes its batch, commits and closes. A second one exits at
once (130). SIGUSR1 prints every thread's stack.
"""

import faulthandler
import gc
import os
import signal
import threading
from types import FrameType


class Stop:
    """The flag a role's loop watches; waiting on it is how a loop sleeps.

    Not a `threading.Event`: a signal's handler runs between any two steps of the main thread, and where that thread
    holds the event's inner lock, in the middle of `wait`, setting it there never returns. Here the handler takes no
    lock: it opens a gate, a lock that is held from the start, through which every waiter passes in turn.
    """

    def __init__(self) -> None:
        self._told = False
        self._gate = threading.Lock()
        self._gate.acquire()
        self._closed = [self._gate]  # popping is atomic: only one of those who open it does

    def __bool__(self) -> bool:
        return self._told

    def set(self) -> None:
        self._told = True
        try:
            gate = self._closed.pop()
        except IndexError:  # told before
            return
        gate.release()

    def wait(self, seconds: float) -> bool:
        """Sleep, but wake when told to stop; true when told."""
        if not self._told and self._gate.acquire(timeout=max(0.0, seconds)):
            self._gate.release()
        return self._told

    def on_signals(self) -> "Stop":
        """Set the flag on the first SIGTERM or SIGINT; exit 130 on the second."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._told:
                os._exit(130)
            self.set()

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)
        faulthandler.register(signal.SIGUSR1)
        return self


def calm_collector() -> None:
    """Let Python look for reference cycles rarely: what a stream allocates, none of it in cycles, would set it off all
    the time (a sixth of the sequencer's work). What is alive now is never looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
