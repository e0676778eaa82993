"""What the ID table tells its operator: how full it is, by field, and what has become of the ids that came."""

import numpy as np

from streamgr.model.table import IdTable
from streamgr.telemetry import counter, gauge

SLOTS = gauge("table_slots", "Slots of the ID table.", ("table",))
USED = gauge("table_used_slots", "Slots that hold an id.", ("table", "field"))
ADMISSIONS = counter("table_admissions", "Ids given a slot.", ("table",))
EVICTIONS = counter("table_evictions", "Slots taken back.", ("table", "reason"))
SLOTLESS = counter("table_slotless", "Ids that a batch brought and no slot took.", ("table", "reason"))
TABLE, FIELDS = "items", ("item", "user", "feature")
for _reason in ("full", "expired"):
    EVICTIONS.labels(TABLE, _reason)
for _reason in ("unadmitted", "unplaced", "stale"):
    SLOTLESS.labels(TABLE, _reason)


class TableMeters:
    """Counts from what the table holds when it is made."""

    def __init__(self, table: IdTable) -> None:
        self._table, self._before = table, table.stats()

    def export(self) -> None:
        """Set the gauges, and count what has happened since the last call. Looks at every slot: once a version."""
        index, stats, before = self._table.index, self._table.stats(), self._before
        SLOTS.labels(TABLE).set(stats.slots)
        held = np.bincount(index.field[index.live(index.watermark)], minlength=len(FIELDS))
        for name, count in zip(FIELDS, held.tolist(), strict=True):
            USED.labels(TABLE, name).set(count)
        ADMISSIONS.labels(TABLE).inc(stats.admissions - before.admissions)
        EVICTIONS.labels(TABLE, "full").inc(stats.evictions - before.evictions)
        EVICTIONS.labels(TABLE, "expired").inc(max(0, stats.expiries - before.expiries))
        for reason in ("unadmitted", "unplaced", "stale"):
            SLOTLESS.labels(TABLE, reason).inc(getattr(stats, reason) - getattr(before, reason))
        self._before = stats
