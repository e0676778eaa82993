"""RocksDB as we use it: one database a partition, a few column families, raw bytes.

The one file that knows rocksdict and its traps. Iterator bounds are never set: rocksdict sets the upper one for the
lower, and keeps pointers into freed memory. Scans stay inside a key's prefix by the prefix extractor instead
(`prefix_same_as_start`). Its iterators end at a damaged block as if there were no more: we ask for their status. Errors
come as bare exceptions, so their text is read here and nowhere else. All databases of a process share one hyper-clock
block cache (an LRU's shards are smaller than a filter block, which is then read again on every look-up) and one write
buffer budget.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    Checkpoint,
    ColumnFamily,
    DBCompressionType,
    Options,
    Rdict,
    ReadOptions,
    SliceTransform,
    WriteBatch,
    WriteBufferManager,
)

from streamgr.config import State
from streamgr.errors import Damaged, DataError, StateNotWritable, StreamgrError, TryAgain

MAX_OPEN_FILES = 256  # a database
CONDEMNED = "DAMAGED"  # the file beside the database's own that says what was found out in use


class Memory:
    """What all databases of a process share: the block cache and the budget of their write buffers."""

    def __init__(self, settings: State) -> None:
        self.cache = Cache.new_hyper_clock_cache(settings.cache_bytes, 16_384)
        self.buffers = WriteBufferManager(8 * settings.write_buffer_bytes, False)
        self.write_buffer_bytes = settings.write_buffer_bytes


class Batch:
    """Changes that are written together or not at all, in the order given."""

    def __init__(self, families: Mapping[str, ColumnFamily]) -> None:
        self._families = families
        self._batch = WriteBatch(raw_mode=True)

    def put(self, family: str, key: bytes, value: bytes) -> None:
        self._batch.put(key, value, self._families[family])

    def put_all(self, family: str, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        put, handle = self._batch.put, self._families[family]
        for key, value in pairs:
            put(key, value, handle)

    def delete(self, family: str, key: bytes) -> None:
        self._batch.delete(key, self._families[family])

    def delete_prefix(self, family: str, prefix: bytes, longest: int) -> None:
        """Delete every key that starts with `prefix` and is at most `longest` bytes long."""
        self._batch.delete_range(prefix, prefix + b"\xff" * (longest - len(prefix) + 1), self._families[family])

    def take(self) -> WriteBatch:
        return self._batch


class Database:
    """One open RocksDB. `families` maps each column family to its keys' prefix length (0: no prefix scans).

    Raises `TryAgain` where another process holds the lock, `StateNotWritable` where the directory cannot be written,
    `Damaged` where the files are damaged, `DataError` where (`read_only`) there are none.
    """

    def __init__(self, path: Path, memory: Memory, families: Mapping[str, int], *, read_only: bool = False) -> None:
        self.path, self._read_only = path, read_only
        if read_only and not (path / "CURRENT").exists():
            raise DataError("no database here", where=str(path), remedy="give the value of state.directory")
        if not read_only:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _unwritable(str(error.strerror), path) from None
        access = AccessType.read_only(False) if read_only else AccessType.read_write()
        with self._naming():
            self._db = Rdict(
                str(path),
                _options(memory, 0),
                column_families={name: _options(memory, prefix) for name, prefix in families.items()},
                access_type=access,
            )
            self._families = {name: self._db.get_column_family(name) for name in families}
            self._handles = {name: self._db.get_column_family_handle(name) for name in families}
        self._within_prefix = ReadOptions()
        self._within_prefix.set_prefix_same_as_start(True)
        self._everything = ReadOptions()
        self._everything.set_total_order_seek(True)

    def get(self, family: str, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._families[family].get(key)
        except Exception as error:
            raise self._named(error) from error
        return value

    def get_many(self, family: str, keys: Sequence[bytes]) -> list[bytes | None]:
        try:
            values = self._families[family].get(list(keys)) if keys else []
        except Exception as error:
            raise self._named(error) from error
        return cast("list[bytes | None]", values)

    def scan_prefix(self, family: str, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys from `start` on, ascending, as long as they share its prefix."""
        yield from self._walk(family, start, self._within_prefix)

    def scan(self, family: str, start: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Every key, or every one from `start` on, ascending."""
        yield from self._walk(family, start, self._everything)

    def _walk(self, family: str, start: bytes | None, how: ReadOptions) -> Iterator[tuple[bytes, bytes]]:
        """From `start` on. `Rdict.items` ends at a damaged block as at the end: here it makes a difference."""
        try:
            cursor = self._families[family].iter(how)
            if start is None:
                cursor.seek_to_first()
            else:
                cursor.seek(start)
            while cursor.valid():
                yield cursor.key(), cursor.value()
                cursor.next()
            cursor.status()
        except Exception as error:
            raise self._named(error) from error

    def batch(self) -> Batch:
        return Batch(self._handles)

    def write(self, batch: Batch) -> None:
        """All of the batch or nothing. It survives a killed process; `sync` makes it survive a power failure."""
        try:
            self._db.write(batch.take())
        except Exception as error:
            raise self._named(error) from error

    def sync(self) -> None:
        with self._naming():
            self._db.flush_wal(True)

    def checkpoint(self, directory: Path) -> None:
        """All that is written so far, as a database of its own in `directory`, which must not exist yet.

        It shares the immutable files by hard links, so it lies on the same file system. Raises as `write` does.
        """
        with self._naming():
            directory.parent.mkdir(parents=True, exist_ok=True)
            for family in self._families.values():
                family.flush()  # lets other threads run; the checkpoint, which would do it too, does not
            Checkpoint(self._db).create_checkpoint(str(directory))

    def compact(self) -> None:
        """Merge all files now, rather than when RocksDB gets to it."""
        with self._naming():
            for family in self._families.values():
                family.flush()
                family.compact_range(None, None)

    def size_bytes(self) -> int:
        """What the files of all families take on the disk, about."""
        sizes = (family.property_int_value("rocksdb.total-sst-files-size") for family in self._families.values())
        return sum(size or 0 for size in sizes)

    def close(self) -> None:
        """Release the lock; again is harmless. Nothing of this database may be used afterwards."""
        if not self._families:
            return
        self._families.clear()
        self._handles.clear()
        with self._naming():
            self._db.close()

    def condemn(self) -> None:
        """It is damaged: whoever opens it next for writing is to know."""
        if not self._read_only:
            with suppress(OSError):
                (self.path / CONDEMNED).touch()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._named(error) from error

    def _named(self, error: Exception) -> StreamgrError:
        """An error of rocksdict's, which raises nothing narrower, under its name."""
        if isinstance(error, StreamgrError):
            return error
        named = _named(error, self.path, self._read_only)
        if isinstance(named, Damaged):
            self.condemn()
        return named


def _options(memory: Memory, prefix: int) -> Options:
    table = BlockBasedOptions()
    table.set_block_cache(memory.cache)
    table.set_block_size(16 << 10)
    table.set_bloom_filter(10, False)
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    options.set_block_based_table_factory(table)
    options.set_write_buffer_manager(memory.buffers)
    options.set_write_buffer_size(memory.write_buffer_bytes)
    options.set_max_write_buffer_number(3)
    options.set_level_compaction_dynamic_level_bytes(True)
    options.set_compression_type(DBCompressionType.lz4())
    options.set_bottommost_compression_type(DBCompressionType.zstd())
    options.set_max_background_jobs(2)
    options.set_max_open_files(MAX_OPEN_FILES)
    options.set_stats_dump_period_sec(600)
    options.set_keep_log_file_num(3)
    if prefix:
        options.set_prefix_extractor(SliceTransform.create_fixed_prefix(prefix))
    return options


def _named(error: Exception, path: Path, read_only: bool) -> StreamgrError:
    """RocksDB says what happened in words only: find the situation in them."""
    text = str(error)
    if "lock" in text.lower() and ("LOCK" in text or "hold" in text):
        return TryAgain(
            "another process holds this database", where=str(path), remedy="stop the other one, or wait until it leaves"
        )
    if read_only and "IO error" in text:
        return TryAgain(f"its writer is moving files: {text}", where=str(path), remedy="ask again")
    if any(word in text for word in ("No space left", "Permission denied", "Read-only file system", "Disk quota")):
        return _unwritable(text, path)
    if any(word in text for word in ("Corruption", "checksum", "No such file or directory", "does not exist")):
        return Damaged(f"the database is damaged: {text}", where=str(path))
    if "IO error" in text or "Shutdown in progress" in text or "os error" in text:
        return _unwritable(text, path)
    return StreamgrError(f"{type(error).__name__}: {text}", where=str(path), remedy="see the file LOG in it")


def _unwritable(text: str, path: Path) -> StateNotWritable:
    return StateNotWritable(
        f"cannot write the state: {text}",
        where=str(path),
        remedy="free space or fix the permissions of state.directory, then start again: it goes on where it was",
    )
