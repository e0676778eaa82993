"""Snapshots: whole or absent, each file once; whatever is wrong with one has a name, and an older one serves."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgr.clock import Deadline, SystemClock
from streamgr.config import State
from streamgr.errors import DataError, StateNotWritable, StreamgrError, TryAgain
from streamgr.state import snapshot as module
from streamgr.state.rocks import Memory
from streamgr.state.snapshot import (
    Checkpoint,
    Envelope,
    Manifest,
    Origin,
    Published,
    Snapshot,
    Snapshots,
    take,
)
from streamgr.state.store import FAMILIES, Meta, Progress, Store, partition_directory
from streamgr.state.uploader import Upload, Uploader

MEMORY = Memory(State(cache_bytes=1 << 20, write_buffer_bytes=1 << 20))
META = Meta(
    cluster_id="c",
    topic_id="t",
    topic="events",
    partition=3,
    partitions=4,
    fingerprint="f",
    actions=("click", "like"),
    window_ms=2000,
    emits=True,
)
ORIGIN = Origin("c", "t", "events", 3, 4)
NOW_MS = 1_700_000_000_000
HOUR = 3600

Contents = dict[str, list[tuple[bytes, bytes]]]


def opened(directory: Path) -> Store:
    store = Store(partition_directory(directory, 3), MEMORY)
    store.claim(META)
    return store


def fill(store: Store, count: int, *, batches: int = 1) -> None:
    """Batches of `count` rows in four families; the next offset is the number of rows."""
    for _ in range(batches):
        batch, first = store.batch(), store.progress.next_offset
        for n in range(first, first + count):
            user = blake2b(b"%d" % n, digest_size=16).digest()
            batch.put("events", user + n.to_bytes(17, "big"), blake2b(user, digest_size=60).digest())
            batch.put("users", user, b"user %d" % n)
            batch.put("items", n.to_bytes(8, "big"), b"item %d" % n)
            batch.put("due", n.to_bytes(8, "big") + user, b"")
        store.write(batch, Progress(first + count, 7 * first, 5 * first, (first, 1), NOW_MS, 2))


def contents(store: Store) -> Contents:
    return {family: list(store.database.scan(family)) for family in FAMILIES}


def contents_at(path: Path) -> Contents:
    store = Store(path, MEMORY)
    try:
        return contents(store)
    finally:
        store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = opened(tmp_path / "sequencer")
    fill(store, 100)
    yield store
    store.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def home(root: Path) -> Path:
    return root / "events" / "p00003"


@pytest.fixture
def snapshots(root: Path) -> Snapshots:
    return Snapshots(root)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere" / "p00003"


def publish(snapshots: Snapshots, store: Store, now_ms: int = NOW_MS) -> Published:
    return snapshots.publish(take(store, now_ms))


def two(snapshots: Snapshots, store: Store) -> tuple[Snapshot, Snapshot]:
    """An older and a newer snapshot, of 100 and of 150 rows."""
    older = publish(snapshots, store).snapshot
    fill(store, 50)
    return older, publish(snapshots, store).snapshot


def own_file(newer: Snapshot, older: Snapshot, suffix: str = ".sst") -> Path:
    """A file that only the newer one needs."""
    shared = set(older.manifest.files)
    return next(newer.content(f) for f in newer.manifest.files if f not in shared and f.name.endswith(suffix))


# --- a snapshot and back


def test_a_restored_store_is_the_store_as_it_was_and_can_be_written(
    store: Store, snapshots: Snapshots, target: Path
) -> None:
    before = contents(store)
    published = publish(snapshots, store)
    fill(store, 10)
    manifest, refused = Snapshots(snapshots._root).restore_newest(ORIGIN, target)
    assert (manifest, refused) == (published.snapshot.manifest, [])
    restored = Store(target, MEMORY)
    assert contents(restored) == before
    assert manifest is not None
    assert restored.progress.next_offset == manifest.next_offset == 100
    assert restored.meta == META
    fill(restored, 10)
    assert contents(restored) == contents(store)
    restored.close()
    assert [path.name for path in target.parent.iterdir()] == ["p00003"]


def test_a_manifest_says_what_it_is_of_and_lies_under_its_offset(store: Store, snapshots: Snapshots) -> None:
    fill(store, 20)
    published = publish(snapshots, store)
    manifest = published.snapshot.manifest
    assert manifest.origin == ORIGIN
    assert (manifest.schema, manifest.fingerprint, manifest.created_ms) == (META.schema, "f", NOW_MS)
    assert (manifest.next_offset, manifest.watermark) == (120, 500)
    assert manifest.bytes == sum(file.size for file in manifest.files) == published.copied_bytes
    assert published.snapshot.path.name.startswith("00000000000000000120-")
    assert snapshots.find("events", 3) == ([published.snapshot], [])
    assert snapshots.find("events", 4) == ([], [])
    assert snapshots.find("nothing", 3) == ([], [])


def test_the_next_snapshot_copies_only_what_is_new(store: Store, snapshots: Snapshots, home: Path) -> None:
    first = publish(snapshots, store)
    inodes = {path.name: path.stat().st_ino for path in (home / "files").iterdir()}
    fill(store, 5)
    second = publish(snapshots, store)
    new = set(second.snapshot.manifest.files) - set(first.snapshot.manifest.files)
    assert any(file.name.endswith(".sst") for file in first.snapshot.manifest.files if file not in new)
    assert 0 < second.copied_bytes == sum(file.size for file in new) < first.copied_bytes
    assert all((home / "files" / name).stat().st_ino == inode for name, inode in inodes.items())
    fresh = Snapshots(snapshots._root)  # another process: it knows no digest yet
    assert publish(fresh, store).copied_bytes < first.copied_bytes / 2


def test_a_file_is_read_once_for_its_digest(
    store: Store, snapshots: Snapshots, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    blocks = module._blocks

    def spy(source: Path) -> Iterator[memoryview]:
        read.append(source.name)
        return blocks(source)

    first = publish(snapshots, store).snapshot
    monkeypatch.setattr(module, "_blocks", spy)
    publish(snapshots, store, NOW_MS + 1)
    assert read
    assert not any(name.endswith(".sst") for name in read)
    snapshots.restore(first, target)
    read.clear()
    restored = Store(target, MEMORY)  # and what was just restored need not be read to be published again
    publish(snapshots, restored)
    restored.close()
    known = {file.name for file in first.manifest.files}
    assert not any(name.endswith(".sst") and name in known for name in read)


def test_a_checkpoint_is_taken_at_a_batch_boundary_while_writes_go_on(store: Store, tmp_path: Path) -> None:
    done = threading.Event()

    def write() -> None:
        while not done.wait(0.0005):
            fill(store, 7)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for n in range(8):
            store.database.checkpoint(tmp_path / "checkpoints" / str(n))
    finally:
        done.set()
        writer.join()
    counts = []
    for n in range(8):
        copy = Store(tmp_path / "checkpoints" / str(n), MEMORY)
        rows = contents(copy)
        counts.append(copy.progress.next_offset)
        assert [len(rows[family]) for family in ("events", "users", "items", "due")] == [counts[-1]] * 4
        copy.close()
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_checkpoint_lets_other_threads_run(tmp_path: Path) -> None:
    """Though rocksdict does not: what takes its time is done before."""
    store = Store(tmp_path / "p00003", Memory(State(cache_bytes=1 << 20, write_buffer_bytes=32 << 20)))
    store.claim(META)
    turns: list[float] = []
    done = threading.Event()

    def turn() -> None:
        while not done.wait(0.0005):
            turns.append(time.perf_counter())

    other = threading.Thread(target=turn)
    other.start()
    stalls = []
    for n in range(4):  # one of them finds the machine with nothing else to do
        fill(store, 1000, batches=20)
        start = time.perf_counter()
        store.database.checkpoint(tmp_path / "checkpoints" / str(n))
        end = time.perf_counter()
        within = [start, *(t for t in turns if start < t < end), end]
        stalls.append(max(b - a for a, b in pairwise(within)) / (end - start))
    done.set()
    other.join()
    store.close()
    assert min(stalls) < 0.5  # of the time it took


def test_a_checkpoint_that_is_there_already_and_a_full_parent_have_names(store: Store, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(StreamgrError, match="exists"):
        store.database.checkpoint(tmp_path / "c")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StreamgrError, match="remedy"):
        store.database.checkpoint(tmp_path / "file" / "c")


def test_neither_a_checkpoint_nor_a_restore_on_its_way_looks_like_a_store(
    store: Store, snapshots: Snapshots, target: Path
) -> None:
    checkpoint = take(store, NOW_MS)
    assert checkpoint.directory.stat().st_dev == store.path.stat().st_dev
    assert [path.name for path in store.path.parent.glob("p*")] == ["p00003"]
    snapshot = snapshots.publish(checkpoint).snapshot

    def look() -> None:
        assert list(target.parent.glob("p*")) == []
        assert list(target.parent.iterdir())

    snapshots.restore(snapshot, target, look)


# --- what is wrong with a snapshot


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "story"),
    [
        (damage_missing, "cannot be read: No such file"),
        (damage_truncated, r"damaged \(.*\.sst of the store\): \d+ bytes, not \d+"),
        (damage_flipped, r"damaged \(.*\.sst of the store\): its content has changed"),
    ],
)
def test_a_damaged_file_is_named_and_the_older_snapshot_is_taken(
    store: Store, snapshots: Snapshots, target: Path, damage: Callable[[Path], None], story: str
) -> None:
    rows = contents(store)
    older, newer = two(snapshots, store)
    damage(own_file(newer, older))
    with pytest.raises(DataError, match=story) as caught:
        snapshots.restore(newer, target)
    assert caught.value.exit_code == 65
    assert caught.value.remedy
    assert str(own_file(newer, older)) == caught.value.where
    assert list(target.parent.iterdir()) == []
    manifest, refused = snapshots.restore_newest(ORIGIN, target)
    assert manifest == older.manifest
    assert [str(error) for error in refused] == [str(caught.value)]
    assert contents_at(target) == rows


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated])
def test_the_next_snapshot_brings_again_what_is_missing(
    store: Store, snapshots: Snapshots, target: Path, damage: Callable[[Path], None]
) -> None:
    older, newer = two(snapshots, store)
    damage(own_file(newer, older))
    again = publish(snapshots, store, NOW_MS + 1).snapshot
    assert snapshots.restore_newest(ORIGIN, target) == (again.manifest, [])


def rewritten(snapshot: Snapshot, **fields: Any) -> None:
    """Write the manifest anew with other fields and a right digest."""
    body = msgspec.json.encode(msgspec.to_builtins(snapshot.manifest) | fields)
    digest = blake2b(body, digest_size=32).hexdigest()
    snapshot.path.write_bytes(msgspec.json.encode(Envelope(1, digest, msgspec.Raw(body))))


def test_a_damaged_manifest_is_named_and_the_older_snapshot_is_taken(
    store: Store, snapshots: Snapshots, target: Path
) -> None:
    older, newer = two(snapshots, store)
    text = newer.path.read_bytes()
    flipped = text.replace(b'"next_offset":150', b'"next_offset":151')
    for damaged in (b"", text[:-1], flipped, text.replace(b"events", b"event\xff"), b"[" * 100_000):
        newer.path.write_bytes(damaged)
        found, refused = snapshots.find("events", 3)
        assert found == [older]
        assert [error.where for error in refused] == [str(newer.path)]
        assert "an unreadable manifest" in str(refused[0])
    newer.path.write_bytes(text.replace(b'"format":1', b'"format":2'))
    manifest, refused = snapshots.restore_newest(ORIGIN, target)
    assert manifest == older.manifest
    assert "format 2, this version reads 1" in str(refused[0])


EVIL = [
    "../p00003",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "",
    ".",
    "..",
    ".hidden",
    "a\x00b",
    "a\n",
    "CURRENT\n",
    "ü",
    "x" * 300,
]


@pytest.mark.parametrize("name", EVIL)
def test_a_file_name_that_could_lead_elsewhere_is_refused(
    store: Store, snapshots: Snapshots, target: Path, name: str
) -> None:
    older, newer = two(snapshots, store)
    files: list[list[Any]] = msgspec.to_builtins(newer.manifest)["files"]
    rewritten(newer, files=[*files, [name, *files[0][1:]]])
    manifest, refused = snapshots.restore_newest(ORIGIN, target)
    assert manifest == older.manifest
    assert [error.where for error in refused] == [str(newer.path)]
    assert "not a file of a store" in str(refused[0])
    assert sorted(path.name for path in target.iterdir()) == [file.name for file in older.manifest.files]
    assert [path.name for path in target.parent.iterdir()] == ["p00003"]


def test_digests_that_lead_elsewhere_names_that_come_twice_and_no_database_are_refused(
    store: Store, snapshots: Snapshots, target: Path
) -> None:
    older, newer = two(snapshots, store)
    files: list[list[Any]] = msgspec.to_builtins(newer.manifest)["files"]
    without = [file for file in files if file[0] != "CURRENT"]
    for wrong in (
        [*files, ["x", 1, "../../secret"]],
        [*files, ["x", -1, "0" * 64]],
        [*files, files[0]],
        without,
        [],
        [["CURRENT"]],
        None,
    ):
        rewritten(newer, files=wrong)
        found, refused = snapshots.find("events", 3)
        assert (found, len(refused)) == ([older], 1)
        assert "an unreadable manifest" in str(refused[0])
    assert not target.exists()
    with pytest.raises(ValueError, match="not a file of a store"):
        msgspec.structs.replace(newer.manifest, files=(module.File("../x", 0, "0" * 64),))


@pytest.mark.parametrize(
    ("origin", "story"),
    [
        (Origin("other", "t", "events", 3, 4), "cluster_id is 'c', not 'other'"),
        (Origin("c", "other", "events", 3, 4), "topic_id is 't', not 'other'"),
        (Origin("c", "t", "events", 3, 8), "partitions is 4, not 8"),
    ],
)
def test_a_snapshot_of_another_log_is_refused(
    store: Store, snapshots: Snapshots, target: Path, origin: Origin, story: str
) -> None:
    publish(snapshots, store)
    manifest, refused = snapshots.restore_newest(origin, target)
    assert manifest is None
    assert story in str(refused[0])
    assert not target.exists()


def test_a_snapshot_may_not_lie_where_it_does_not_belong(
    store: Store, snapshots: Snapshots, root: Path, home: Path, target: Path
) -> None:
    publish(snapshots, store)
    home.rename(root / "events" / "p00002")
    manifest, refused = snapshots.restore_newest(Origin("c", "t", "events", 2, 4), target)
    assert manifest is None
    assert "partition is 3, not 2" in str(refused[0])


def test_another_schema_and_the_callers_own_reasons_are_refused(
    store: Store, snapshots: Snapshots, target: Path
) -> None:
    older, newer = two(snapshots, store)
    rewritten(newer, schema=99)
    manifest, refused = snapshots.restore_newest(
        ORIGIN, target, lambda manifest: "" if manifest.next_offset > 100 else "the log starts at 101"
    )
    assert manifest is None
    assert "schema is 99, not" in str(refused[0])
    assert "the log starts at 101" in str(refused[1])
    assert snapshots.restore_newest(ORIGIN, target)[0] == older.manifest


def test_a_target_that_holds_something_is_refused_and_an_empty_one_is_not(
    store: Store, snapshots: Snapshots, target: Path
) -> None:
    snapshot = publish(snapshots, store).snapshot
    with pytest.raises(StateNotWritable, match=r"something is here already.*remedy") as caught:
        snapshots.restore(snapshot, store.path)
    assert caught.value.exit_code == 73
    with pytest.raises(StateNotWritable, match="already"):
        snapshots.restore_newest(ORIGIN, store.path)
    target.mkdir(parents=True)
    snapshots.restore(snapshot, target)
    assert contents_at(target) == contents(store)
    (file := target.parent / "file").write_text("in the way")
    with pytest.raises(StateNotWritable, match="already"):
        snapshots.restore(snapshot, file)
    with pytest.raises(StateNotWritable, match="cannot be written"):
        snapshots.restore(snapshot, file / "p00003")


def test_an_abandoned_restore_leaves_nothing_and_an_earlier_ones_remains_are_removed(
    store: Store, snapshots: Snapshots, target: Path
) -> None:
    snapshot = publish(snapshots, store).snapshot
    turns = iter(range(3))

    def between() -> None:
        if next(turns, None) is None:
            raise TryAgain("told to stop")

    with pytest.raises(TryAgain, match="told to stop"):
        snapshots.restore_newest(ORIGIN, target, between=between)
    assert list(target.parent.iterdir()) == []
    (left := target.with_name(".p00003.restoring")).mkdir()
    (left / "000007.sst").write_text("of a process that was killed")
    snapshots.restore(snapshot, target)
    assert [path.name for path in target.parent.iterdir()] == ["p00003"]
    assert sorted(path.name for path in target.iterdir()) == [file.name for file in snapshot.manifest.files]


class Pair:
    """An older and a newer snapshot, all the bytes they are made of, and where to restore."""

    def __init__(self, directory: Path) -> None:
        store, self.snapshots = opened(directory / "sequencer"), Snapshots(directory / "snapshots")
        fill(store, 20)
        self.older, self.newer = both = two(self.snapshots, store)
        store.close()
        files = sorted({s.content(file) for s in both for file in s.manifest.files if file.size})
        self.original = {path: path.read_bytes() for path in [*(s.path for s in both), *files]}
        self.target = directory / "restored" / "p00003"

    def __repr__(self) -> str:
        return "a pair of snapshots"  # Hypothesis would print all of it


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield Pair(tmp_path_factory.mktemp("pair"))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_found_or_was_not_needed(pair: Pair, which: int, where: int, flip: int) -> None:
    older, newer, original, target = pair.older, pair.newer, pair.original, pair.target
    path = list(original)[which % len(original)]
    damaged = bytearray(original[path])
    damaged[where % len(damaged)] ^= flip
    path.write_bytes(damaged)
    try:
        manifest, refused = pair.snapshots.restore_newest(ORIGIN, target)
        needs = {s.path: {s.path, *(s.content(file) for file in s.manifest.files)} for s in (newer, older)}
        sound = [s.manifest for s in (newer, older) if path not in needs[s.path]]
        assert manifest == (sound[0] if sound else None)
        assert bool(refused) == (manifest != newer.manifest or path == older.path)
        for file in manifest.files if manifest else ():
            assert (target / file.name).read_bytes() == original.get(newer.content(file), b"")
    finally:
        path.write_bytes(original[path])
        shutil.rmtree(target, ignore_errors=True)


# --- crashes, neighbours, tidying up


KILLED = """
import os, signal, sys
from pathlib import Path
import msgspec
from streamgr.state.snapshot import Checkpoint, Facts, Snapshots
directory, root, after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
steps = 0
def step(real):
    def stepped(*arguments, **named):
        global steps
        steps += 1
        if steps > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return stepped
for name in ("fsync", "utime", "replace", "rename"):
    setattr(os, name, step(getattr(os, name)))
facts = msgspec.json.decode(sys.stdin.buffer.read(), type=Facts)
Snapshots(root).publish(Checkpoint(directory, facts), step(lambda: None))
print(steps)
"""


def publish_elsewhere(checkpoint: Checkpoint, root: Path, after: int) -> subprocess.CompletedProcess[bytes]:
    """Publish in a process that is killed after so many steps."""
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(checkpoint.directory), str(root), str(after)],
        input=msgspec.json.encode(checkpoint.facts),
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_a_publisher_killed_at_any_step_leaves_no_snapshot_and_the_next_one_works(
    store: Store, tmp_path: Path, target: Path
) -> None:
    checkpoint = take(store, NOW_MS)
    steps = int(publish_elsewhere(checkpoint, tmp_path / "whole", 10_000).stdout)
    for after in sorted({0, 1, 3, steps // 4, steps // 2, *range(steps - 6, steps)}):
        root = tmp_path / str(after)
        killed = publish_elsewhere(checkpoint, root, after)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        found, refused = Snapshots(root).find("events", 3)
        assert (len(found), refused) == (after >= steps - 2, [])  # 2: its directory is synced, then tidied up
        published = Snapshots(root).publish(take(store, NOW_MS + 1))
        assert published.problems == []
        assert Snapshots(root).restore_newest(ORIGIN, target / str(after)) == (published.snapshot.manifest, [])


NEIGHBOUR = """
import sys
from pathlib import Path
from tests.state.test_snapshot import NOW_MS, Snapshots, fill, opened, take
store, snapshots = opened(Path(sys.argv[1])), Snapshots(Path(sys.argv[2]))
for n in range(int(sys.argv[3])):
    fill(store, 40)
    published = snapshots.publish(take(store, NOW_MS + n))
    assert not published.problems, published.problems
store.close()
"""


def test_two_processes_that_publish_the_same_partition_do_not_disturb_each_other(
    tmp_path: Path, root: Path, target: Path, repository: Path
) -> None:
    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", NEIGHBOUR, str(tmp_path / name), str(root), "12"]
        return subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE)

    neighbours = [start("old"), start("new")]
    for neighbour in neighbours:
        _, errors = neighbour.communicate(timeout=60)
        assert neighbour.returncode == 0, errors
    snapshots = Snapshots(root)
    found, refused = snapshots.find("events", 3)
    assert refused == []
    manifest, refused = snapshots.restore_newest(ORIGIN, target)
    assert manifest == found[0].manifest
    assert refused == []
    assert Store(target, MEMORY, read_only=True).progress.next_offset == manifest.next_offset


def age(home: Path, seconds: float = 2 * HOUR) -> None:
    for path in [*home.glob("*.json"), *(home / "files").iterdir()]:
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def test_the_newest_snapshots_stay_with_what_they_need_and_old_files_go(
    store: Store, snapshots: Snapshots, home: Path, target: Path
) -> None:
    first, second = two(snapshots, store)
    fill(store, 50)
    third = publish(snapshots, store)
    assert [s.path for s in snapshots.find("events", 3)[0]] == [third.snapshot.path, second.path]
    assert all(first.content(file).exists() for file in first.manifest.files)  # they are young
    age(home)
    fill(store, 50)
    fourth = publish(snapshots, store)
    assert fourth.problems == []
    kept = {file.digest for s in (third.snapshot, fourth.snapshot) for file in s.manifest.files}
    assert {path.name for path in (home / "files").iterdir()} == kept
    assert not kept.issuperset(file.digest for file in first.manifest.files)
    for snapshot in (third.snapshot, fourth.snapshot):
        snapshots.restore(snapshot, target.with_name(snapshot.path.name))


def test_what_nobody_named_yet_stays_for_an_hour_and_what_is_unfinished_too(
    store: Store, snapshots: Snapshots, home: Path
) -> None:
    publish(snapshots, store)
    strangers = [home / "files" / ("0" * 64), home / "files" / f"{'1' * 64}.ab.tmp", home / "x.json.cd.tmp"]
    others = [home / "files" / "README", home / "notes.txt"]
    for path in [*strangers, *others]:
        path.write_text("somebody else's")
    publish(snapshots, store, NOW_MS + 1)
    assert all(path.exists() for path in strangers)
    for path in [*strangers, *others]:
        os.utime(path, (0, 0))
    assert publish(snapshots, store, NOW_MS + 2).problems == []
    assert [path.exists() for path in strangers] == [False] * 3
    assert all(path.exists() for path in others)


def test_a_file_that_is_wanted_again_is_young_again(
    store: Store, snapshots: Snapshots, home: Path, target: Path, tmp_path: Path
) -> None:
    """Another publisher, who knows no manifest that names it, tidies up before ours is there."""
    publish(snapshots, store).snapshot.path.unlink()
    age(home)
    other = opened(tmp_path / "zombie")
    fill(other, 30)
    elsewhere, tidied = take(other, NOW_MS), []
    other.close()

    def between() -> None:
        if not tidied:  # we read CURRENT, which comes after the SSTs
            tidied.append(Snapshots(snapshots._root).publish(elsewhere))

    published = snapshots.publish(take(store, NOW_MS + 1), between)
    assert tidied[0].problems == []
    assert snapshots.restore_newest(ORIGIN, target) == (published.snapshot.manifest, [])


def test_a_file_that_is_gone_before_its_manifest_is_there_prevents_it(
    store: Store, snapshots: Snapshots, home: Path, target: Path
) -> None:
    older = publish(snapshots, store).snapshot
    fill(store, 50)
    checkpoint = take(store, NOW_MS)

    def between() -> None:
        for file in older.manifest.files:
            if file.name.endswith(".sst"):
                older.content(file).unlink(missing_ok=True)

    with pytest.raises(StateNotWritable, match=r"No such file.*remedy"):
        snapshots.publish(checkpoint, between)
    assert snapshots.find("events", 3)[0] == [older]
    again = snapshots.publish(checkpoint).snapshot
    assert snapshots.restore_newest(ORIGIN, target) == (again.manifest, [])


def test_a_manifest_that_cannot_be_read_keeps_everything_where_it_is(
    store: Store, snapshots: Snapshots, home: Path, target: Path
) -> None:
    """Another version's may name any file; removing those would destroy its snapshot."""
    first, _ = two(snapshots, store)
    text = first.path.read_bytes()
    first.path.write_bytes(text.replace(b'"format":1', b'"format":2'))
    age(home)
    fill(store, 50)
    published = publish(snapshots, store)
    assert [(problem.where, "format 2" in str(problem)) for problem in published.problems] == [(str(first.path), True)]
    first.path.write_bytes(text)
    snapshots.restore(first, target)
    age(home)
    assert publish(snapshots, store, NOW_MS + 1).problems == []
    assert not first.path.exists()


def test_snapshots_of_a_recreated_topic_are_kept_beside_the_old_ones(
    store: Store, snapshots: Snapshots, tmp_path: Path, target: Path
) -> None:
    """Its offsets start again, so by offset alone the old ones would push the new ones out."""
    two(snapshots, store)
    again = Store(tmp_path / "again" / "p00003", MEMORY)
    again.claim(msgspec.structs.replace(META, topic_id="u"))
    for rows in (10, 5, 5):
        fill(again, rows)
        newest = publish(snapshots, again).snapshot
    again.close()
    found, _ = snapshots.find("events", 3)
    assert [(s.manifest.origin.topic_id, s.manifest.next_offset) for s in found] == [
        ("t", 150),
        ("t", 100),
        ("u", 20),
        ("u", 15),
    ]
    manifest, refused = snapshots.restore_newest(newest.manifest.origin, target)
    assert manifest == newest.manifest
    assert len(refused) == 2


def test_a_snapshot_that_lost_its_files_does_not_count_among_those_to_keep(store: Store, snapshots: Snapshots) -> None:
    older, newer = two(snapshots, store)
    own_file(newer, older).unlink()
    other = opened(store.path.parents[1] / "zombie")
    fill(other, 120)
    published = publish(snapshots, other)
    other.close()
    assert [s.path for s in snapshots.find("events", 3)[0]] == [newer.path, published.snapshot.path, older.path]


# --- in the background


def wait_for(uploader: Uploader, count: int = 1) -> list[Upload]:
    results: list[Upload] = []
    deadline = Deadline(SystemClock(), 30)
    while len(results) < count and not deadline.passed():
        results += uploader.results()
        time.sleep(0.005)
    return results


def closed(uploader: Uploader) -> bool:
    return uploader.close(Deadline(SystemClock(), 10))


class Held(Snapshots):
    """Publishes nothing until it is let go; meanwhile it asks between blocks whether to go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.begun, self.let_go = threading.Event(), threading.Event()

    def publish(self, checkpoint: Checkpoint, between: module.Between = lambda: None) -> Published:
        self.begun.set()
        while not self.let_go.wait(0.001):
            between()
        return super().publish(checkpoint, between)


def test_an_upload_is_reported_and_its_checkpoint_removed(store: Store, snapshots: Snapshots, target: Path) -> None:
    uploader = Uploader(snapshots)
    checkpoint = take(store, NOW_MS)
    uploader.submit(checkpoint)
    [upload] = wait_for(uploader)
    assert upload.checkpoint == checkpoint
    assert isinstance(upload.outcome, Published)
    assert not checkpoint.directory.exists()
    assert snapshots.restore_newest(ORIGIN, target) == (upload.outcome.snapshot.manifest, [])
    assert closed(uploader)
    assert uploader.results() == []


def test_at_most_one_checkpoint_of_a_partition_waits_and_it_is_the_newest(store: Store, root: Path) -> None:
    held = Held(root)
    uploader = Uploader(held)
    assert not uploader.busy(ORIGIN)
    checkpoints = []
    for _ in range(4):
        fill(store, 10)
        checkpoints.append(take(store, NOW_MS))
    uploader.submit(checkpoints[0])
    assert held.begun.wait(10)
    for checkpoint in checkpoints[1:]:
        uploader.submit(checkpoint)
        assert uploader.busy(ORIGIN)
    assert [checkpoint.directory.exists() for checkpoint in checkpoints] == [True, False, False, True]
    held.let_go.set()
    uploads = wait_for(uploader, 4)
    assert [u.checkpoint for u in uploads] == [checkpoints[n] for n in (1, 2, 0, 3)]
    assert [type(u.outcome) for u in uploads] == [TryAgain, TryAgain, Published, Published]
    assert "another came first" in str(uploads[0].outcome)
    assert closed(uploader)
    assert not uploader.busy(ORIGIN)
    assert [checkpoint.directory.exists() for checkpoint in checkpoints] == [False] * 4


def test_leaving_abandons_what_is_under_way_and_what_waits(store: Store, root: Path) -> None:
    held = Held(root)
    uploader = Uploader(held)
    checkpoints = [take(store, NOW_MS), take(store, NOW_MS), take(store, NOW_MS)]
    uploader.submit(checkpoints[0])
    assert held.begun.wait(10)
    uploader.submit(checkpoints[1])
    start = time.monotonic()
    assert closed(uploader)
    assert time.monotonic() - start < 5
    uploader.submit(checkpoints[2])  # too late
    outcomes = [u.outcome for u in uploader.results()]
    assert [type(outcome) for outcome in outcomes] == [TryAgain] * 3
    assert "the role leaves" in str(outcomes[0])
    assert [checkpoint.directory.exists() for checkpoint in checkpoints] == [False] * 3
    assert held.find("events", 3) == ([], [])


def test_a_drain_does_not_wait_for_a_volume_that_hangs(
    store: Store, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, reached = threading.Event(), threading.Event()

    def publish(checkpoint: Checkpoint, between: module.Between) -> Published:
        reached.set()
        hangs.wait(30)
        raise TryAgain("at last")

    monkeypatch.setattr(snapshots, "publish", publish)
    uploader = Uploader(snapshots)
    uploader.submit(take(store, NOW_MS))
    assert reached.wait(10)
    start = time.monotonic()
    assert not uploader.close(Deadline(SystemClock(), 0.1))
    assert time.monotonic() - start < 5
    hangs.set()
    assert closed(uploader)


def test_an_upload_is_abandoned_between_two_blocks_of_one_file(
    store: Store, snapshots: Snapshots, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    checkpoint = take(store, NOW_MS)
    blocks = 0

    def between() -> None:
        nonlocal blocks
        blocks += 1
        if blocks == 200:
            raise TryAgain("enough")

    with pytest.raises(TryAgain, match="enough"):
        snapshots.publish(checkpoint, between)
    assert snapshots.find("events", 3) == ([], [])
    assert [path.name for path in (home / "files").iterdir() if path.suffix == ".tmp"] == []
    assert snapshots.publish(checkpoint).problems == []


def test_a_root_that_cannot_be_written_is_reported_and_the_uploader_goes_on(store: Store, root: Path) -> None:
    root.write_text("in the way")
    uploader = Uploader(Snapshots(root))
    checkpoint = take(store, NOW_MS)
    uploader.submit(checkpoint)
    [failed] = wait_for(uploader)
    assert isinstance(failed.outcome, StateNotWritable)
    assert failed.outcome.remedy
    assert not checkpoint.directory.exists()
    root.unlink()
    uploader.submit(take(store, NOW_MS))
    [upload] = wait_for(uploader)
    assert isinstance(upload.outcome, Published)
    assert closed(uploader)


def test_a_bug_in_publishing_is_reported_too(
    store: Store, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(checkpoint: Checkpoint, between: module.Between) -> Published:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(snapshots, "publish", publish)
    uploader = Uploader(snapshots)
    uploader.submit(take(store, NOW_MS))
    [upload] = wait_for(uploader)
    assert "ZeroDivisionError: oops" in str(upload.outcome)
    assert closed(uploader)


FULL_ROOT = """
import resource, sys, time
from pathlib import Path
from tests.state.test_snapshot import NOW_MS, Published, Snapshots, Uploader, closed, fill, opened, take, wait_for
store = opened(Path(sys.argv[1]))
fill(store, 4000)
checkpoint, root = take(store, NOW_MS), Path(sys.argv[2])
uploader = Uploader(Snapshots(root))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
uploader.submit(checkpoint)
[upload] = wait_for(uploader)
print(type(upload.outcome).__name__, checkpoint.directory.exists(), len(list(root.rglob("*.tmp"))))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
fill(store, 1)
uploader.submit(take(store, NOW_MS))
[upload] = wait_for(uploader)
print(type(upload.outcome).__name__, closed(uploader))
store.close()
"""


def test_a_full_root_is_reported_and_the_next_snapshot_goes_on_where_it_was(
    tmp_path: Path, root: Path, repository: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_ROOT, str(tmp_path / "sequencer"), str(root)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["StateNotWritable False 0", "Published True"]


def test_what_a_killed_process_left_beside_the_store_goes_an_hour_later(store: Store, snapshots: Snapshots) -> None:
    now_ms = time.time_ns() // 1_000_000  # noqa: TID251
    left, young = take(store, now_ms), take(store, now_ms)
    os.utime(left.directory, (0, 0))
    uploader = Uploader(snapshots)
    uploader.submit(take(store, now_ms))
    wait_for(uploader)
    assert closed(uploader)
    assert [left.directory.exists(), young.directory.exists()] == [False, True]


def test_a_manifest_goes_through_json_unchanged(store: Store, snapshots: Snapshots) -> None:
    manifest = publish(snapshots, store).snapshot.manifest
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest) == manifest
