"""What a check is given, and how it says what it found."""

from collections.abc import Mapping
from dataclasses import dataclass

from streamgr.clock import Clock
from streamgr.config import Config
from streamgr.sanity import Finding


@dataclass(frozen=True, slots=True)
class Case:
    """An installation. origin: where each key that is not a default came from; urls: of roles to be asked."""

    config: Config
    origin: Mapping[str, str]
    environ: Mapping[str, str]
    clock: Clock
    urls: tuple[str, ...] = ()


def ok(check: str, what: str) -> Finding:
    """As it should be, or not to be looked at here."""
    return Finding("ok", check, what)


def warn(check: str, what: str, remedy: str) -> Finding:
    """It works, and will disappoint."""
    return Finding("warn", check, what, remedy)


def fail(check: str, what: str, remedy: str, exit_code: int) -> Finding:
    """It does not work. exit_code: what a role that meets it would leave with."""
    return Finding("fail", check, what, remedy, exit_code)


def age(seconds: float) -> str:
    """A length of time for people."""
    for unit, length in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
