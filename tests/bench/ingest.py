"""How fast the stream side takes events in: `make bench-ingest`.

On one real broker and one stream (1 M events in slates of ten over 50 k users; `tests.bench.traffic`), in one run:

    consume   a bare loop of `consume(1000)` that touches key, value, offset and timestamp
    decode    bytes to checked events, in this process
    apply     decode, join, append and close labels, in this process, outputs thrown away
    write     the same with the RocksDB writes
    full      `streamgr sequencer --until-end`, a process: read, apply, produce and confirm examples, write, for each
              history length (0: an example holds its targets alone)
    group     several sequencers in one group, up to the same end

Events per second are of wall time between opening the partitions and the last commit; CPU is of the whole process, its
Kafka and RocksDB threads included, per event. The broker runs on the same cores.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from confluent_kafka import Consumer as PlainConsumer
from confluent_kafka import TopicPartition

from streamgr import config
from streamgr.config import Kafka
from streamgr.decoder import Decoder
from streamgr.events import Records
from streamgr.kafka.consumer import Consumer
from streamgr.sequence.partition import Partition
from streamgr.sequence.views import store_paths
from streamgr.service import calm_collector
from streamgr.state.rocks import Memory
from streamgr.state.store import Meta, Store
from tests.bench.kit import PARTITIONS, Json, broker, disk_bytes, machine, publish, report, run, settings
from tests.bench.traffic import Traffic

COMMIT_EVENTS = 12_000  # in this process: what a commit interval holds at some 60 k events/s
KAFKA_STREAMS = {"at_least_once": 51_000, "exactly_once": 29_000}  # 4.3, one thread, append only: the figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", default="1000000", help="how many; several sizes show that the cost is flat")
    parser.add_argument("--history", default="0,64,256", help="history lengths of the full pipeline")
    parser.add_argument("--rate", type=float, default=500.0, help="events per second of event time")
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--processes", default="1,2", help="members of the group; empty: leave it out")
    parser.add_argument("--repeat", type=int, default=1, help="runs of the full pipeline; all are reported")
    args = parser.parse_args()
    found: Json = {"machine": machine(), "kafka_streams_events_per_second": KAFKA_STREAMS, "runs": []}
    histories = [int(h) for h in args.history.split(",")]
    with broker() as (bootstrap, directory):
        for events in (int(n) for n in args.events.split(",")):
            traffic = Traffic(events, users=args.users, rate=args.rate)
            size = publish(bootstrap, f"b{events}", traffic)
            one: Json = {"events": events, "users": args.users, "rate": args.rate, "value_bytes": round(size)}
            one["consume"] = consume(bootstrap, f"b{events}", events)
            one |= stages(bootstrap, f"b{events}", events, directory / "stages")
            for history in histories:
                for turn in range(args.repeat):
                    prefix = f"b{events}" if (history, turn) == (histories[0], 0) else f"b{events}h{history}r{turn}"
                    if prefix != f"b{events}":
                        publish(bootstrap, prefix, traffic)
                    one.setdefault(f"full_{history}", []).append(
                        full(bootstrap, prefix, events, directory / "state", history)
                    )
                    print(f"{events} events, history {history}: {one[f'full_{history}'][-1]}", file=sys.stderr)
            for members in (int(n) for n in args.processes.split(",") if n):
                prefix = f"b{events}g{members}"
                publish(bootstrap, prefix, traffic)
                one[f"group_{members}"] = group(bootstrap, prefix, events, directory / "group", members)
            found["runs"].append(one)
    report("bench-ingest", found)


def consume(bootstrap: str, prefix: str, events: int) -> Json:
    """The bare loop, in a process of its own."""
    done = run("tests.bench.ingest", "--consume", bootstrap, prefix, environ={})
    seconds = done.log[-1]["seconds"]
    return {"events_per_second": round(events / seconds), "cpu_us": round(done.log[-1]["cpu"] / events * 1e6, 2)}


def bare_loop(bootstrap: str, prefix: str) -> None:
    consumer = PlainConsumer({"bootstrap.servers": bootstrap, "group.id": "bare", "enable.auto.commit": False})
    topic, left = f"{prefix}.events", 0
    for partition in range(PARTITIONS):
        left += consumer.get_watermark_offsets(TopicPartition(topic, partition), 10)[1]
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)])
    started, touched = time.perf_counter(), 0
    while left:
        messages = consumer.consume(1000, 1.0)
        for message in messages:
            touched += len(message.key() or b"") + len(message.value()) + message.offset() + message.timestamp()[1]
        left -= len(messages)
    seconds, cpu = time.perf_counter() - started, time.process_time()
    print(f'{{"seconds": {seconds}, "cpu": {cpu}}}', file=sys.stderr)
    consumer.close()


def fetched(bootstrap: str, prefix: str) -> list[Records]:
    """The whole log in memory, in the batches in which a consumer hands it out."""
    topic = f"{prefix}.events"
    consumer = Consumer(Kafka(bootstrap=bootstrap), client_id="bench")
    ends = {p: consumer.bounds(topic, p)[1] for p in range(PARTITIONS)}
    consumer.assign({(topic, p): 0 for p in ends})
    batches: list[Records] = []
    left = sum(ends.values())
    while left:
        for batch in consumer.fetch():
            batches.append(batch)
            left -= len(batch)
    consumer.close()
    return batches


def stages(bootstrap: str, prefix: str, events: int, directory: Path) -> Json:
    """decode, apply and write in this process: CPU of this thread and, for write, of the whole process."""
    batches, how = fetched(bootstrap, prefix), config.Sequence(history_length=64)
    calm_collector()
    decoder = Decoder(how.actions, 60_000, 661_000)
    started = time.thread_time()
    for batch in batches:
        decoder.decode(batch)
    decode = time.thread_time() - started
    found = {}
    for stage in ("apply", "write"):
        shutil.rmtree(directory, ignore_errors=True)
        partitions = list(_opened(directory, how))
        started, process, waiting = time.thread_time(), time.process_time(), 0
        for batch in batches:
            partitions[batch.partition].apply(batch)
            waiting += len(batch)
            if stage == "write" and waiting >= COMMIT_EVENTS:
                waiting = 0
                for partition in partitions:
                    partition.commit()
        if stage == "write":
            for partition in partitions:
                partition.commit()
        thread, process = time.thread_time() - started, time.process_time() - process
        found[stage] = {"cpu_us": round(thread / events * 1e6, 2), "process_cpu_us": round(process / events * 1e6, 2)}
        for partition in partitions:
            partition.store.close()
    return {"decode": {"cpu_us": round(decode / events * 1e6, 2)}, **found}


def _opened(directory: Path, how: config.Sequence) -> Iterator[Partition]:
    memory = Memory(config.State())
    for number in range(PARTITIONS):
        store = Store(directory / f"p{number:05d}", memory)
        store.claim(
            Meta(
                cluster_id="c", topic_id="t", topic="e", partition=number, partitions=PARTITIONS, fingerprint="f",
                actions=how.actions, window_ms=600_000, emits=True,
            )
        )  # fmt: skip
        partition = Partition(store, how, "f")
        partition.cache(how.cached_events // PARTITIONS)
        yield partition


def full(bootstrap: str, prefix: str, events: int, state: Path, history: int) -> Json:
    """The sequencer as a process, from nothing to the end."""
    shutil.rmtree(state, ignore_errors=True)
    environ = settings(bootstrap, prefix, state, sequence__history_length=history)
    done = run("streamgr", "sequencer", "--until-end", environ=environ)
    seconds = done.between("partitions_assigned", "partitions_closed")
    return {
        "events_per_second": round(events / seconds),
        "cpu_us": round(done.cpu / events * 1e6, 2),
        "times_kafka_streams_exactly_once": round(events / seconds / KAFKA_STREAMS["exactly_once"], 2),
        "peak_mib": round(done.peak_bytes / 2**20),
        "disk_bytes_an_event": round(disk_bytes(state) / events, 1),
        "compacted_bytes_an_event": round(_compacted(state) / events, 1),
    }


def _compacted(state: Path) -> int:
    """The stores once RocksDB has merged everything: what an event takes in the long run."""
    total = 0
    for path in store_paths(state / "sequencer"):
        store = Store(path, Memory(config.State()))
        store.database.compact()
        total += store.database.size_bytes()
        store.close()
    return total


def group(bootstrap: str, prefix: str, events: int, directory: Path, members: int) -> Json:
    """So many sequencers share the partitions; timed from the first assignment until all is sequenced."""
    shutil.rmtree(directory, ignore_errors=True)
    environ = settings(bootstrap, prefix, directory, sequence__history_length=64)
    command, log = [sys.executable, "-m", "streamgr", "sequencer"], directory.with_suffix(".log")
    reader = Consumer(Kafka(bootstrap=bootstrap), client_id="bench")
    ends = {p: reader.bounds(f"{prefix}.events", p)[1] for p in range(PARTITIONS)}
    committed = PlainConsumer({"bootstrap.servers": bootstrap, "group.id": f"{prefix}-sequencer"})
    watched = [TopicPartition(f"{prefix}.events", p) for p in ends]
    with log.open("wb") as out:
        children = [subprocess.Popen(command, env={**os.environ, **environ}, stderr=out) for _ in range(members)]
        started = 0.0
        while True:
            offsets = {p.partition: max(0, p.offset) for p in committed.committed(watched, 10)}
            if not started and any(offsets.values()):
                started, first = time.perf_counter(), sum(offsets.values())
            if all(offsets[p] >= end for p, end in ends.items()):
                break
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        for child in children:
            child.send_signal(signal.SIGTERM)
        codes = [child.wait() for child in children]
    reader.close()
    committed.close()
    assert codes == [0] * members, codes
    return {"events_per_second": round((sum(ends.values()) - first) / seconds), "members": members}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--consume"]:
        bare_loop(*sys.argv[2:4])
    else:
        main()
