"""What an operator does to go from one version to another: `streamgr doctor --upgrade-from X`.

UPGRADING.md has the reasons, and the formats that decide it. A step stands under the version that asks for it.
"""

import re

from streamgr import __version__
from streamgr.errors import UsageError

BEFORE = (
    "run `streamgr doctor` with the old version: it must end with 0",
    "keep a way back: `streamgr state backup DIR` of stopped roles, or snapshots; a copy of the trainer's directory; "
    "the old image's tag",
)
STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "0.2.0",
        (
            "stop all roles: stores have schema 2, manifests and checkpoints format 2, examples emission 2; what 0.1 "
            "wrote is not read",
            "keep the topic streamgr.events; delete the other topics of the prefix with Kafka's own tool",
            "remove <state.directory> of every role, and the contents of state.snapshots_directory",
            "rename sequence.cached_users to sequence.cached_events, and make table.bucket_width a multiple of 8",
            "`streamgr topics apply`; then everything is made again from the events",
        ),
    ),
)
AFTER = (
    "`streamgr config check` and `streamgr topics check` with the new version, before anything is started",
    "start readers before writers: scorers, then sequencers one by one, then the trainer",
    "`streamgr doctor --url …` for each role with the new version: it must end with 0",
    "to go back: stop the roles, put the copies back, start the old image; what it cannot read it refuses by name (65)",
)


def steps(since: str) -> list[str]:
    """In order, from version `since` to this one. Raises `UsageError` for what is no version, or a newer one."""
    old, new = _numbers(since), max(_numbers(__version__), _numbers(STEPS[-1][0]))
    if old > new:
        raise UsageError(f"{since} is newer than this version, {__version__}", remedy="run the doctor of the newer one")
    return [*BEFORE, *(step for version, asked in STEPS if _numbers(version) > old for step in asked), *AFTER]


def _numbers(version: str) -> tuple[int, ...]:
    found = re.fullmatch(r"v?(\d+)\.(\d+)(?:\.(\d+))?\S*", version)
    if not found:
        raise UsageError(f"{version!r} is no version", remedy="give it as 0.1.0")
    return tuple(int(part or 0) for part in found.groups())
