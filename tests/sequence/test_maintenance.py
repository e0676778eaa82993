"""What an operator does with stores, on real ones."""

import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from streamgr.clock import SystemClock
from streamgr.errors import DataError, StateNotWritable, TryAgain
from streamgr.events import Records
from streamgr.sequence import maintenance, views
from streamgr.sequence.partition import Partition
from streamgr.state import codec
from streamgr.state.store import Store, partition_directory
from tests.sequence.test_partition import FAST, MEMORY, META, records
from tests.sequence.test_sequencer import PARTITIONS, Town, rows
from tests.streams import events, heartbeats

LOG = events(31, 600, span_ms=9_000)


def filled(state: Path, partition: int, log: Records) -> Path:
    """A sequencer's closed partition that has read this log."""
    path = partition_directory(state / "sequencer", partition)
    store = Store(path, MEMORY)
    store.claim(replace(META, partition=partition))
    worker = Partition(store, FAST, "f")
    worker.apply(log)
    worker.commit()
    store.close()
    return path


def test_a_sound_state_is_shown_and_verified(tmp_path: Path) -> None:
    for partition in (0, 1):
        filled(tmp_path, partition, records(LOG, append_ms=1_700_000_100_000))
    (first, second) = maintenance.show(tmp_path)
    assert (first["partition"], second["partition"]) == (0, 1)
    assert first["next_offset"] == len(LOG)
    assert first["actions"] == ["click", "like"]
    (first, second) = maintenance.verify(tmp_path)
    assert first["ok"] and second["ok"], (first, second)
    assert first["users"] == 25 and first["events"] > 500 and first["timers"] > 0
    assert first["bytes"] >= 0


def test_nowhere_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    for look in (maintenance.show, maintenance.verify):
        with pytest.raises(DataError, match=r"no sequences here.*remedy"):
            list(look(tmp_path))
    with pytest.raises(DataError, match="no sequences here"):
        list(maintenance.backup(tmp_path, "scorer", tmp_path / "b", 2, SystemClock()))


def test_what_does_not_agree_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path, 0, records(LOG, append_ms=1_700_000_100_000))
    store = Store(path, MEMORY)
    batch = store.batch()
    key, value = next(iter(store.database.scan("events")))
    stranger = codec.uid("stranger")
    batch.put("events", stranger + key[16:], value)
    batch.put("events", key[:-1] + bytes([key[-1] ^ 1]), value)
    event = codec.decode_event(value)
    batch.delete("items", codec.item_bytes(event.item))
    batch.put("users", stranger[:-1] + b"x", b"somebody")
    batch.put("due", codec.due_key(5, stranger), b"")
    store.write(batch, replace(store.progress, next_offset=3))
    store.close()
    (found,) = maintenance.verify(tmp_path)
    assert len(found["problems"]) == maintenance.SHOWN
    store = Store(path, MEMORY)
    counts = dict.fromkeys(("events", "users", "items", "timers"), 0)
    text = "\n".join(maintenance._problems(store, counts))
    for what in ("which is not his", "has no name", "another event's key", "has no text", "3 is next", "a timer for 5"):
        assert what in text
    store.close()


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    path = filled(tmp_path, 0, records(LOG, append_ms=1_700_000_100_000))
    store = Store(path, MEMORY)
    store.database.checkpoint(tmp_path / "flushed")
    store.close()
    shutil.rmtree(path)
    (tmp_path / "flushed").rename(path)
    table = max(path.glob("*.sst"), key=lambda file: file.stat().st_size)
    data = bytearray(table.read_bytes())
    data[len(data) // 3] ^= 1
    table.write_bytes(data)
    (found,) = maintenance.verify(tmp_path)
    assert not found["ok"]
    assert "damaged" in found["problems"][0]
    assert found["store"] == str(path)


def test_a_store_in_use_is_backed_up_by_its_owner_only(tmp_path: Path) -> None:
    path = filled(tmp_path, 0, records(LOG, append_ms=1_700_000_100_000))
    store = Store(path, MEMORY)
    with pytest.raises(TryAgain, match=r"stop the role, or let it take snapshots"):
        list(maintenance.backup(tmp_path, "sequencer", tmp_path / "backup", 2, SystemClock()))
    store.close()


@pytest.fixture
def town(kafka: str, prefix: str, tmp_path: Path) -> Town:
    return Town(kafka, prefix, tmp_path)


def test_what_was_backed_up_is_restored_to_the_byte_and_gone_on_with(town: Town) -> None:
    state, backup, clock = town.directory, town.directory / "backup", SystemClock()
    stream = rows(32, 900)
    town.publish(stream[:500])
    town.role().run_until_end()
    before = list(views.export(state))
    told = list(maintenance.backup(state, "sequencer", backup, 2, clock))
    assert [row["partition"] for row in told] == list(range(PARTITIONS))
    assert not list((state / "sequencer").glob(".*checkpoints/*"))
    assert all(
        row["copied_bytes"] == 0 or row["bytes"] for row in maintenance.backup(state, "sequencer", backup, 2, clock)
    )
    shutil.rmtree(state / "sequencer")
    restored = list(maintenance.restore(town.config, state / "sequencer", backup))
    assert [row["next_offset"] for row in restored] == [row["next_offset"] for row in told]
    assert list(views.export(state)) == before
    with pytest.raises(StateNotWritable, match="already"):
        list(maintenance.restore(town.config, state / "sequencer", backup))
    town.publish(stream[500:] + heartbeats(120_000, PARTITIONS))
    town.role().run_until_end()
    town.assert_like_the_oracle()


def test_a_backup_of_another_topic_is_not_taken(town: Town) -> None:
    filled(town.directory, 0, records(LOG, append_ms=1_700_000_100_000))
    list(maintenance.backup(town.directory, "sequencer", town.directory / "backup", 2, SystemClock()))
    with pytest.raises(DataError, match=r"no snapshot of .*events that fits"):
        list(maintenance.restore(town.config, town.directory / "elsewhere", town.directory / "backup"))
    home = town.directory / "backup" / META.topic
    home.rename(home.with_name(town.config.topic("events")))
    told = []
    with pytest.raises(DataError, match="no snapshot"):
        for row in maintenance.restore(town.config, town.directory / "elsewhere", town.directory / "backup"):
            told.append(row)
    assert "cluster_id is 'c'" in told[0]["refused"][0]


def test_erasing_publishes_the_record_that_every_store_obeys(town: Town) -> None:
    town.publish(rows(33, 200))
    record = maintenance.erase(town.config, "u0")
    (erasure,) = (r for r in town.read("events") if r.value is None)
    assert (erasure.key, erasure.offset) == (b"u0", record["offset"])
    assert erasure.partition == next(r.partition for r in town.read("events") if r.key == b"u0")
    town.role().run_until_end()
    assert views.show(town.directory, "u0") is None
    assert views.show(town.directory, "u1") is not None
    for bad in ("", "x" * 257):
        with pytest.raises(DataError, match="1 to 256 characters"):
            maintenance.erase(town.config, bad)
