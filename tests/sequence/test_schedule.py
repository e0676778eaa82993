"""Snapshots while the role works: each partition in its turn, none for nothing, and never in the role's way."""

import threading
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from streamgr.sequence.sequencer import Sequencer
from streamgr.service import Stop
from streamgr.state.snapshot import Snapshots
from tests.sequence.test_opening import Harbour, town
from tests.sequence.test_sequencer import PARTITIONS, rows, running, until
from tests.streams import heartbeats

__all__ = ["running", "town"]  # fixtures
Start = Callable[[Sequencer, Stop], threading.Thread]


@pytest.mark.parametrize("shared", ["writable", "in the way"])
def test_a_working_role_publishes_snapshots_in_turn_and_drains(town: Harbour, running: Start, shared: str) -> None:
    state = replace(town.config.state, snapshot_seconds=0.4)
    town.config = replace(town.config, state=state)
    if shared == "in the way":
        town.shared.write_text("not a directory")
    stream, stop = rows(61, 1_000), Stop()
    thread = running(town.role(stop=stop), stop)
    told = "snapshot_published" if shared == "writable" else "snapshot_failed"
    town.publish(stream[:400])
    until(lambda: {line["partition"] for line in town.said(told)} == set(range(PARTITIONS)))
    town.publish(stream[400:] + heartbeats(120_000, PARTITIONS))
    until(lambda: len({p for p, *_ in town.accepted()}) == PARTITIONS)
    ends = {p: 1 + max(r.offset for r in town.read("events") if r.partition == p) for p in range(PARTITIONS)}
    if shared == "writable":
        published = lambda: {line["partition"]: line["offset"] for line in town.said(told)}  # noqa: E731
        until(lambda: published() == ends)
        before = len(town.said(told))
        threading.Event().wait(1.0)  # nothing has come: nothing is published
        assert len(town.said(told)) == before
        for number in range(PARTITIONS):
            found, refused = Snapshots(town.shared).find(town.config.topic("events"), number)
            assert (len(found), refused) == (2, [])
    stop.set()
    thread.join(30)
    assert not list((town.directory / "sequencer").glob(".*checkpoints/*"))
    town.assert_like_the_oracle()
