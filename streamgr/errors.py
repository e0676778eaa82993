"""Errors an operator can act on: what happened, where, and the remedy.

Every error that leaves a role derives from `StreamgrError`, whose class carries the exit code (sysexits, see
the README's table). Anything else that escapes is a bug and exits 1.
"""


class StreamgrError(Exception):
    """Base: `what` happened, `where` (topic[partition]@offset, file, version), and the `remedy`."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        parts = [f"{where}: {what}" if where else what]
        if remedy:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(parts))


class UsageError(StreamgrError):
    """The command line is wrong. Operator action: see `--help`."""

    exit_code = 2


class DataError(StreamgrError):
    """Bad data where none may be: a file, a digest, a stored format. Operator action: in the message."""

    exit_code = 65


class Damaged(DataError):
    """A store's files are not what was written to them. Operator action: the one remedy below."""

    def __init__(self, what: str, *, where: str = "") -> None:
        remedy = "start the role again: it sets the store aside and rebuilds it from a snapshot or from the log"
        super().__init__(what, where=where, remedy=remedy)


class OutputsMissing(DataError):
    """An example names a predecessor that was never seen: outputs are gone or retention has passed.

    Operator action: restore the examples, or start a new training lineage from the newest snapshot.
    """


class RetentionPassed(DataError):
    """The log no longer holds the position we must go on from.

    Operator action: restore a state snapshot, or rebuild and accept the loss.
    """


class BrokerUnreachable(StreamgrError):
    """A one-shot command could not reach the broker. Operator action: check `kafka.bootstrap`."""

    exit_code = 69


class StateNotWritable(StreamgrError):
    """The state directory cannot be written (full, read-only, damaged). Operator action: in the message."""

    exit_code = 73


class TryAgain(StreamgrError):
    """Somebody else holds what we need (a lock, an epoch). Operator action: start again later."""

    exit_code = 75


class ConfigError(StreamgrError):
    """The configuration is wrong or does not fit what is stored. Operator action: in the message."""

    exit_code = 78
