"""What a site may do to us: slower, never dead. One user without end, everything at once, floods, large values."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from streamgr import config
from streamgr.errors import DataError
from streamgr.events import Record
from streamgr.kafka import topics
from streamgr.sequence import views
from streamgr.sequence.views import Part
from tests.sequence.test_partition import Run, records
from tests.sequence.test_sequencer import PARTITIONS, Town, rows
from tests.streams import columns, heartbeats

LONG = config.Sequence(attribution_window_seconds=60, lateness_seconds=1, close_step_seconds=1, history_length=64)
Json = dict[str, Any]


def shown(n: int, user: str, time: int, **more: object) -> Json:
    return {
        "type": "impression", "event_id": f"e{n}", "user_id": user, "item_id": f"i{n % 997}", "event_time": time,
        **more,
    }  # fmt: skip


def test_one_user_with_very_many_events_and_actions_within_one_window(tmp_path: Path) -> None:
    """30,000 events of one user in a minute: joins look back over a long open window, and every label closes once."""
    run, events = Run(tmp_path, LONG), []
    for n in range(30_000):
        if n % 10 == 9:
            events.append({**shown(n, "u", 2 * n), "type": "click", "item_id": f"i{(n - 5) % 997}"})
        elif n % 100 == 50:
            events.append({**shown(n, "u", 2 * n), "type": "like", "item_id": f"nobody showed {n}"})
        else:
            events.append(shown(n, "u", 2 * n))
    log = records([*events, {"type": "heartbeat", "event_time": 200_000}], append_ms=300_000)
    for start in range(0, len(log), 1_000):
        run.apply(log.between(start, start + 1_000))
        run.partition.commit()
    found = run.targets()
    assert set(found.values()) == {1}
    kinds = [len(labels) for _, _, _, labels in found]
    assert len(found) == 27_000
    assert kinds.count(1) > 3_000
    assert max(len(e.history) for e in run.order) == 64
    (whole,) = run.exported()
    assert len(whole["events"]) == 30_000


def test_very_many_events_of_one_moment(tmp_path: Path) -> None:
    run = Run(tmp_path, LONG)
    log = records(
        [shown((7_919 * n) % 10_007, "u", 5) for n in range(5_000)] + [{"type": "heartbeat", "event_time": 99_999}]
    )
    for start in range(0, len(log), 700):
        run.apply(log.between(start, start + 700))
        run.partition.commit()
    assert sum(run.targets().values()) == 5_000
    assert all(len(e.target_index) <= 32 for e in run.order)


def test_a_flood_of_new_users_leaves_little_in_memory(tmp_path: Path) -> None:
    """Tails, names and timers are let go: what is kept is bounded by settings, not by how many users there are."""
    run = Run(tmp_path, config.Sequence(cached_events=2_000))
    for start in range(0, 20_000, 1_000):
        run.apply(columns([
            Record("e", 0, n, f"u{n}".encode(), json.dumps(shown(n, f"u{n}", n)).encode(), 1_000_000 + n)
            for n in range(start, start + 1_000)
        ]))  # fmt: skip
        run.partition.commit()
    users, timers = run.partition._users, run.partition._timers
    assert len(users._tails) <= 1_001
    assert not timers._fresh and not timers._steps
    assert run.partition.open_impressions == 20_000
    assert len(run.exported()) == 20_000


def test_a_jump_of_the_watermark_hands_examples_out_as_it_makes_them(tmp_path: Path) -> None:
    run = Run(tmp_path, LONG)
    run.apply(records([shown(n, f"u{n}", n) for n in range(3_000)]))
    taken = []

    def emit(key: bytes, value: bytes) -> None:
        taken.append(key)
        if len(taken) == 10:
            raise KeyboardInterrupt  # the receiver decides: nothing was collected behind its back

    beat = columns([Record("e", 0, 3_000, None, b'{"type":"heartbeat","event_time":500000}', 500_000)])
    with pytest.raises(KeyboardInterrupt):
        run.partition.apply(beat, emit)
    assert len(taken) == 10


def test_the_largest_events_there_can_be_fit_into_examples_and_dead_letters(tmp_path: Path) -> None:
    """Ids of 256 code points of four bytes each, 32 features of 128, and rubbish up to a value of 1 MiB."""
    how = config.Sequence(attribution_window_seconds=1, lateness_seconds=1, close_step_seconds=1, history_length=32_768)
    run, wide = Run(tmp_path, how), "\U0001f600"
    features = {f"{k:03d}" + wide * 125: wide * 128 for k in range(32)}
    events = [
        {
            "type": "impression", "event_id": f"{n:03d}" + wide * 125, "user_id": "u", "event_time": 5,
            "item_id": f"{n:03d}" + wide * 253, "features": features, "pad": "x" * 600_000,
        }
        for n in range(300)
    ]  # fmt: skip
    log = [json.dumps(e, ensure_ascii=False).encode() for e in events]
    assert max(map(len, log)) < 1 << 20
    run.apply(columns([Record("e", 0, n, b"u", value, 10_000) for n, value in enumerate(log)]))
    run.partition.commit()
    sizes = []
    run.partition.apply(
        columns([Record("e", 0, 300, None, b'{"type":"heartbeat","event_time":9000}', 10_000)]),
        lambda key, value: sizes.append(len(value)),
    )
    assert len(sizes) == 2  # a span of 256 rows, and the rest
    assert max(sizes) < 1_000_000
    bad = columns([Record("e", 0, 301, b"u", b"x" * ((1 << 20) + 1), 10_000)])
    assert run.partition.apply(bad).dead_letters[0][1].reason == "too_large"


def test_a_long_sequence_is_read_in_parts(tmp_path: Path) -> None:
    run = Run(tmp_path, LONG)
    events = [shown(n, "u", 10 * n) for n in range(3_000)]  # META has a window of 100 ms
    events[3]["item_id"] = "only once"
    events += [{"type": "click", "event_id": "c", "user_id": "u", "item_id": "only once", "event_time": 110}]
    run.apply(records(events, append_ms=100_000))
    run.partition.commit()
    whole = views.sequence(run.store, "u")["events"]
    assert whole[3]["actions"] == ["click"]
    for part in (Part(last=5), Part(last=1), Part(since=29_900), Part(before=45), Part(20, 45), Part(20, 45, 2)):
        expected = [
            e for e in whole
            if e["event_time"] >= part.since and (part.before is None or e["event_time"] < part.before)
        ]  # fmt: skip
        expected = expected[-part.last :] if part.last else expected
        assert views.sequence(run.store, "u", part)["events"] == expected
    reads = []
    walk = run.store.database._walk
    run.store.database._walk = lambda *a: (reads.append(1) or row for row in walk(*a))  # type: ignore[method-assign]
    assert len(views.sequence(run.store, "u", Part(last=5))["events"]) == 5
    assert len(reads) < 20  # and not the whole of it


@pytest.fixture
def town(kafka: str, prefix: str, tmp_path: Path) -> Town:
    return Town(kafka, prefix, tmp_path)


def test_a_topic_that_takes_smaller_messages_only_is_named_and_healed(town: Town) -> None:
    admin, name = AdminClient({"bootstrap.servers": town.config.kafka.bootstrap}), town.config.topic("examples")
    entry = ConfigEntry("max.message.bytes", "300", incremental_operation=AlterConfigOpType.SET)
    resource_ = ConfigResource(ResourceType.TOPIC, name, incremental_configs=[entry])
    for future in admin.incremental_alter_configs([resource_]).values():
        future.result(10)
    town.publish(rows(71, 500) + heartbeats(120_000, PARTITIONS))
    with pytest.raises(DataError, match=r"larger than the topic.*streamgr topics apply") as caught:
        town.role().run_until_end()
    assert caught.value.exit_code == 65
    topics.ensure(town.config.kafka)
    town.role().run_until_end()
    town.assert_like_the_oracle()


SMALL_DISK = """
import resource, signal, sys
from streamgr.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(["sequencer", "--until-end"]))
"""


def test_a_full_disk_ends_the_role_by_name_and_a_restart_with_room_goes_on_exactly(town: Town) -> None:
    town.publish(rows(72, 3_000) + heartbeats(120_000, PARTITIONS))
    settings = town.config
    environ = {
        "STREAMGR_KAFKA__BOOTSTRAP": settings.kafka.bootstrap,
        "STREAMGR_KAFKA__TOPIC_PREFIX": settings.kafka.topic_prefix,
        "STREAMGR_STATE__DIRECTORY": settings.state.directory,
        "STREAMGR_SEQUENCE__ATTRIBUTION_WINDOW_SECONDS": "2",
        "STREAMGR_SEQUENCE__LATENESS_SECONDS": "1",
        "STREAMGR_SEQUENCE__CLOSE_STEP_SECONDS": "0.2",
        "STREAMGR_SEQUENCE__COMMIT_INTERVAL_SECONDS": "0.01",
    }
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(60_000)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 73, done.stderr[-2000:]
    assert "cannot write the state" in done.stderr and "free space" in done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    town.role().run_until_end()
    town.assert_like_the_oracle()
