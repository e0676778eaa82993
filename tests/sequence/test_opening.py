"""A partition opens from the local disk, else from a snapshot, else from the log; and never over a gap."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from streamgr.config import Config
from streamgr.errors import ConfigError, Damaged, RetentionPassed, StateNotWritable
from streamgr.sequence import examples as wire
from streamgr.sequence import maintenance, opening, views
from streamgr.sequence.follower import Follower
from streamgr.sequence.sequencer import Sequencer
from streamgr.state.rocks import CONDEMNED
from streamgr.state.snapshot import Snapshots
from streamgr.state.store import partition_directory
from streamgr.telemetry import Log
from tests.sequence.test_sequencer import PARTITIONS, Town, rows, until
from tests.streams import START, heartbeats


class Harbour(Town):
    """A town with a directory of snapshots, and a log that can be read."""

    def __init__(self, bootstrap: str, prefix: str, directory: Path) -> None:
        super().__init__(bootstrap, prefix, directory)
        self.shared = directory / "shared"
        state = msgspec.structs.replace(self.config.state, snapshots_directory=str(self.shared))
        self.config = msgspec.structs.replace(self.config, state=state)
        self.lines: list[dict[str, Any]] = []

    def role(self, config: Config | None = None, stop: Any = None, **how: bool) -> Sequencer:
        role = super().role(config, stop, **how)
        for object_ in (role, role._opener, role._replay, role._schedule):
            object_._log = self.log()  # type: ignore[union-attr]
        return role

    def log(self) -> Log:
        log = Log("sequencer", self.config.telemetry, self.clock)
        log._write = lambda level, event, message, facts: self.lines.append(  # type: ignore[method-assign]
            {"level": level, "event": event, "message": message, **facts}
        )
        return log

    def said(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    def publish_snapshots(self) -> None:
        list(maintenance.backup(self.directory, "sequencer", self.shared, 2, self.clock))

    def lose(self) -> None:
        """The disk is gone."""
        shutil.rmtree(self.directory / "sequencer")

    def cut(self, offsets: dict[int, int]) -> None:
        """Retention takes everything before these offsets."""
        admin = AdminClient({"bootstrap.servers": self.config.kafka.bootstrap})
        name = self.config.topic("events")
        cut = [TopicPartition(name, partition, offset) for partition, offset in offsets.items()]
        for future in admin.delete_records(cut).values():
            future.result(10)

    def sources(self) -> dict[int, str]:
        """What the role that opened last opened each partition from."""
        found = {line["partition"]: line["opened_from"] for line in self.said("partition_opened")[-PARTITIONS:]}
        return found


@pytest.fixture
def town(kafka: str, prefix: str, tmp_path: Path) -> Harbour:
    return Harbour(kafka, prefix, tmp_path)


def test_a_lost_disk_is_restored_from_snapshots_and_the_rest_is_read_again(town: Harbour) -> None:
    stream = rows(41, 1_200)
    town.publish(stream[:700])
    town.role().run_until_end()
    town.publish_snapshots()
    town.publish(stream[700:])
    town.role().run_until_end()
    assert set(town.sources().values()) == {"disk"}
    before = list(views.export(town.directory))
    town.lose()
    town.role().run_until_end()
    assert set(town.sources().values()) == {"snapshot"}
    assert list(views.export(town.directory)) == before
    assert {line["instead_of"] for line in town.said("snapshot_restored")} == {0}
    town.lose()
    shutil.rmtree(town.shared)
    town.role().run_until_end()
    assert set(town.sources().values()) == {"log"}
    assert list(views.export(town.directory)) == before
    town.publish(heartbeats(120_000, PARTITIONS))
    town.role().run_until_end()
    town.assert_like_the_oracle()


def test_a_bad_snapshot_is_refused_by_name_and_the_older_one_taken(town: Harbour) -> None:
    stream = rows(42, 900)
    offsets = []
    for part in (stream[:300], stream[300:600]):
        town.publish(part)
        town.role().run_until_end()
        town.publish_snapshots()
        offsets.append({row["partition"]: row["next_offset"] for row in maintenance.show(town.directory)})
    for number in range(PARTITIONS):
        newest, older = Snapshots(town.shared).find(town.config.topic("events"), number)[0]
        kept = {file.digest for file in older.manifest.files}
        broken = next(file for file in newest.manifest.files if file.digest not in kept and file.size)
        newest.content(broken).write_bytes(b"x" * broken.size)
    town.lose()
    town.publish(stream[600:] + heartbeats(120_000, PARTITIONS))
    town.role().run_until_end()
    assert {line["partition"]: line["offset"] for line in town.said("snapshot_restored")} == offsets[0]
    assert len(town.said("snapshot_refused")) == PARTITIONS
    assert "damaged" in town.said("snapshot_refused")[0]["message"]
    town.assert_like_the_oracle()


def test_retention_that_has_overtaken_the_disk_is_bridged_by_a_snapshot_or_named(town: Harbour) -> None:
    stream = rows(43, 800)
    town.publish(stream[:300])
    town.role().run_until_end()
    shutil.copytree(town.directory / "sequencer", town.directory / "old")
    town.publish(stream[300:600])
    town.role().run_until_end()
    town.publish_snapshots()
    town.cut({row["partition"]: row["next_offset"] - 1 for row in maintenance.show(town.directory)})
    before = list(views.export(town.directory))
    town.lose()
    shutil.copytree(town.directory / "old", town.directory / "sequencer")
    town.role().run_until_end()
    assert set(town.sources().values()) == {"snapshot"}
    assert list(views.export(town.directory)) == before
    town.lose()
    shutil.rmtree(town.shared)
    (town.directory / "old").rename(town.directory / "sequencer")
    with pytest.raises(RetentionPassed, match=r"the store reaches \d+, and the log starts at \d+.*snapshot.*--rebuild"):
        town.role().run_until_end()


def test_a_snapshot_far_ahead_spares_reading_the_log(town: Harbour, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = rows(44, 800)
    town.publish(stream[:200])
    town.role().run_until_end()
    shutil.copytree(town.directory / "sequencer", town.directory / "old")
    town.publish(stream[200:])
    town.role().run_until_end()
    town.publish_snapshots()
    before = list(views.export(town.directory))
    for far, source in ((10_000, "disk"), (20, "snapshot")):
        monkeypatch.setattr(opening, "FAR_RECORDS", far)
        town.lose()
        shutil.copytree(town.directory / "old", town.directory / "sequencer")
        town.role().run_until_end()
        assert set(town.sources().values()) == {source}
        assert list(views.export(town.directory)) == before


def test_a_snapshot_beyond_the_log_is_not_of_this_log(town: Harbour) -> None:
    town.publish(rows(45, 200))
    town.role().run_until_end()
    town.publish_snapshots()
    for number in range(PARTITIONS):
        (snapshot,) = Snapshots(town.shared).find(town.config.topic("events"), number)[0]
        envelope = json.loads(snapshot.path.read_text())
        body = snapshot.manifest.__class__(**{**msgspec.structs.asdict(snapshot.manifest), "next_offset": 10**9})
        raw = msgspec.json.encode(body)
        from hashlib import blake2b

        envelope = {"format": envelope["format"], "digest": blake2b(raw, digest_size=32).hexdigest()}
        text = msgspec.json.encode({**envelope, "body": msgspec.Raw(raw)})
        snapshot.path.with_name(f"{10**9:020d}-{envelope['digest'][:12]}.json").write_bytes(text)
        snapshot.path.unlink()
    town.lose()
    town.role().run_until_end()
    assert set(town.sources().values()) == {"log"}
    assert "the log holds" in town.said("snapshot_refused")[0]["message"]


def test_a_damaged_store_is_set_aside_and_rebuilt(town: Harbour) -> None:
    town.publish(rows(46, 600))
    town.role().run_until_end()
    before = list(views.export(town.directory))
    town.publish_snapshots()
    first = partition_directory(town.directory / "sequencer", 0)
    (first / "CURRENT").write_text("MANIFEST-999999\n")
    second = partition_directory(town.directory / "sequencer", 1)
    (second / CONDEMNED).touch()
    damaged = opening.DAMAGED._value.get()
    town.role().run_until_end()
    assert opening.DAMAGED._value.get() == damaged + 2
    assert town.sources() == {0: "snapshot", 1: "snapshot", 2: "disk", 3: "disk"}
    assert list(views.export(town.directory)) == before
    assert (first.with_name(f".{first.name}.damaged") / "CURRENT").exists()
    assert [line["level"] for line in town.said("state_damaged")] == ["error", "error"]


def test_damage_found_at_work_ends_the_role_and_the_next_start_heals(town: Harbour) -> None:
    town.publish(rows(47, 1_500))
    town.role().run_until_end()
    before = list(views.export(town.directory))
    town.publish_snapshots()
    town.lose()
    town.role().run_until_end()  # from snapshots: what it reads lies in files now
    for table in (town.directory / "sequencer").glob("p*/*.sst"):
        data = bytearray(table.read_bytes())
        for at in range(64, len(data) - 1_500, 128):
            data[at] ^= 1
        table.write_bytes(data)
    late = [
        (f"u{n}".encode(), json.dumps({
            "type": "click", "event_id": f"late{n}", "user_id": f"u{n}", "item_id": "i1", "event_time": START,
        }).encode(), None)
        for n in range(25)
    ]  # fmt: skip
    town.publish(late)
    with pytest.raises(Damaged, match=r"start the role again"):
        for _ in range(PARTITIONS + 1):
            town.role().run_until_end()
    for _ in range(PARTITIONS):
        try:
            town.role().run_until_end()
            break
        except Damaged:
            continue
    assert town.said("state_damaged")
    after = list(views.export(town.directory))
    assert len(after) == len(before) and after != before
    town.publish(heartbeats(120_000, PARTITIONS))
    town.role().run_until_end()
    town.assert_like_the_oracle()


def test_settings_that_changed_on_the_way_keep_an_older_store_from_answering_again(town: Harbour) -> None:
    """The records between have been answered under other settings: a rebuild would answer them differently."""
    stream = rows(48, 900)
    town.publish(stream[:300])
    town.role().run_until_end()
    town.publish_snapshots()  # made under the old settings
    other = town.changed(attribution_window_seconds=3.0)
    town.publish(stream[300:600])
    town.role().run_until_end()
    town.publish(stream[600:] + heartbeats(120_000, PARTITIONS))
    town.role(other).run_until_end()  # from here on
    assert all("@" in _fingerprint(town, number) for number in range(PARTITIONS))
    before = list(views.export(town.directory))
    shutil.copytree(town.directory / "sequencer", town.directory / "kept")
    town.lose()
    with pytest.raises(ConfigError, match=r"hold since source offset \d+.*other settings.*--accept-loss") as caught:
        town.role(other).run_until_end()
    assert caught.value.exit_code == 78
    assert "other settings" in town.said("snapshot_refused")[0]["message"]
    town.lose()
    (town.directory / "kept").rename(town.directory / "sequencer")
    town.publish_snapshots()
    town.lose()
    town.role(other).run_until_end()  # made under today's settings, and knows what the old ones have answered
    assert set(town.sources().values()) == {"snapshot"}
    assert list(views.export(town.directory)) == before
    accepted = town.accepted()
    town.role(other, rebuild=True, accept_loss=True).run_until_end()
    assert town.accepted() == accepted  # said again in other words, and dropped by position


def _fingerprint(town: Harbour, number: int) -> str:
    last = [r for r in town.read("examples") if r.partition == number][-1]
    return wire.decode(last.value or b"").fingerprint


def test_a_rebuild_takes_no_snapshot_and_leaves_none_of_the_old(town: Harbour) -> None:
    town.publish(rows(49, 300) + heartbeats(120_000, PARTITIONS))
    town.role().run_until_end()
    town.publish_snapshots()
    town.role(rebuild=True).run_until_end()
    assert set(town.sources().values()) == {"log"}
    assert Snapshots(town.shared).find(town.config.topic("events"), 0) == ([], [])
    town.assert_like_the_oracle()


def test_a_follower_starts_from_the_sequencers_snapshots(town: Harbour) -> None:
    stream = rows(50, 900)
    town.publish(stream[:600])
    town.role().run_until_end()
    town.publish_snapshots()
    town.publish(stream[600:])
    follower = Follower(town.config, town.clock, town.log())
    follower.open()
    assert {line["instead_of"] for line in town.said("snapshot_restored")} == {0}

    def caught_up() -> bool:
        follower.step()
        return follower.caught_up()

    until(caught_up)
    town.role().run_until_end()
    for sequence in views.export(town.directory):
        assert follower.sequence(sequence["user_id"]) == sequence
    follower.close()
    shown = list(maintenance.show(town.directory / "scorer"))
    assert not any(row["emits"] for row in shown)
    assert [row["timers"] for row in maintenance.verify(town.directory / "scorer")] == [0] * PARTITIONS
    other = town.changed(attribution_window_seconds=3.0)
    shutil.rmtree(town.directory / "scorer")
    town.lines.clear()
    follower = Follower(other, town.clock, town.log())
    follower.open()
    assert not town.said("snapshot_restored")
    assert "made under other settings" in town.said("snapshot_refused")[0]["message"]
    follower.close()


def test_snapshots_that_cannot_be_read_cost_time_only(town: Harbour) -> None:
    town.publish(rows(51, 300) + heartbeats(120_000, PARTITIONS))
    town.shared.write_text("not a directory")
    town.role().run_until_end()
    town.assert_like_the_oracle()
    town.lose()
    (town.directory / "sequencer").write_text("in the way")
    with pytest.raises(StateNotWritable):
        town.role().run_until_end()


def test_a_replay_tells_how_far_it_is(town: Harbour, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamgr.sequence import replay

    monkeypatch.setattr(replay, "TOLD_SECONDS", 0.0)
    monkeypatch.setattr(replay, "WORTH_TELLING", 100)
    config = town.changed(commit_interval_seconds=0.0)
    town.publish(rows(52, 2_500))
    town.role(config).run_until_end()
    told = [line["remaining"] for line in town.said("replaying")]
    assert told and told == sorted(told, reverse=True)
    assert town.said("caught_up")[0]["records"] == len(town.read("events"))
    assert replay.REMAINING._value.get() == 0
