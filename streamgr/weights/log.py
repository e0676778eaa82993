"""The two topics of the weights, read: manifests in log order, chunks at the offsets that a manifest names.

Everything lives in partition 0, whatever the topics' partition count: the order of one log is what epochs rest on.
Both readers work in slices of the caller's time and go on where they stopped, so a broker that is away delays them
and breaks nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from streamgr.clock import Deadline
from streamgr.errors import BrokerUnreachable, DataError
from streamgr.events import Record
from streamgr.kafka.consumer import Consumer
from streamgr.weights.manifest import Content, Manifest, Rejected, chunk_key, decode

ConsumerFactory = Callable[[], Consumer]

ASK_SECONDS = 1.0  # one question to the broker about a log's bounds


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the manifests topic: a claim (its offset is the epoch), a manifest, a pin, or why it is neither."""

    offset: int
    content: Content | Rejected


class ManifestLog:
    """Reads the manifests topic forward; `next_offset` is where it goes on."""

    def __init__(self, consumer: Consumer, topic: str) -> None:
        self._consumer, self._topic = consumer, topic
        self.next_offset = 0
        self._ahead: list[Entry] = []  # read by `read_until`, and not returned yet

    def start(self, wait_seconds: float = ASK_SECONDS) -> None:
        """Begin with the first record that the log still holds; raises as `bounds`."""
        self.next_offset, self._ahead = self.bounds(wait_seconds)[0], []
        self._consumer.assign({(self._topic, 0): self.next_offset})

    def bounds(self, wait_seconds: float = ASK_SECONDS) -> tuple[int, int]:
        """First offset held and end offset. Raises `BrokerUnreachable` when the broker stays away for so long."""
        return self._consumer.bounds(self._topic, 0, wait_seconds=wait_seconds)

    def read(self, timeout: float) -> list[Entry]:
        """What has come since, in log order; raises `RetentionPassed` where the log no longer holds our place."""
        entries = []
        for record in self._consumer.poll(500, timeout):
            self.next_offset = record.offset + 1
            try:
                content: Content | Rejected = decode(record.key, record.value, record.offset)
            except Rejected as rejected:
                content = rejected
            entries.append(Entry(record.offset, content))
        return entries

    def read_until(self, end: int, deadline: Deadline) -> list[Entry]:
        """Everything before offset `end`, which must exist. Raises `BrokerUnreachable` when the deadline passes: what
        was read until then, and what came from `end` on, is returned by the next call.
        """
        while self.next_offset < end:
            if deadline.passed():
                raise BrokerUnreachable(
                    f"read up to {self.next_offset} of {end}, then nothing came",
                    where=f"{self._topic}[0]",
                    remedy="check kafka.bootstrap and the broker's log",
                )
            self._ahead += self.read(min(0.2, deadline.remaining()))
        entries = [entry for entry in self._ahead if entry.offset < end]
        self._ahead = self._ahead[len(entries) :]
        return entries

    def close(self) -> None:
        self._consumer.close()


class ChunkLog:
    """Brings the chunks of one version at a time, each checked against its manifest.

    Stays where it stopped: the next delta's chunks usually follow, and are then on their way before they are asked for.
    """

    def __init__(self, consumer: Consumer, topic: str) -> None:
        self._consumer, self._topic = consumer, topic
        self._next_offset = -1
        self._manifest: Manifest | None = None
        self._parts: list[bytes] = []

    def fetch(self, manifest: Manifest, deadline: Deadline) -> bytes | None:
        """The whole payload, or None when time is up (call again). Raises `Rejected` (truncated, digest)."""
        try:
            if self._manifest is not manifest:
                self._begin(manifest)
            while missing := len(manifest.chunks) - len(self._parts):
                records = self._consumer.poll(missing, min(0.2, deadline.remaining()))
                for record in records:
                    self._next_offset = record.offset + 1
                    self._take(manifest, record)
                if not records and deadline.passed():
                    return None
        except BrokerUnreachable:
            return None
        except Rejected:
            self._manifest = None
            raise
        except DataError as error:  # the log starts after, or ends before, what we were promised
            self._manifest, self._next_offset = None, -1
            raise Rejected("truncated", error.what, where=manifest.name()) from None
        self._manifest = None
        return b"".join(self._parts)

    def close(self) -> None:
        self._consumer.close()

    def _begin(self, manifest: Manifest) -> None:
        """Go to the first chunk; the log must hold them all."""
        low, high = self._consumer.bounds(self._topic, 0, wait_seconds=ASK_SECONDS)
        offsets = [chunk.offset for chunk in manifest.chunks]
        if min(offsets) < low or max(offsets) >= high:
            span = f"chunks at {min(offsets)} to {max(offsets)}, the log holds {low} to {high - 1}"
            raise Rejected("truncated", span, where=manifest.name())
        if offsets[0] != self._next_offset:
            self._consumer.assign({(self._topic, 0): offsets[0]})
        self._manifest, self._parts, self._next_offset = manifest, [], offsets[0]

    def _take(self, manifest: Manifest, record: Record) -> None:
        """Keep the record if it is the chunk we wait for; records of others may lie between."""
        index, where = len(self._parts), f"{self._topic}[0]@{record.offset}"
        if index == len(manifest.chunks) or record.offset < manifest.chunks[index].offset:
            return
        chunk, value = manifest.chunks[index], record.value
        if record.offset > chunk.offset:
            raise Rejected("truncated", f"the chunk at {chunk.offset} is gone", where=where)
        if value is None or len(value) != chunk.size or sha256(value).hexdigest() != chunk.sha256:
            raise Rejected("digest", f"chunk {index} is not what was written", where=where)
        if record.key != chunk_key(manifest.epoch, manifest.version, index):
            raise Rejected("digest", f"chunk {index} under key {record.key!r}", where=where)
        self._parts.append(value)
