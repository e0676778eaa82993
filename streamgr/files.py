"""Files that survive the machine: what is in them, and, which is another thing, that they are there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

UNFINISHED = ".tmp"


def write(path: Path, data: bytes) -> None:
    """Put `data` into a new file and onto the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A new file that appears under its name when it is complete and on the disk, or not at all."""
    unfinished = path.with_name(f"{path.name}.{token_hex(8)}{UNFINISHED}")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: files created, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
