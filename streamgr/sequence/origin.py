"""What a store was made from: whose log it is, and what decides what is emitted for that log (decision 4)."""

from hashlib import blake2b

import msgspec

from streamgr import config
from streamgr.clock import milliseconds
from streamgr.kafka.topics import Identity
from streamgr.state.store import Meta

EMISSION = 2  # what is emitted for the same records; a change of it changes the fingerprint
LABELS = "kinds joined within the window, at its close"


def fingerprint(cluster_id: str, topic_id: str, settings: config.Sequence) -> str:
    """16 hex digits over everything that decides what is emitted for a log."""
    parts = (
        cluster_id,
        topic_id,
        milliseconds(settings.attribution_window_seconds),
        milliseconds(settings.lateness_seconds),
        milliseconds(settings.close_step_seconds),
        milliseconds(settings.max_step_seconds),
        milliseconds(settings.max_future_seconds),
        milliseconds(settings.keep_seconds),
        settings.history_length,
        LABELS,
        settings.actions,
        EMISSION,
    )
    return blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def meta(identity: Identity, topic: str, partition: int, settings: config.Sequence, *, emits: bool) -> Meta:
    """What the store of one partition of `topic` is bound to. `emits`: false for a follower."""
    return Meta(
        cluster_id=identity.cluster_id,
        topic_id=identity.topic_id,
        topic=topic,
        partition=partition,
        partitions=identity.partitions,
        fingerprint=fingerprint(identity.cluster_id, identity.topic_id, settings),
        actions=tuple(settings.actions),
        window_ms=milliseconds(settings.attribution_window_seconds),
        keep_ms=milliseconds(settings.keep_seconds),
        emits=emits,
    )
