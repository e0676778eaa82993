"""What this machine and this configuration bring with them."""

import os
import platform
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from streamgr import __version__, sanity
from streamgr.config import ENV_PREFIX, SECRET, flatten
from streamgr.doctor.case import Case, fail, ok, warn
from streamgr.errors import ConfigError, StateNotWritable
from streamgr.kafka.security import security
from streamgr.sanity import Finding
from streamgr.state.rocks import MAX_OPEN_FILES
from streamgr.state.snapshot import partitions_in

LITTLE_BYTES, TOO_LITTLE_BYTES = 2 << 30, 256 << 20
SPARE_FILES = 256  # sockets, logs, libraries


def installation(case: Case) -> Iterator[Finding]:
    """What a report of a problem begins with."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("confluent-kafka", "rocksdict"))
    yield ok("installation", f"streamgr {__version__}, Python {platform.python_version()}, {packages}")


def configuration(case: Case) -> Iterator[Finding]:
    """Read, and nothing in it against the rest."""
    found = list(sanity.findings(case.config))
    yield from found
    if not found:
        yield ok("configuration", f"{len(case.origin)} keys set, nothing against the rest")


def secrets(case: Case) -> Iterator[Finding]:
    """In files that only we can read."""
    found = 0
    for name, path in case.environ.items():
        if name.startswith(ENV_PREFIX) and name.endswith("_FILE") and "__" in name:
            found += 1
            if Path(path).stat().st_mode & stat.S_IROTH:
                yield warn("secrets", f"{path} (${name}) can be read by everybody", f"chmod 0400 {path}")
            else:
                yield ok("secrets", f"{path} (${name}) is read")
    given = {key for key, value in flatten(case.config).items() if value == "***"}
    clear = sorted(key for key in given if not case.origin.get(key, "").endswith("_FILE"))
    for key in clear:
        where = case.origin.get(key, "the configuration")
        variable = f"{ENV_PREFIX}{key.replace('.', '__').upper()}_FILE"
        yield warn("secrets", f"{key} stands in clear in {where}", f"put it into a file of its own: {variable}")
    if inside := sorted(name for name in case.config.kafka.librdkafka if SECRET.search(name)):
        remedy = "the password has a key of its own: STREAMGR_KAFKA__SASL_PASSWORD_FILE"
        yield warn("secrets", f"kafka.librdkafka holds {', '.join(inside)} in clear", remedy)
    security(case.config.kafka).ssl_context()  # names a file that cannot be used
    if not found and not given:
        yield ok("secrets", "none are given")


def directories(case: Case) -> Iterator[Finding]:
    """Written to by whoever runs the roles: run the doctor as that user."""
    for key, path in _directories(case):
        there = _nearest(path)
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            what = f"{key}: {there} cannot be written: {error.strerror}"
            yield fail("directories", what, f"fix its owner ({os.getuid()} asks) or mount", StateNotWritable.exit_code)
        else:
            yield ok("directories", f"{key}: {path} {'is writable' if there == path else 'can be made'}")


def disk(case: Case) -> Iterator[Finding]:
    """Room for what is written: compaction takes some for a while, too."""
    for key, path in _directories(case):
        usage = shutil.disk_usage(_nearest(path))
        what = f"{key}: {usage.free / (1 << 30):.1f} GiB free of {usage.total / (1 << 30):.1f}"
        remedy = "free space or give a larger volume: a full disk stops the role"
        if usage.free < TOO_LITTLE_BYTES:
            yield fail("disk", what, remedy, StateNotWritable.exit_code)
        elif usage.free < max(LITTLE_BYTES, usage.total // 20):
            yield warn("disk", what, remedy)
        else:
            yield ok("disk", what)


def open_files(case: Case) -> Iterator[Finding]:
    """Each partition's database keeps some open, each HTTP connection one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    roles = {role: partitions_in(case.config.role_directory(role)) for role in ("sequencer", "scorer")}
    partitions = max([len(paths) for paths in roles.values()] + [1])
    wanted = partitions * MAX_OPEN_FILES + case.config.scorer.max_connections + SPARE_FILES
    what = f"the limit is {limit}, {partitions} partitions and their clients may want {wanted}"
    if 0 <= limit < wanted:
        yield warn("open files", what, f"ulimit -n {max(65_536, wanted)}, LimitNOFILE= or ulimits: of the container")
    else:
        yield ok("open files", what)


def _directories(case: Case) -> Iterator[tuple[str, Path]]:
    state = case.config.state
    yield "state.directory", Path(state.directory).absolute()
    if state.snapshots_directory:
        yield "state.snapshots_directory", Path(state.snapshots_directory).absolute()


def _nearest(path: Path) -> Path:
    """The path, or what of it there is."""
    for candidate in (path, *path.parents):
        if candidate.exists():
            return candidate
    raise ConfigError("not even its root is there", where=str(path), remedy="mount it")
