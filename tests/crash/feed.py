"""What a storm's workers read: an endless seeded stream, and the thread that publishes it at a steady rate.

The stream comes in chunks of `tests.streams.events`, each later in event time than the one before, so that labels
close all along; between them events of long ago come again, users are erased, heartbeats move quiet partitions, and now
and then every kind of rubbish comes by. The publisher is idempotent and waits for the broker without end: what lies in
the topic is the stream, whole and in order, however often the broker dies.
"""

import json
import random
import threading
import time
from collections.abc import Iterator

from confluent_kafka import KafkaError, Message, Producer

from streamgr.clock import SystemClock
from tests.streams import START, Json, Row, events, row, rubbish

CHUNK = 1_500  # events
SPAN_MS = 12_000  # of event time, a chunk
USERS, ITEMS = 120, 60
REMEMBERED = 300  # events of earlier chunks, of which some come again
TICK_SECONDS = 0.05
Settings = dict[str, str | int | float | bool]


class Stream:
    """Rows without end. `repeats` False: no event comes twice (for workers that do not know one when they see it)."""

    def __init__(self, seed: int, partitions: int, *, repeats: bool = True) -> None:
        self.newest_ms = START  # no event so far is later
        self._seed, self._partitions, self._repeats = seed, partitions, repeats
        self._rng = random.Random(seed)

    def __iter__(self) -> Iterator[Row]:
        old: list[Json] = []
        number = 0
        while True:
            chunk = self._chunk(number)
            rows = [row(e) for e in chunk]
            if self._repeats:
                rows = self._strewn(rows, [row(e) for e in self._rng.sample(old, min(len(old), CHUNK // 50))])
                old = self._rng.sample(old + chunk, min(len(old) + len(chunk), REMEMBERED))
            erasures: list[Row] = [(f"u{self._rng.randrange(USERS)}".encode(), None, None) for _ in range(2)]
            rows = self._strewn(rows, erasures)
            if number % 4 == 1:
                bad = [(key, value, self._partition()) for _, (key, value, _) in rubbish(SystemClock().now_ms())]
                rows = self._strewn(rows, [*bad, (None, None, self._partition())])
            for i, each in enumerate(rows):
                self.newest_ms = START + (number + 1) * SPAN_MS + 12_000
                if i % 150 == 149:
                    yield self._heartbeat(START + number * SPAN_MS + i * SPAN_MS // len(rows), self._partition())
                yield each
            number += 1

    def closing(self, after_ms: int) -> list[Row]:
        """A heartbeat for every partition that lies so far after everything."""
        return [self._heartbeat(self.newest_ms + after_ms, p) for p in range(self._partitions)]

    def _chunk(self, number: int) -> list[Json]:
        chunk, seen = [], set[str]()
        for e in events(self._seed * 1_000 + number, CHUNK, users=USERS, items=ITEMS, span_ms=SPAN_MS):
            if e["event_id"] in seen and not self._repeats:
                continue
            seen.add(e["event_id"])
            named = {k: f"{number}.{e[k]}" for k in ("event_id", "request_id") if k in e}
            chunk.append({**e, **named, "event_time": e["event_time"] + number * SPAN_MS})
        return chunk

    def _strewn(self, rows: list[Row], others: list[Row]) -> list[Row]:
        """The others at random places among the rows."""
        for other in others:
            rows.insert(self._rng.randrange(len(rows) + 1), other)
        return rows

    def _partition(self) -> int:
        return self._rng.randrange(self._partitions)

    @staticmethod
    def _heartbeat(at_ms: int, partition: int) -> Row:
        return None, json.dumps({"type": "heartbeat", "event_time": at_ms}).encode(), partition


class Publisher(threading.Thread):
    """Publishes a stream at `rate` rows a second until told to finish."""

    def __init__(self, bootstrap: str, topic: str, stream: Stream, rate: float) -> None:
        super().__init__(name="publisher", daemon=True)
        self.sent = 0
        self._topic, self._stream, self._rate = topic, stream, rate
        self._failed: list[str] = []
        self._finish = threading.Event()
        settings: Settings = {
            "bootstrap.servers": bootstrap,
            "client.id": "storm-publisher",
            "enable.idempotence": True,
            "acks": "all",
            "message.timeout.ms": 0,
            "partitioner": "murmur2_random",
            "linger.ms": 10,
            "message.max.bytes": (2 << 20) + (128 << 10),
            "queue.buffering.max.messages": 1_000_000,
            "queue.buffering.max.kbytes": 256 << 10,
            "reconnect.backoff.max.ms": 1_000,
            "log_level": 0,
        }
        self._producer = Producer(settings)

    def run(self) -> None:
        rows, began = iter(self._stream), time.monotonic()
        while not self._finish.wait(TICK_SECONDS):
            due = int((time.monotonic() - began) * self._rate)
            while self.sent < due and not self._finish.is_set():
                self._send(next(rows))
            self._producer.poll(0)

    def finish(self, closing_ms: int, seconds: float) -> int:
        """Stop, close every label, and see everything acknowledged; how many rows there were. Fails aloud."""
        self._finish.set()
        self.join(seconds)
        for each in self._stream.closing(closing_ms):
            self._send(each)
        left = self._producer.flush(seconds)
        assert left == 0, f"{left} rows were not acknowledged within {seconds} s"
        assert not self._failed, f"{len(self._failed)} rows were refused, the first: {self._failed[0]}"
        return self.sent

    def _send(self, each: Row) -> None:
        key, value, partition = each
        where = {} if partition is None else {"partition": partition}
        self._producer.produce(self._topic, value, key, on_delivery=self._delivered, **where)
        self.sent += 1

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failed.append(error.str())
