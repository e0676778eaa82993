"""`streamgr doctor`: everything an operator can get wrong, a line and a remedy each.

It changes nothing: stores are opened read-only beside their owners, and no topic of ours is written to. The lists below
are what is looked at, in the order in which it must be put right; a check is a function from a `Case` to findings, and
an error that it meets is a finding too. On an installation without torch the model's checks say so and pass.
"""

from collections.abc import Callable, Iterable, Iterator

from streamgr.doctor import broker, machine, model, roles, stores
from streamgr.doctor.case import Case
from streamgr.errors import StreamgrError
from streamgr.sanity import Finding

Check = Callable[[Case], Iterable[Finding]]

HERE: tuple[tuple[str, Check], ...] = (
    ("installation", machine.installation),
    ("configuration", machine.configuration),
    ("secrets", machine.secrets),
    ("directories", machine.directories),
    ("disk", machine.disk),
    ("open files", machine.open_files),
    ("stores", stores.stores),
    ("checkpoints", stores.checkpoints),
    ("torch", model.torch_and_device),
    ("attention", model.attention),
)
BROKER: tuple[tuple[str, Check], ...] = (("broker", broker.reached), ("topics", broker.present))
THERE: tuple[tuple[str, Check], ...] = (
    ("topics", broker.topics),
    ("broker version", broker.version),
    ("clock", broker.clock),
    ("snapshots", broker.snapshots),
    ("retention", broker.retention),
    ("lag", broker.lag),
    ("trainer", model.claims),
    ("weights", model.weights),
)
ROLES: tuple[tuple[str, Check], ...] = (("roles", roles.roles),)


def examine(case: Case) -> Iterator[Finding]:
    """Every finding, as it is found.

    What needs the broker is left out, and said to be, where it is not reached or has not our topics.
    """
    yield from _each(HERE, case)
    for finding in _each(BROKER, case):
        yield finding
        if finding.level == "fail":
            left_out = ", ".join(name for name, _ in THERE)
            yield Finding("warn", finding.check, f"not looked at therefore: {left_out}", "run the doctor again then")
            break
    else:
        yield from _each(THERE, case)
    yield from _each(ROLES, case)


def exit_code(findings: Iterable[Finding]) -> int:
    """Of a command that found these: of the first failure, for it is the first to be put right; 0 where there is none.

    Warnings are no failure.
    """
    return next((finding.exit_code for finding in findings if finding.level == "fail"), 0)


def _each(checks: Iterable[tuple[str, Check]], case: Case) -> Iterator[Finding]:
    for name, check in checks:
        try:
            yield from check(case)
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "safetensors", "triton"):
                raise
            yield Finding("ok", name, f"skipped: no {error.name} here")
        except StreamgrError as error:
            what = f"{error.where}: {error.what}" if error.where else error.what
            yield Finding("fail", name, what, error.remedy, error.exit_code)
