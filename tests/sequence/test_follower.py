"""The follower keeps what the sequencer keeps, and answers while it reads."""

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from streamgr.errors import TryAgain
from streamgr.events import PROFILE, item_key
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.sequence import views
from streamgr.sequence.follower import Follower
from streamgr.telemetry import Log
from tests.sequence.test_sequencer import PARTITIONS, Town, rows, until
from tests.streams import START, heartbeats


@pytest.fixture
def town(broker: EmbeddedBroker, prefix: str, tmp_path: Path) -> Town:
    return Town(broker.bootstrap, prefix, tmp_path)


def follower(town: Town) -> Follower:
    return Follower(town.config, town.clock, Log("scorer", town.config.telemetry, town.clock))


def caught_up(f: Follower) -> bool:
    f.step()
    return f.caught_up()


def test_it_follows_restarts_and_shows_what_the_sequencer_keeps(town: Town) -> None:
    stream = rows(11, 900)
    town.publish(stream[:500])
    f = follower(town)
    assert f.why_not_ready() == "not opened"
    f.open()
    assert "records to go" in f.why_not_ready()
    assert f.age_seconds() > 0
    until(lambda: caught_up(f))
    assert (f.why_not_ready(), f.age_seconds()) == ("", 0.0)
    f.close()
    town.publish(stream[500:] + heartbeats(120_000, PARTITIONS))
    f = follower(town)
    f.open()
    until(lambda: caught_up(f))
    assert f.newest_event_ms() == START + 120_000
    assert f.item_text(item_key("i3")) == "i3"
    assert f.item_text(item_key("no such item")) is None
    town.role().run_until_end()
    for sequence in views.export(town.directory):
        user = sequence["user_id"]
        assert f.sequence(user) == sequence
        shown = [(e["event_time"], item_key(e["item_id"])) for e in sequence["events"] if e["type"] != "profile"]
        h = f.history(user, START + 30_000, 7)
        h = h.take(np.flatnonzero(h.kinds != PROFILE))
        assert (
            list(zip(h.times.tolist(), h.items.tolist(), strict=True))
            == [(time, item) for time, item in shown if time < START + 30_000][-7:]
        )
    assert f.sequence("nobody") == {"user_id": "nobody", "events": []}
    assert len(f.history("nobody", START, 5)) == 0
    with pytest.raises(TryAgain):
        follower(town).open()
    f.close()


def test_it_answers_from_other_threads_while_it_reads(town: Town) -> None:
    town.publish(rows(12, 3_000))
    f = follower(town)
    f.open()
    done, problems = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            for user in ("u0", "u1", "u2", "nobody"):
                h = f.history(user, START + 60_000, 50)
                if (h.kinds != PROFILE).sum() > 50 or (h.times[1:] < h.times[:-1]).any():
                    problems.append(user)
                events = f.sequence(user)["events"]
                if any(b["event_time"] < a["event_time"] for a, b in pairwise(events)):
                    problems.append(user)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: caught_up(f))
    done.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert (f.history("u0", START + 60_000, 50).kinds != PROFILE).sum() == 50
    f.close()
