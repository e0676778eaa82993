"""What a store was made from: whose log it is, and what decides what is emitted for that log (decision 4).

The fingerprint of the settings stands in the store and in every output. Where settings changed in the middle of a log
it also says since which offset they hold ("face@1200"): whoever starts from before that would answer again, and
differently, what has been answered under the old ones.
"""

from hashlib import blake2b

import msgspec

from streamgr import config
from streamgr.clock import milliseconds
from streamgr.kafka.topics import Identity
from streamgr.state.store import Meta

EMISSION = 3  # what is emitted for the same records; a change of it changes the fingerprint
LABELS = "kinds joined within the window, at its close"


def fingerprint(cluster_id: str, topic_id: str, settings: config.Sequence, since: int = 0) -> str:
    """16 hex digits over everything that decides what is emitted for a log, and since which offset it does."""
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
        settings.auxiliary_length,
        LABELS,
        settings.actions,
        EMISSION,
    )
    digest = blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()
    return f"{digest}@{since}" if since else digest


def settled(fingerprint: str) -> tuple[str, int]:
    """(the settings' digest, since which offset they hold)"""
    digest, _, since = fingerprint.partition("@")
    return digest, int(since) if since.isdigit() else 0


def meta(
    identity: Identity, topic: str, partition: int, settings: config.Sequence, *, emits: bool, fingerprint: str
) -> Meta:
    """What the store of one partition of `topic` is bound to. `emits`: false for a follower."""
    return Meta(
        cluster_id=identity.cluster_id,
        topic_id=identity.topic_id,
        topic=topic,
        partition=partition,
        partitions=identity.partitions,
        fingerprint=fingerprint,
        actions=tuple(settings.actions),
        window_ms=milliseconds(settings.attribution_window_seconds),
        keep_ms=milliseconds(settings.keep_seconds),
        emits=emits,
    )
