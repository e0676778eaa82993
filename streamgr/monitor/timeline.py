"""The weights' history as the manifests tell it: versions with their sizes, pins, and changes of the trainer.

Pure: entries of the manifests log in, in log order; what the page shows out. The topic is compacted and bounded, so it
is read whole at each start and nothing of it has to be kept anywhere else.
"""

from dataclasses import dataclass
from typing import Any

from streamgr.weights.log import Entry
from streamgr.weights.manifest import ClaimRecord, Manifest, PinRecord, Rejected, Unpinned

SHOWN_VERSIONS, SHOWN_MARKS = 60, 12
WHY_LETTERS = 120


@dataclass(frozen=True, slots=True)
class Version:
    """What the page shows of a manifest. `fenced`: a later trainer had claimed the log before it."""

    version: int
    epoch: int
    kind: str
    bytes: int
    published_ms: int
    horizon_ms: int
    fenced: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to the versions: "pin" (a rollback is one), "unpin", "claim"; `version` 0 if none."""

    kind: str
    at_ms: int
    version: int = 0
    why: str = ""


class Timeline:
    """`take` what the log holds."""

    def __init__(self) -> None:
        self._versions: list[Version] = []
        self._marks: list[Mark] = []
        self._epoch = -1
        self.published = self.rejected = 0
        self.pinned = 0  # the version that scorers are held at; 0: none

    def take(self, entry: Entry, now_ms: int) -> None:
        """The next entry; `now_ms` dates what carries no time of its own."""
        match entry.content:
            case Manifest() as m:
                self._epoch, fenced = max(self._epoch, m.epoch), m.epoch < self._epoch
                self.published += 1
                self._versions.append(
                    Version(m.version, m.epoch, m.kind, m.bytes, m.published_ms, m.horizon_ms, fenced)
                )
                self._versions = self._versions[-SHOWN_VERSIONS:]
            case ClaimRecord() as claim:
                self._epoch = entry.offset
                self._mark(Mark("claim", claim.claimed_ms, claim.last_version))
            case PinRecord() as pin:
                self.pinned = pin.version
                self._mark(Mark("pin", pin.pinned_ms, pin.version, pin.why[:WHY_LETTERS]))
            case Unpinned():
                if self.pinned:
                    self._mark(Mark("unpin", now_ms, self.pinned))
                self.pinned = 0
            case Rejected():
                self.rejected += 1

    def _mark(self, mark: Mark) -> None:
        self._marks = [*self._marks, mark][-SHOWN_MARKS:]

    def show(self) -> dict[str, Any]:
        """Oldest first; an empty history where nothing was published yet."""
        return {
            "newest": self._versions[-1].version if self._versions else None,
            "pinned": self.pinned or None,
            "unreadable": self.rejected,
            "versions": [
                {
                    "version": v.version,
                    "kind": v.kind,
                    "bytes": v.bytes,
                    "published_ms": v.published_ms,
                    "fenced": v.fenced,
                }
                for v in self._versions
            ],
            "marks": [{"kind": m.kind, "at_ms": m.at_ms, "version": m.version, "why": m.why} for m in self._marks],
        }
