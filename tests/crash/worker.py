"""A real role with a wish to die: patches methods from outside, then runs `streamgr.cli.main`.

    python -m tests.crash.worker --die-at after_write:3 --told FILE sequencer

kills itself (SIGKILL) at the third passage of the point, having written its name into FILE. The points are the steps of
the commit order (`streamgr.sequence.sequencer`) and what surrounds them; production code has no hooks for tests.

It dies with the process that started it. `--session-seconds` shortens the group's session timeout, so that a storm does
not spend its time waiting for the group to miss the dead. `--linger-seconds` has outputs wait before they are sent, as
with a slow broker: who commits before they are confirmed loses them. Controls break what the exactness rests on:

    store-offsets   events have no identity (each gets an id of its own when it is decoded), so that a record applied
                    twice leaves two rows; progress is the store's, as it should be
    kafka-offsets   the same, and progress is the group's: committed after the write, and gone on from when a partition
                    is assigned
    unconfirmed     nothing is waited for before it is written
"""

import argparse
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from secrets import token_hex
from typing import Any

import confluent_kafka
import msgspec
from confluent_kafka import TopicPartition

from streamgr import cli
from streamgr.decoder import Decoder
from streamgr.events import Event, Records
from streamgr.kafka import consumer, producer
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.producer import Producer
from streamgr.sequence.opening import Opened, Opener
from streamgr.sequence.partition import Partition
from streamgr.sequence.sequencer import ROLE, Sequencer
from streamgr.state import snapshot
from streamgr.state.store import Store

POINTS = (
    "after_apply",  # step 1 done: the batch is in memory, its outputs are queued
    "in_produce",  # the broker has some of a batch's outputs, the others were never sent
    "before_confirm",
    "after_confirm",
    "before_write",
    "between_two_writes",  # of one commit's partitions, some are written
    "after_write",
    "after_sync",  # of the first of the partitions
    "before_report",
    "after_report",
    "in_assign",  # the group has just given it partitions
    "after_open",  # the first of them is open, and not read yet
    "in_revoke",  # what they have is neither confirmed nor written
    "in_revoke_written",  # written, the stores still open, the revocation not acknowledged to the group
    "after_checkpoint",  # nobody has published it yet
    "mid_snapshot",  # a file is copied and not yet under its name
    "before_manifest",  # all files are there
    "after_manifest",  # published; what is no longer needed is still there
    "mid_restore",  # a snapshot's file is copied, the store is not there yet
)
PR_SET_PDEATHSIG = 1
MARK = "#"  # sorts before whatever an id may hold here; what follows it makes the id unique
Hook = Callable[..., object]


def around(owner: Any, name: str, *, before: Hook | None = None, after: Hook | None = None) -> None:
    """Have `before` and `after` called with the arguments of the owner's function."""
    original = getattr(owner, name)

    @wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        result = original(*args, **kwargs)
        if after is not None:
            after(*args)
        return result

    setattr(owner, name, patched)


class Death:
    """Waits at one point for the N-th passage."""

    def __init__(self, point: str, passages: int, told: Path | None) -> None:
        self._point, self._left, self._told = point, passages, told
        self._batch: int | None = None  # examples of the batch that is being applied
        self._writes = 0  # of the commit, or of the revocation
        self._revoking = False

    def install(self) -> None:
        """Patch whatever leads past a point."""
        around(Partition, "apply", before=self._applying, after=self._applied)
        around(Producer, "send", after=self._sent)
        around(Sequencer, "_confirm", before=self.at("before_confirm"), after=self.at("after_confirm"))
        around(Sequencer, "_commit", before=self._none_written)
        around(Store, "write", before=self._writing, after=self._written)
        around(Store, "sync", after=self.at("after_sync"))
        around(Consumer, "commit", before=self.at("before_report"), after=self.at("after_report"))
        around(Opener, "open", after=self.at("after_open"))
        around(Sequencer, "_assigned", after=lambda _, added: added and self.pass_by("in_assign"))
        around(Sequencer, "_revoked", before=self._revoke, after=self._revoked)
        around(Sequencer, "_lost", before=self._closing)
        around(snapshot, "take", after=self.at("after_checkpoint"))
        around(snapshot, "_copy", after=self._copied)
        around(snapshot, "_write_manifest", before=self.at("before_manifest"), after=self.at("after_manifest"))

    def at(self, point: str) -> Hook:
        return lambda *_: self.pass_by(point)

    def pass_by(self, point: str, last_words: Hook = lambda: None) -> None:
        if point != self._point:
            return
        self._left -= 1
        if self._left:
            return
        last_words()
        if self._told is not None:
            self._told.write_text(point)
        os.kill(os.getpid(), signal.SIGKILL)

    def _applying(self, _: Partition, records: Records, *__: object) -> None:
        self._batch = 0

    def _applied(self, _: Partition, records: Records, *__: object) -> None:
        self._batch = None
        if records:
            self.pass_by("after_apply")

    def _sent(self, producer: Producer, topic: str, *_: object) -> None:
        """The second example of a batch: those so far are brought to the broker first."""
        if self._batch is not None and topic.endswith(".examples"):
            self._batch += 1
            if self._batch == 2:
                self.pass_by("in_produce", lambda: producer._producer.flush(5))

    def _none_written(self, *_: object) -> None:
        self._writes = 0

    def _writing(self, *_: object) -> None:
        self.pass_by("before_write")
        if self._writes:
            self.pass_by("between_two_writes")

    def _written(self, *_: object) -> None:
        self._writes += 1
        self.pass_by("after_write")

    def _revoke(self, sequencer: Sequencer, removed: Sequence[int], *_: object) -> None:
        self._writes, self._revoking = 0, True
        if any(n in sequencer._partitions and sequencer._partitions[n].pending for n in removed):
            self.pass_by("in_revoke")

    def _revoked(self, *_: object) -> None:
        self._revoking = False

    def _closing(self, *_: object) -> None:
        if self._revoking and self._writes:
            self.pass_by("in_revoke_written")

    def _copied(self, _: Path, into: object, *__: object) -> None:
        """Snapshots are published in a thread of their own, and restored in the role's."""
        if into is not None:
            self.pass_by("mid_restore" if threading.current_thread() is threading.main_thread() else "mid_snapshot")


def forget_identities() -> None:
    """Each event is another one each time it is read."""
    decode = Decoder.decode

    def unique(self: Decoder, records: Records) -> list[Any]:
        return [
            msgspec.structs.replace(o, event_id=f"{o.event_id}{MARK}{token_hex(8)}") if isinstance(o, Event) else o
            for o in decode(self, records)
        ]

    Decoder.decode = unique  # type: ignore[method-assign]


def trust_the_group() -> None:
    """Go on from where the group's committed offset is, whatever the store says."""
    from_the_store = Opener.open

    def from_the_group(self: Opener, number: int, *args: Any) -> Opened:
        opened = from_the_store(self, number, *args)
        group = {"bootstrap.servers": self._config.kafka.bootstrap, "group.id": self._config.group(ROLE)}
        asking = confluent_kafka.Consumer(group)
        try:
            [known] = asking.committed([TopicPartition(self._events, number)], timeout=30)
        finally:
            asking.close()
        opened.partition.next_offset = max(0, known.offset)
        return opened

    Opener.open = from_the_group  # type: ignore[method-assign]


def take_for_confirmed() -> None:
    """Write without waiting for the outputs."""
    Producer.confirm = lambda *_: None  # type: ignore[method-assign]


def choose(client: Any, **ours: int) -> None:
    """Settings of a client that are not the operator's to choose."""
    original = client.librdkafka_settings

    def settings(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return original(*args, **kwargs | ours)

    client.librdkafka_settings = settings


CONTROLS: dict[str, tuple[Callable[[], None], ...]] = {
    "store-offsets": (forget_identities,),
    "kafka-offsets": (forget_identities, trust_the_group),
    "unconfirmed": (take_for_confirmed,),
}


def die_with(parent: int) -> None:
    """The kernel's promise; the parent may have gone before it was made."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description="run a role that kills itself at a named point")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="whom to die with")
    parser.add_argument("--die-at", default="", metavar="POINT:N", help=f"one of {', '.join(POINTS)}; N-th passage")
    parser.add_argument("--told", type=Path, metavar="FILE", help="where to leave the point's name")
    parser.add_argument("--session-seconds", type=float, default=0.0, help="the group's session timeout")
    parser.add_argument("--linger-seconds", type=float, default=0.0, help="how long outputs wait to be sent")
    parser.add_argument("--control", default="", choices=["", *CONTROLS])
    parser.add_argument("command", nargs=argparse.REMAINDER, help="streamgr's own command line")
    args = parser.parse_args()
    die_with(args.parent)
    if args.session_seconds:
        ms = int(args.session_seconds * 1000)
        choose(consumer, session_timeout_ms=ms, heartbeat_interval_ms=ms // 5)
    if args.linger_seconds:
        choose(producer, linger_ms=int(args.linger_seconds * 1000))
    for breaks in CONTROLS.get(args.control, ()):
        breaks()
    if args.die_at:
        point, _, passages = args.die_at.partition(":")
        if point not in POINTS:
            parser.error(f"no point {point!r}; there are {', '.join(POINTS)}")
        Death(point, int(passages or 1), args.told).install()
    return cli.main(args.command)


if __name__ == "__main__":
    sys.exit(main())
