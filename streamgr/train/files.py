"""Files that survive the machine: what is in them, and, which is another thing, that they are there."""

import os
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Put `data` into a new file and onto the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: files created, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
