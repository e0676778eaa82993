"""What lies in the state directory: whether it opens, whether this version reads it, and who holds it."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from streamgr.config import State
from streamgr.doctor.case import Case, age, fail, ok, warn
from streamgr.errors import DataError, StreamgrError
from streamgr.sanity import Finding
from streamgr.state import codec
from streamgr.state.rocks import Memory
from streamgr.state.snapshot import partitions_in
from streamgr.state.store import Store, is_condemned

ROLES = ("sequencer", "scorer")
SAMPLE = 100  # events of a store whose format is looked at


def stores(case: Case) -> Iterator[Finding]:
    """Opened beside whoever holds them; a little of each is read. `state verify` reads all of it."""
    memory, found = Memory(State()), 0
    for role in ROLES:
        for path in partitions_in(case.config.role_directory(role)):
            found += 1
            if is_condemned(path):
                yield warn("stores", f"{path} was found damaged", f"start the {role}: it sets it aside and rebuilds it")
                continue
            try:
                yield ok("stores", f"{_opened(path, memory)}; {_held(path / 'LOCK')}")
            except StreamgrError as error:
                yield fail("stores", f"{error.where}: {error.what}", error.remedy, error.exit_code)
    if not found:
        yield ok("stores", f"none yet below {case.config.state.directory}")


def checkpoints(case: Case) -> Iterator[Finding]:
    """The trainer's newest, every byte of it."""
    directory = case.config.role_directory("trainer")
    if not directory.exists():
        yield ok("checkpoints", "none yet: no trainer has run here")
        return
    from streamgr.train import checkpoint

    newest = checkpoint.newest(directory / "checkpoints")
    if newest is None:
        yield ok("checkpoints", f"none yet; {_held(directory / 'lock')}")
        return
    path, facts, problems = newest
    for problem in problems:
        yield warn("checkpoints", f"{problem.where}: {problem.what}", problem.remedy)
    if facts is None:
        remedy = "restore the directory from a backup, or remove the trainer's state to train anew"
        yield fail("checkpoints", f"none below {path} can be read", remedy, DataError.exit_code)
        return
    old = max(0.0, (case.clock.now_ms() - facts.written_ms) / 1000)
    said = f"step {facts.step}, version {facts.version}, written {age(old)} ago; {_held(directory / 'lock')}"
    yield ok("checkpoints", said)


def _opened(path: Path, memory: Memory) -> str:
    """What a store says of itself. Raises where it cannot be opened or read."""
    store = Store(path, memory, read_only=True)
    try:
        if store.meta is None:
            return f"{path} opens, and is empty"
        for _, value in islice(store.database.scan("events"), SAMPLE):
            codec.decode_event(value)
        size, where = store.database.size_bytes() / (1 << 20), f"{store.meta.topic}[{store.meta.partition}]"
        return f"{path} opens: {where} up to {store.progress.next_offset}, {size:.1f} MiB"
    finally:
        store.close()


def _held(lock: Path) -> str:
    """Who holds a lock file, as the kernel tells: in another container it tells no name."""
    try:
        inode = lock.stat().st_ino
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return "held by nobody"
    for line in lines:
        fields = line.split()  # 1: POSIX ADVISORY WRITE 4711 08:01:123456 0 EOF
        if "->" not in fields and fields[5].rpartition(":")[2] == str(inode):
            return f"held by process {fields[4]} ({_command(fields[4])})"
    return "held by nobody"


def _command(pid: str) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "of another container"
    return " ".join(Path(word).name if "/" in word else word for word in words if word)[:80] or "it has just left"
