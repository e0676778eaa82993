"""The examples topic as a reader accepts it, for people: partition by partition, repetitions after a crash left out."""

from collections.abc import Iterator

from streamgr.clock import Deadline, SystemClock
from streamgr.config import Config
from streamgr.errors import BrokerUnreachable
from streamgr.kafka.consumer import Consumer
from streamgr.sequence.examples import BEFORE_ALL, Example, decode
from streamgr.sequence.views import Json, examples_json

WAIT_SECONDS = 10.0  # a one-shot command: a broker that stays away this long is an error


def examples(config: Config, limit: int = 0) -> Iterator[Json]:
    """Every accepted example there is now, at most `limit` (0: all). Raises `BrokerUnreachable`, `DataError`."""
    topic, count, clock = config.topic("examples"), 0, SystemClock()
    consumer = Consumer(config.kafka, client_id="streamgr-examples-list")
    try:
        for partition in consumer.partitions(topic, wait_seconds=WAIT_SECONDS):
            at, end = consumer.bounds(topic, partition, wait_seconds=WAIT_SECONDS)
            consumer.assign({(topic, partition): at})
            mark, fingerprint, patience = BEFORE_ALL, "", Deadline(clock, WAIT_SECONDS)
            while at < end:
                if patience.passed():
                    where = f"{topic}[{partition}]@{at}"
                    raise BrokerUnreachable("nothing more comes", where=where, remedy="check kafka.bootstrap")
                for record in consumer.poll(timeout=0.2):
                    at, patience = record.offset + 1, Deadline(clock, WAIT_SECONDS)
                    output = decode(record.value or b"")
                    if not isinstance(output, Example):
                        continue
                    if output.fingerprint != fingerprint and output.prev == BEFORE_ALL:
                        mark = BEFORE_ALL  # a recreated source topic: its offsets begin again
                    if output.position <= mark:
                        continue
                    mark, fingerprint = output.position, output.fingerprint
                    yield examples_json(output, partition, config.sequence.actions)
                    count += 1
                    if count == limit:
                        return
    finally:
        consumer.close()
