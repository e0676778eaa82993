"""How fast a partition's state comes back: `make bench-restore`.

    replay      `sequencer --until-end` from nothing: the log is read again, examples included
    follow      the same log into a follower's store (a scorer): nothing is emitted
    checkpoint  hard links of a store between two commits, the loop held up meanwhile; each partition
    publish     the first snapshot of all partitions: everything is hashed and copied
    restore     verified copies of all partitions from the shared directory, and opening them

Snapshots lie on the same disk as the state here; a network volume adds its own time.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from streamgr.clock import SystemClock
from streamgr.config import Config, Kafka, State, Telemetry
from streamgr.sequence.follower import Follower
from streamgr.sequence.views import store_paths
from streamgr.state.rocks import Memory
from streamgr.state.snapshot import Snapshots, take
from streamgr.state.store import Store
from streamgr.telemetry import Log
from tests.bench.kit import Json, broker, disk_bytes, machine, publish, report, run, settings
from tests.bench.traffic import Traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", default="1000000", help="how many, or several sizes")
    args = parser.parse_args()
    found: Json = {"machine": machine(), "runs": []}
    with broker() as (bootstrap, directory):
        for events in (int(n) for n in args.events.split(",")):
            found["runs"].append(measure(bootstrap, directory / str(events), events))
            shutil.rmtree(directory / str(events))
            print(found["runs"][-1], file=sys.stderr)
    report("bench-restore", found)


def measure(bootstrap: str, directory: Path, events: int) -> Json:
    prefix, state, shared = f"r{events}", directory / "state", directory / "shared"
    publish(bootstrap, prefix, Traffic(events))
    one: Json = {"events": events}
    environ = settings(bootstrap, prefix, state)
    replay = run("streamgr", "sequencer", "--until-end", environ=environ)
    seconds = replay.between("partitions_assigned", "partitions_closed")
    one["replay"] = {"seconds": round(seconds, 2), "events_per_second": round(events / seconds)}
    one["follow"] = follow(bootstrap, prefix, directory / "follower", events)
    one["bytes"] = disk_bytes(state)
    one["checkpoint"], one["publish"] = snapshots(state, shared)
    shutil.rmtree(state)
    started = time.perf_counter()
    restored = run("streamgr", "state", "restore", str(shared), environ=environ)
    one["restore"] = {"seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(restored.cpu, 2)}
    started = time.perf_counter()
    for path in store_paths(state / "sequencer"):
        Store(path, Memory(State())).close()
    one["open_seconds"] = round(time.perf_counter() - started, 3)
    return one


def follow(bootstrap: str, prefix: str, directory: Path, events: int) -> Json:
    config = Config(
        kafka=Kafka(bootstrap=bootstrap, topic_prefix=prefix),
        state=State(directory=str(directory)),
        telemetry=Telemetry(log_level="error"),
    )
    clock = SystemClock()
    follower = Follower(config, clock, Log("bench", config.telemetry, clock))
    follower.open()
    started = time.perf_counter()
    while not follower.caught_up():
        follower.step()
    seconds = time.perf_counter() - started
    follower.close()
    return {"seconds": round(seconds, 2), "events_per_second": round(events / seconds)}


def snapshots(state: Path, shared: Path) -> tuple[Json, Json]:
    clock, published = SystemClock(), Snapshots(shared)
    checkpoints, copies = [], []
    for path in store_paths(state / "sequencer"):
        store = Store(path, Memory(State()))
        started = time.perf_counter()
        checkpoint = take(store, clock.now_ms())
        checkpoints.append(time.perf_counter() - started)
        store.close()
        started = time.perf_counter()
        done = published.publish(checkpoint)
        copies.append((time.perf_counter() - started, done.copied_bytes))
        checkpoint.remove()
    seconds, copied = sum(s for s, _ in copies), sum(b for _, b in copies)
    return (
        {"milliseconds": [round(s * 1000, 1) for s in checkpoints]},
        {"seconds": round(seconds, 2), "mib_per_second": round(copied / 2**20 / seconds)},
    )


if __name__ == "__main__":
    main()
