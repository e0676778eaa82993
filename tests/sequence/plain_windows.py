"""Windows with their auxiliary rows, said plainly: from all events of one user, one after the other."""

from typing import Any

from streamgr.events import feature_key, item_key

Json = dict[str, Any]
KINDS = {"profile": 0, "impression": 1, "click": 2, "like": 3}
Row = tuple[int, int, int]  # time, kind, item or feature


def order(event: Json) -> tuple[int, int, bytes]:
    return event["event_time"], KINDS[event["type"]], event["event_id"].encode()


def window(
    events: list[Json], *, upto: int | None = None, last: Json | None = None, limit: int, auxiliary: int, cut: int = -1
) -> list[Row]:
    """The newest `limit` impressions and actions before `upto`, or to the one that is `last`; and what the series say.

    events: of one user, each once, profiles among them, in any order.
    """
    held = sorted(events, key=order)
    shown = [e for e in held if e["type"] != "profile" and e["event_time"] >= cut]
    shown = (
        [e for e in shown if order(e) <= order(last)] if last else [e for e in shown if e["event_time"] < (upto or 0)]
    )
    shown = shown[-limit:]
    end = last["event_time"] + 1 if last else upto or 0
    begin = shown[0]["event_time"] if shown else end
    profiles = [e for e in held if e["type"] == "profile" and e["event_time"] < end]
    profiles = [e for e in profiles if e["event_time"] < cut][-1:] + [e for e in profiles if e["event_time"] >= cut]
    holds: dict[str, tuple[int, object]] = {}
    for e in profiles:
        if e["event_time"] < begin:
            for name, value in (e.get("features") or {}).items():
                if name not in holds or str(holds[name][1]) != str(value):
                    holds[name] = e["event_time"], value
    rows: list[Row] = [(time, 0, feature_key(name, value)) for time, name, value in
                       sorted((t, n, v) for n, (t, v) in holds.items())]  # fmt: skip
    now = {name: str(value) for name, (_, value) in holds.items()}
    for e in sorted([*shown, *(p for p in profiles if p["event_time"] >= begin)], key=order):
        for name, value in sorted((e.get("features") or {}).items()):
            if now.get(name) != str(value):
                now[name] = str(value)
                rows.append((e["event_time"], 0, feature_key(name, value)))
        if e["type"] != "profile":
            rows.append((e["event_time"], KINDS[e["type"]], item_key(str(e["item_id"]))))
    surplus = sum(kind == 0 for _, kind, _ in rows) - auxiliary
    kept = []
    for row in rows:
        if row[1] == 0 and surplus > 0:
            surplus -= 1
        else:
            kept.append(row)
    return kept
