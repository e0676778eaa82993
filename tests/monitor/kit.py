"""What the monitor's tests share: a role's /metrics as text, a board with a life behind it, records as they are."""

import json
from collections.abc import Iterable
from typing import Any

import msgspec

from streamgr.config import Config, Monitor, Sequence
from streamgr.events import Records, heartbeat
from streamgr.monitor.board import Board
from streamgr.scrape import Metrics
from streamgr.weights.log import Entry
from streamgr.weights.manifest import Chunk, ClaimRecord, Manifest, PinRecord

T0 = 1_800_000_000_000  # ms
SOURCES = ("sequencer", "trainer", "scorer")


def config(**monitor: Any) -> Config:
    """Short windows, three sources."""
    keys = {"scrape": tuple(f"{role}=http://127.0.0.1:1" for role in SOURCES), "online_window_seconds": 60.0} | monitor
    return Config(sequence=Sequence(attribution_window_seconds=1.0), monitor=Monitor(**keys))


def histogram(name: str, counts: dict[float, int], **labels: str) -> str:
    """Prometheus text; `counts`: how many were observed at or below each edge, +Inf last."""
    told = "".join(f',{key}="{value}"' for key, value in labels.items())
    lines = [f"# TYPE streamgr_{name} histogram"]
    lines += [f'streamgr_{name}_bucket{{le="{edge}"{told}}} {count}' for edge, count in counts.items()]
    lines += [f"streamgr_{name}_count {list(counts.values())[-1]}", f"streamgr_{name}_sum 1"]
    return "\n".join(lines)


def scorer(horizon_ms: int, *, version: int = 7, ages: dict[float, int] | None = None) -> Metrics:
    return Metrics(
        "\n".join(
            (
                'streamgr_build_info{version="0",role="scorer"} 1',
                f'streamgr_model_horizon_timestamp_seconds{{role="scorer"}} {horizon_ms / 1000}',
                f'streamgr_weights_version{{role="scorer"}} {version}',
                histogram("score_model_age_seconds", ages or {1.0: 0, 60.0: 0, 120.0: 0, float("inf"): 0}),
                histogram("event_to_serving_seconds", {1.0: 0, 2.0: 50, float("inf"): 50}),
                'streamgr_consumer_lag_records{topic="streamgr.events"} 3',
                f'streamgr_consumer_position_timestamp_seconds{{topic="streamgr.events"}} {horizon_ms / 1000}',
                'streamgr_weights_rejected_total{reason="digest"} 2',
            )
        )
        + "\n"
    )


def sequencer(events: int) -> Metrics:
    text = (
        f'streamgr_build_info{{version="0",role="sequencer"}} 1\nstreamgr_events_total{{kind="impression"}} {events}\n'
    )
    text += 'streamgr_events_total{kind="heartbeat"} 999\n'
    return Metrics(text + histogram("event_to_sequence_seconds", {0.25: events, float("inf"): events}) + "\n")


def trainer() -> Metrics:
    return Metrics(
        'streamgr_build_info{version="0",role="trainer"} 1\n'
        'streamgr_prequential_normalized_entropy{task="click"} 0.82\n'
        'streamgr_prequential_normalized_entropy{task="like"} NaN\n'
        'streamgr_prequential_base_rate_ratio{task="click"} 0.3\n'
        'streamgr_prequential_base_rate_ratio{task="like"} 0\n'
        'streamgr_table_slots{table="items"} 4096\nstreamgr_table_used_slots{table="items",field="item"} 96\n'
        'streamgr_table_admissions_total{table="items"} 120\n'
        'streamgr_table_evictions_total{table="items",reason="expired"} 24\n'
        'streamgr_table_evictions_total{table="items",reason="full"} 0\n'
    )


def events(rows: Iterable[dict[str, Any]], append_ms: int, partition: int = 0) -> Records:
    """A batch of events; a row without a user is a heartbeat."""
    keys: list[bytes | None] = []
    values: list[bytes | None] = []
    for row in rows:
        keys.append(row["user_id"].encode() if "user_id" in row else None)
        values.append(json.dumps(row).encode() if "user_id" in row else heartbeat(row["event_time"]))
    n = len(keys)
    return Records("streamgr.events", partition, list(range(n)), keys, values, [append_ms] * n, n)


def score(user: str, at_ms: int, version: int, p: dict[str, float]) -> bytes:
    """A record of the scores topic, as a scorer writes it."""
    items = [{"item_id": item, "score": x, "probabilities": {"click": x, "like": x / 10}} for item, x in p.items()]
    answer = {"items": items, "weights_version": version, "model_age_seconds": 1.0, "sequence_length": 3, "cold": False}
    return msgspec.json.encode({"kind": "rank", "user_id": user, "time": at_ms, "at": None, "answer": answer})


def manifest(version: int, *, kind: str = "delta", epoch: int = 0, size: int = 1_000, at_ms: int = T0) -> Manifest:
    return Manifest(
        kind=kind,
        epoch=epoch,
        version=version,
        parent=None if kind == "snapshot" else version - 1,
        model={},
        model_digest="",
        step=version,
        targets_learned=10 * version,
        horizon_ms=at_ms - 1_000,
        watermark_ms=at_ms - 1_000,
        positions={},
        published_ms=at_ms,
        tensors={},
        chunks=[Chunk(version, size, "")],
        bytes=size,
    )


def versions(upto: int, now_ms: int) -> list[Entry]:
    """A trainer's claim and its versions, one a second, every tenth a snapshot."""
    claim = Entry(0, ClaimRecord(now_ms - 1_000 * upto, 0))
    made = [
        manifest(
            v,
            kind="delta" if v % 10 else "snapshot",
            size=20_000 if v % 10 else 90_000,
            at_ms=now_ms - 1_000 * (upto - v),
        )
        for v in range(1, upto + 1)
    ]
    return [claim, *(Entry(n + 1, one) for n, one in enumerate(made))]


def pin(version: int, offset: int, why: str = "") -> Entry:
    return Entry(offset, PinRecord(epoch=0, version=version, pinned_ms=T0, why=why))


def lived(now_ms: int = T0, **monitor: Any) -> Board:
    """A board that has read everything once or twice."""
    board = Board(config(**monitor), now_ms - 10_000, title="streamgr test")
    for seconds in range(9, -1, -1):
        at = now_ms - seconds * 1000
        board.answered("sequencer", sequencer(5_000 - 100 * seconds), "", at)
        board.answered("trainer", trainer(), "", at)
        n = 200 - 10 * seconds
        board.answered("scorer", scorer(at - 1_500, ages={1.0: n // 2, 60.0: n, 120.0: n, float("inf"): n}), "", at)
        board.tick(at)
    for n in range(40):
        user, at = f"u{n}", now_ms - 9_000 + n
        board.score(score(user, at, 30 + n // 20, {"a": 0.3, "b": 0.2}))
        shown = {"type": "impression", "event_id": f"e{n}", "user_id": user, "item_id": "a", "event_time": at + 20}
        clicked = shown | {"type": "click", "event_id": f"c{n}", "event_time": at + 300}
        board.events(events([shown, clicked] if n % 3 == 0 else [shown], at + 20), at)
    board.events(events([{"event_time": now_ms}], now_ms), now_ms)
    board.settle(now_ms)
    board.heard(now_ms)
    for entry in versions(50, now_ms):
        board.manifest(entry, now_ms)
    board.dead_letter("bad_time", now_ms - 120_000, 0)
    board.dead_letter("bad_time", now_ms - 1_000, 1)
    board.dead_letter("<script>alert(1)</script>", now_ms - 1_000, 1)
    board.canary("sequence", 0.12, now_ms - 900)
    board.canary("weights", 2.4, now_ms - 500)
    return board
