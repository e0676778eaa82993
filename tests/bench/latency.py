"""From the broker's append to the sequence, event by event: `make bench-latency`.

A sequencer with a commit interval of 200 ms reads while a producer process publishes at a steady rate; the sequencer's
own clock stamps each event when its batch is written. What is measured is what `streamgr_event_to_sequence_seconds`
stands for, here for every event rather than for the oldest and newest of a commit. Append times are the broker's, in
whole milliseconds, on the same machine's clock.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from confluent_kafka import Producer

from streamgr import cli
from streamgr.config import Kafka
from streamgr.kafka import topics
from streamgr.sequence import meters, sequencer
from streamgr.sequence.partition import Partition
from tests.bench.kit import Json, broker, machine, report, settings
from tests.bench.traffic import Traffic

WARM_SECONDS = 3.0  # of the stream, left out
TICKS = 200  # of the publisher, a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="1000,10000,30000", help="events per second")
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    found: Json = {"machine": machine(), "seconds": args.seconds, "rates": {}}
    with broker() as (bootstrap, directory):
        for rate in (int(r) for r in args.rates.split(",")):
            found["rates"][rate] = measure(bootstrap, directory, rate, args.seconds)
            print(f"{rate} events/s: {found['rates'][rate]}", file=sys.stderr)
    report("bench-latency", found)


def measure(bootstrap: str, directory: Path, rate: int, seconds: float) -> Json:
    prefix, out = f"l{rate}", directory / f"ages-{rate}.npy"
    topics.ensure(Kafka(bootstrap=bootstrap, topic_prefix=prefix))
    environ = {**os.environ, **settings(bootstrap, prefix, directory / prefix)}
    me = [sys.executable, "-m", "tests.bench.latency"]
    role = subprocess.Popen([*me, "--sequencer", str(out)], env=environ, stderr=subprocess.PIPE, text=True)
    assert role.stderr is not None
    for line in role.stderr:
        if "partitions_assigned" in line:
            break
    feed = subprocess.run(
        [*me, "--publish", bootstrap, prefix, str(rate), str(seconds)], check=True, capture_output=True, text=True
    )
    time.sleep(1.0)
    role.send_signal(signal.SIGTERM)
    role.stderr.read()
    assert role.wait() == 0
    ages = np.load(out)
    ages = ages[int(WARM_SECONDS * rate) :]
    p50, p95, p99 = (round(float(x), 1) for x in np.percentile(ages, (50, 95, 99)))
    late = float(feed.stdout)
    return {"events": len(ages), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "published_per_second": round(late)}


def publish(bootstrap: str, prefix: str, rate: int, seconds: float) -> None:
    """At a steady rate; prints the rate that was reached."""
    producer = Producer(
        {"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 2, "compression.type": "lz4"}
    )
    events = [*Traffic(int(rate * seconds), rate=rate)]
    started, sent = time.perf_counter(), 0
    while sent < len(events):
        due = int((time.perf_counter() - started) * rate)
        for key, value in events[sent : min(due, len(events))]:
            producer.produce(f"{prefix}.events", value, key)
        sent = max(sent, min(due, len(events)))
        producer.poll(0)
        time.sleep(1 / TICKS)
    producer.flush()
    print(len(events) / (time.perf_counter() - started))


def role(out: str) -> int:
    """The sequencer, with a note of every event's append time until it is written."""
    waiting: list[list[int]] = []
    ages: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    apply, written = Partition.apply, meters.written

    def noting(self: Partition, records, *rest):  # type: ignore[no-untyped-def]
        waiting.append(records.append_ms)
        return apply(self, records, *rest)

    def stamped(now_ms: int, *rest: object) -> None:
        for appended in waiting:
            ages.append(now_ms - np.array(appended, np.int64))
        waiting.clear()
        written(now_ms, *rest)  # type: ignore[arg-type]

    Partition.apply = noting  # type: ignore[method-assign]
    sequencer.meters.written = stamped  # type: ignore[assignment]
    code = cli.main(["sequencer"])
    np.save(out, np.concatenate(ages))
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sequencer"]:
        sys.exit(role(sys.argv[2]))
    elif sys.argv[1:2] == ["--publish"]:
        publish(sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
    else:
        main()
