"""The demo's processes: started with their own log files, watched, and ended together.

Each child leads its own process group, so a terminal's Ctrl-C reaches only the demo, which lets them drain in order;
and each dies with the demo, even by SIGKILL (`kafka.embedded.DIE_WITH_PARENT`): start them from the main thread.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from streamgr.clock import Clock, Deadline
from streamgr.errors import StreamgrError
from streamgr.kafka.embedded import DIE_WITH_PARENT

TAIL_LINES = 15


class ChildFailed(StreamgrError):
    """A process of the demo ended by itself. Operator action: the tail of its log says why."""


class Child:
    """One process and its log file."""

    def __init__(
        self, name: str, arguments: list[str], directory: Path, environ: Mapping[str, str], *, is_role: bool
    ) -> None:
        """Run `python ARGUMENTS`; stdout and stderr go to `<directory>/<name>.log`. A role never ends by itself."""
        self.name, self.is_role, self.log = name, is_role, directory / f"{name}.log"
        self.told = False  # to stop: however it ends now is no failure
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), sys.executable, *arguments],
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def tell(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Tell it, and whatever it has started, to stop."""
        if self.exit_code is None:
            self.told = True
            os.killpg(self._process.pid, number)

    def stop(self, deadline: Deadline) -> bool:
        """Tell it to stop and wait; false where it had to be killed."""
        self.tell()
        return self.wait(deadline)

    def wait(self, deadline: Deadline) -> bool:
        """Wait until it has ended; false where it had to be killed."""
        try:
            self._process.wait(max(0.05, deadline.remaining()))
        except subprocess.TimeoutExpired:
            self.tell(signal.SIGKILL)
            self._process.wait()
            return False
        return True


class Children:
    """All of them; leaving the context ends what still runs."""

    STOP_SECONDS = 4.0

    def __init__(self, directory: Path, clock: Clock, environ: Mapping[str, str]) -> None:
        self._directory, self._clock = directory, clock
        # what the demo has decided is in the files it writes; a variable would win over them
        self._environ = {name: value for name, value in environ.items() if not name.startswith("STREAMGR_")}
        self._environ["TMPDIR"] = str(directory)  # whatever they leave behind goes with it
        self._all: list[Child] = []

    def start(self, name: str, *arguments: str, is_role: bool) -> Child:
        child = Child(name, list(arguments), self._directory, self._environ, is_role=is_role)
        self._all.append(child)
        return child

    def check(self) -> None:
        """Raise `ChildFailed` with the tail of its log if one has failed, or a role has left unasked."""
        for child in self._all:
            if not child.told and (child.exit_code or (child.exit_code == 0 and child.is_role)):
                raise ChildFailed(
                    f"the {child.name} ended with exit code {child.exit_code}; its last words:\n{child.tail()}"
                )

    def stop(self, seconds: float) -> list[str]:
        """SIGTERM to all, `seconds` to drain, then SIGKILL; the names of those that had to be killed."""
        deadline = Deadline(self._clock, seconds)
        running = [child for child in self._all if child.exit_code is None]
        for child in running:
            child.tell()
        return [child.name for child in running if not child.wait(deadline)]

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(self.STOP_SECONDS)
