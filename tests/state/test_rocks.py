"""The database: prefixes stay apart, a batch is whole, and every failure has its name."""

import subprocess
import sys
from pathlib import Path

import pytest

from streamgr.config import State
from streamgr.errors import Damaged, DataError, StateNotWritable, TryAgain
from streamgr.state.rocks import CONDEMNED, Database, Memory

FAMILIES = {"rows": 4, "plain": 0}
MEMORY = Memory(State(cache_bytes=1 << 20, write_buffer_bytes=1 << 20))


def test_a_prefix_scan_sees_its_prefix_alone(tmp_path: Path) -> None:
    database = Database(tmp_path / "d", MEMORY, FAMILIES)
    batch = database.batch()
    for prefix in (b"\x00" * 4, b"aaaa", b"aaab", b"\xff" * 4):
        for n in range(3):
            batch.put("rows", prefix + bytes([n]), prefix)
    database.write(batch)
    for prefix in (b"\x00" * 4, b"aaaa", b"aaab", b"\xff" * 4):
        assert [k for k, _ in database.scan_prefix("rows", prefix)] == [prefix + bytes([n]) for n in range(3)]
        assert [k[4] for k, _ in database.scan_prefix("rows", prefix + b"\x01")] == [1, 2]
    assert list(database.scan_prefix("rows", b"aaac")) == []
    assert len(list(database.scan("rows"))) == 12
    batch = database.batch()
    batch.put("rows", b"aaaa\xff\xff", b"")
    batch.delete_prefix("rows", b"aaaa", 6)
    batch.put("rows", b"aaaa\x07", b"again")
    batch.delete_prefix("rows", b"\xff" * 4, 6)
    database.write(batch)
    assert list(database.scan_prefix("rows", b"aaaa")) == [(b"aaaa\x07", b"again")]
    assert list(database.scan_prefix("rows", b"\xff" * 4)) == []
    assert len(list(database.scan_prefix("rows", b"aaab"))) == 3
    database.close()


def test_what_was_written_is_there_after_reopening_and_for_a_reader_beside(tmp_path: Path) -> None:
    database = Database(tmp_path / "d", MEMORY, FAMILIES)
    batch = database.batch()
    batch.put("plain", b"k", b"v")
    assert database.get("plain", b"k") is None  # not before it is written
    database.write(batch)
    reader = Database(tmp_path / "d", MEMORY, FAMILIES, read_only=True)
    assert reader.get_many("plain", [b"k", b"none"]) == [b"v", None]
    reader.close()
    database.sync()
    database.close()
    database = Database(tmp_path / "d", MEMORY, FAMILIES)
    assert database.get("plain", b"k") == b"v"
    database.close()


def test_a_second_owner_is_told_to_try_again(tmp_path: Path) -> None:
    database = Database(tmp_path / "d", MEMORY, FAMILIES)
    with pytest.raises(TryAgain, match="another process holds") as caught:
        Database(tmp_path / "d", MEMORY, FAMILIES)
    assert caught.value.exit_code == 75
    database.close()
    Database(tmp_path / "d", MEMORY, FAMILIES).close()


def test_a_directory_that_cannot_be_made_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StateNotWritable, match=r"cannot write the state.*remedy") as caught:
        Database(tmp_path / "file" / "d", MEMORY, FAMILIES)
    assert caught.value.exit_code == 73


def test_no_database_to_read_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no database here"):
        Database(tmp_path / "nowhere", MEMORY, FAMILIES, read_only=True)
    assert not (tmp_path / "nowhere").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    Database(tmp_path / "d", MEMORY, FAMILIES).close()
    (tmp_path / "d" / "CURRENT").write_text("MANIFEST-999999\n")
    with pytest.raises((DataError, StateNotWritable), match="remedy"):
        Database(tmp_path / "d", MEMORY, FAMILIES)


def test_a_scan_never_ends_silently_at_a_damaged_block(tmp_path: Path) -> None:
    database = Database(tmp_path / "d", MEMORY, FAMILIES)
    batch = database.batch()
    for n in range(5_000):
        batch.put("rows", b"user" + n.to_bytes(4, "big"), bytes(range(60)) + n.to_bytes(4, "big"))
    database.write(batch)
    database.checkpoint(tmp_path / "c")  # flushes
    database.close()
    table = max((tmp_path / "c").glob("*.sst"), key=lambda file: file.stat().st_size)
    data = bytearray(table.read_bytes())
    data[len(data) // 3] ^= 1
    table.write_bytes(data)
    database = Database(tmp_path / "c", Memory(State()), FAMILIES)
    for scan in (database.scan("rows"), database.scan_prefix("rows", b"user")):
        with pytest.raises(Damaged, match=r"checksum.*remedy"):
            list(scan)
    assert (tmp_path / "c" / CONDEMNED).exists()
    database.close()


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    database = Database(tmp_path / "d", MEMORY, FAMILIES)
    batch = database.batch()
    batch.put("rows", b"user1", b"x")
    database.write(batch)
    database.checkpoint(tmp_path / "c")
    database.close()
    for table in (tmp_path / "c").glob("*.sst"):
        table.unlink()
    with pytest.raises(Damaged):
        Database(tmp_path / "c", MEMORY, FAMILIES)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from streamgr.config import State
from streamgr.errors import StateNotWritable
from streamgr.state.rocks import Database, Memory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
database = Database(path, Memory(State(cache_bytes=1 << 20, write_buffer_bytes=1 << 20)), {"plain": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
whole = 0
try:
    for n in range(200):
        batch = database.batch()
        for k in range(10):
            batch.put("plain", b"%d-%d" % (n, k), bytes(range(256)) * 4)
        database.write(batch)
        whole = n + 1
except StateNotWritable:
    print(whole)
"""


def test_a_full_disk_ends_the_work_and_a_restart_finds_whole_batches(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "d")], capture_output=True, text=True, timeout=60, check=True
    )
    whole = int(done.stdout)
    assert 0 < whole < 200
    database = Database(tmp_path / "d", MEMORY, {"plain": 0})
    assert len(list(database.scan("plain"))) == 10 * whole
    database.close()
