"""Seeded streams with everything the contract allows: disorder, duplicates, late and organic events, rubbish."""

import json
import random
from collections.abc import Sequence
from typing import Any

from streamgr.events import Record, Records

Json = dict[str, Any]
Row = tuple[bytes | None, bytes | None, int | None]
ACTIONS = ["click", "like"]
START = 1_700_000_000_000


def events(seed: int, n: int, *, users: int = 25, items: int = 40, span_ms: int = 60_000) -> list[Json]:
    """About n good events in their order of arrival; event times within `span_ms` of START."""
    rng = random.Random(seed)
    out: list[tuple[float, Json]] = []
    request = 0
    while len(out) < n:
        at = rng.randrange(span_ms)
        user = f"u{int(users * rng.random() ** 2)}"
        kind = rng.random()
        delay = rng.choice([0, 0, 0, rng.randrange(900), rng.randrange(6_000)])
        if kind < 0.6:
            request += 1
            for k in range(rng.randrange(1, 6)):
                item = f"i{rng.randrange(items)}"
                shown = {
                    "type": "impression", "event_id": f"e{request}-{k}", "user_id": user, "item_id": item,
                    "event_time": START + at, "request_id": f"r{request}", "position": k,
                }  # fmt: skip
                out.append((at + delay, shown))
                for action in ACTIONS:
                    if rng.random() < 0.3:
                        after = rng.randrange(3_000)
                        acted = {
                            "type": action, "event_id": f"e{request}-{k}-{action}", "user_id": user, "item_id": item,
                            "event_time": START + at + after,
                        }  # fmt: skip
                        if rng.random() < 0.7:
                            acted["request_id"] = f"r{request}"
                        out.append((at + after + rng.choice([0, 0, 0, rng.randrange(-800, 800), 9_000]), acted))
        elif kind < 0.9:
            request += 1
            organic = {
                "type": rng.choice(ACTIONS), "event_id": f"o{request}", "user_id": user,
                "item_id": f"i{rng.randrange(items)}", "event_time": START + at,
            }  # fmt: skip
            out.append((at + delay, organic))
        else:
            request += 1
            profile = {
                "type": "profile", "event_id": f"p{request}", "user_id": user, "event_time": START + at,
                "features": {"country": rng.choice(["BR", "US"])},
            }  # fmt: skip
            out.append((at + delay, profile))
    out += [(t + rng.randrange(2_000), e) for t, e in rng.sample(out, len(out) // 20)]
    return [e for _, e in sorted(out, key=lambda pair: pair[0])]


def columns(records: Sequence[Record]) -> Records:
    """Records of one partition as the batch a consumer hands out."""
    first = records[0] if records else Record("t", 0, 0, None, None, 0)
    return Records(
        first.topic,
        first.partition,
        [r.offset for r in records],
        [r.key for r in records],
        [r.value for r in records],
        [r.append_ms for r in records],
        records[-1].offset + 1 if records else 0,
    )


def row(event: Json) -> Row:
    return event["user_id"].encode(), json.dumps(event).encode(), None


def heartbeats(after_ms: int, partitions: int) -> list[Row]:
    """Heartbeats that carry every partition's watermark past everything."""
    beat = json.dumps({"type": "heartbeat", "event_time": START + after_ms}).encode()
    return [(None, beat, p) for p in range(partitions)]


def rubbish(now_ms: int) -> list[tuple[str, Row]]:
    """One bad record for each reason of the contract (and more)."""
    good = {"type": "click", "event_id": "x", "user_id": "u", "item_id": "i", "event_time": START}

    def bad(key: bytes | None = b"u", **change: Any) -> Row:
        changed = {k: v for k, v in {**good, **change}.items() if v is not ...}
        return key, json.dumps(changed).encode(), 0

    return [
        ("invalid_json", (b"u", b"x" * 1_000_000, 0)),
        ("invalid_json", (b"u", b'{"type": "click", ', 0)),
        ("invalid_json", (b"u", b"\xff\xfe", 0)),
        ("not_an_object", (b"u", b"[1, 2]", 0)),
        ("missing_field", bad(event_id=...)),
        ("missing_field", bad(item_id=None)),
        ("wrong_type", bad(event_id=7)),
        ("wrong_type", bad(user_id=True)),
        ("wrong_type", bad(features=[])),
        ("out_of_range", bad(event_id="x" * 129)),
        ("out_of_range", bad(item_id="")),
        ("out_of_range", bad(event_time=-1)),
        ("unknown_type", bad(type="purchase")),
        ("bad_time", bad(event_time="2024-01-01T00:00:00")),
        ("future_time", bad(event_time=now_ms + 3_600_000)),
        ("key_mismatch", bad(key=b"somebody else")),
        ("null_key", bad(key=None)),
        ("too_large", (b"u", json.dumps({**good, "pad": "x" * (1 << 20)}).encode(), 0)),
    ]
