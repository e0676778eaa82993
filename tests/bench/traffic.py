"""A site's traffic for the benchmarks: slates of ten, Zipf users and items, ids as UUIDs, a tenth of places acted on.

Deterministic by seed. A slate is ten impressions of one request at one time; actions follow within a minute of event
time and arrive in the order of their time. `rate` is events per second of event time, over all partitions: what decides
how many events one step of the watermark closes.
"""

import heapq
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

START_MS = 1_700_000_000_000
SLATE = 10
ACTED, LIKED = 0.10, 0.02  # the share of places that is clicked, and of these that is liked instead
CHUNK = 100_000  # slates drawn at once


@dataclass(frozen=True, slots=True)
class Traffic:
    """n events over `users` and `items`."""

    events: int
    users: int = 50_000
    items: int = 100_000
    rate: float = 500.0
    seed: int = 1

    @property
    def end_ms(self) -> int:
        """Event time by which the last of it has happened."""
        return START_MS + round(self.events * 1000 / self.rate) + 60_000

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) in order of event time."""
        rng, bits = np.random.default_rng(self.seed), random.Random(self.seed)
        users, items = _zipf(self.users, 0.9), _zipf(self.items, 0.8)
        waiting: list[tuple[int, int, bytes, bytes]] = []  # actions to come, a heap
        sent = slates = 0

        def new_id() -> str:
            return str(uuid.UUID(int=bits.getrandbits(128), version=4))

        while True:
            who = rng.choice(self.users, CHUNK, p=users)
            what = rng.choice(self.items, (CHUNK, SLATE), p=items)
            acts, delays = rng.random((CHUNK, SLATE)), rng.integers(1_000, 60_000, (CHUNK, SLATE))
            for n in range(CHUNK):
                time = START_MS + int(slates * SLATE * 1000 / self.rate)
                slates += 1
                while waiting and waiting[0][0] <= time:
                    _, _, key, value = heapq.heappop(waiting)
                    yield key, value
                    sent += 1
                    if sent == self.events:
                        return
                user, request = f"user-{who[n]:06d}", new_id()
                key = user.encode()
                for place in range(SLATE):
                    item = f"item-{what[n, place]:06d}"
                    yield (
                        key,
                        (
                            f'{{"type":"impression","event_id":"{new_id()}","user_id":"{user}","item_id":"{item}",'
                            f'"event_time":{time},"request_id":"{request}","surface":"home","position":{place}}}'
                        ).encode(),
                    )
                    sent += 1
                    if sent == self.events:
                        return
                    if acts[n, place] < ACTED:
                        at = time + int(delays[n, place])
                        action = (
                            f'{{"type":"{"like" if acts[n, place] < LIKED else "click"}","event_id":"{new_id()}",'
                            f'"user_id":"{user}","item_id":"{item}","event_time":{at},"request_id":"{request}"}}'
                        ).encode()
                        heapq.heappush(waiting, (at, sent, key, action))


def _zipf(n: int, exponent: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    weights = 1.0 / np.arange(1, n + 1) ** exponent
    return weights / weights.sum()
