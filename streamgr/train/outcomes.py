"""What came of a step: figures judged, freshness observed, and one line a target for reports.

Everything here follows learning and changes nothing of it. Freshness columns gather until a published version has
carried them to the scorers, which observe how long each target took to be served. The prequential log is cut back to
the checkpoint's length at a restart and written again by the replayed steps, so it names each target once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamgr.errors import StateNotWritable
from streamgr.events import FIRST_ACTION, IMPRESSION
from streamgr.telemetry import counter, histogram
from streamgr.train.batch import Batch
from streamgr.train.learner import Predictions
from streamgr.train.prequential import Prequential
from streamgr.weights.manifest import Learned

MAX_FRESH = 1 << 16  # rows of freshness kept while no version is published
TARGETS = counter("train_targets", "Targets learned, replays after a restart excepted.", ("label",))
LABEL_TO_GRADIENT = histogram(
    "label_to_gradient_seconds", "From the record that closed a label to its gradient step.", ("label",)
)
IMPRESSION_TO_LABEL = histogram("impression_to_label_seconds", "From an impression to the record that closed it.")
for _label in ("positive", "negative"):
    TARGETS.labels(_label)
    LABEL_TO_GRADIENT.labels(_label)


class Outcomes:
    """Takes every step's predictions; owns the prequential figures, the freshness columns and the log."""

    def __init__(self, actions: Sequence[str], prequential: Prequential, log_path: str, log_bytes: int) -> None:
        """`log_path` "" writes none; `log_bytes`: how much of it the checkpoint has seen."""
        self.prequential = prequential
        self._actions = list(actions)
        self._fresh: list[NDArray[np.int64]] = []  # [3, n] each
        self._fresh_total = 0
        self._path, self._log = log_path, None
        if log_path:
            try:
                Path(log_path).parent.mkdir(parents=True, exist_ok=True)
                self._log = Path(log_path).open("ab")  # noqa: SIM115 (closed by `close`)
                self._log.truncate(min(log_bytes, self._log.tell()))
                self._log.seek(0, os.SEEK_END)
            except OSError as error:
                raise self._refused(error) from None

    def add(
        self, partitions: Sequence[int], batch: Batch, predictions: Predictions, *, version: int, gradient_ms: int
    ) -> None:
        """Judge a step's predictions and log them. `version`: the newest published before it."""
        targets = batch.targets
        ranked, found = targets.ranked, targets.retrieved
        self.prequential.add_ranking(predictions.probabilities[ranked], targets.labels[ranked])
        own_kind = np.arange(len(self._actions)) == targets.kind[found][:, None].astype(np.int64) - FIRST_ACTION
        self.prequential.add_retrieval(predictions.rank[found], targets.labels[found] | own_kind)
        if self._log is not None:
            try:
                self._log.write(b"".join(self._lines(partitions, batch, predictions, version, gradient_ms)))
                self._log.flush()
            except OSError as error:
                raise self._refused(error) from None

    def learned(self, batch: Batch, gradient_ms: int) -> None:
        """Note when each target was shown, closed and learned."""
        targets = batch.targets
        self._fresh.append(
            np.stack([targets.append_ms, targets.closed_ms, np.full(len(targets), gradient_ms, np.int64)])
        )
        self._fresh_total += len(targets)
        for name, chosen in (("positive", targets.positive), ("negative", ~targets.positive)):
            TARGETS.labels(name).inc(int(chosen.sum()))
            waited = LABEL_TO_GRADIENT.labels(name)
            for closed_ms in targets.closed_ms[chosen]:
                waited.observe(max(0.0, (gradient_ms - closed_ms) / 1000))
        for row in targets.ranked:
            IMPRESSION_TO_LABEL.observe(max(0.0, (targets.closed_ms[row] - targets.append_ms[row]) / 1000))

    def freshness(self) -> Learned:
        """The freshness of what no published version has carried yet; of very many rows, some stand for all."""
        columns = np.concatenate([np.empty((3, 0), np.int64), *self._fresh], axis=1)
        if columns.shape[1] > MAX_FRESH:
            columns = columns[:, ::2]
        self._fresh = [columns]
        return Learned(columns[0], columns[1], columns[2], self._fresh_total)

    def carried(self, learned: Learned) -> None:
        """A published version has carried what `freshness` gave last."""
        self._fresh[0] = self._fresh[0][:, len(learned.gradient_ms) :]
        self._fresh_total -= learned.total

    def sync(self) -> int:
        """Make the log durable; returns its length."""
        if self._log is None:
            return 0
        try:
            os.fsync(self._log.fileno())
        except OSError as error:
            raise self._refused(error) from None
        return self._log.tell()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _refused(self, error: OSError) -> StateNotWritable:
        remedy = "free space, or set trainer.prequential_log to a file that can be written"
        return StateNotWritable(f"cannot write: {error.strerror}", where=self._path, remedy=remedy)

    def _lines(
        self, partitions: Sequence[int], batch: Batch, predictions: Predictions, version: int, gradient_ms: int
    ) -> list[bytes]:
        lines, targets, row = [], batch.targets, 0
        for partition, example in zip(partitions, batch.examples, strict=True):
            for item, event_id, index in zip(
                example.target_items, example.target_events, example.target_index, strict=True
            ):
                kind = int(targets.kind[row])
                ranked = kind == IMPRESSION
                rank = int(predictions.rank[row])
                line: dict[str, Any] = {
                    "event_id": event_id,
                    "user": example.user,
                    "item": item,
                    "time": int(example.history.times[index]),
                    "watermark": example.watermark,
                    "version": version,
                    "labels": [name for name, on in zip(self._actions, targets.labels[row], strict=True) if on],
                    "kind": "impression" if ranked else self._actions[kind - FIRST_ACTION],
                    "p": dict(zip(self._actions, predictions.probabilities[row].tolist(), strict=True))
                    if ranked
                    else None,
                    "rank": rank if targets.positive[row] else None,
                    "live": predictions.live,
                    "offset": example.position[0],
                    "partition": partition,
                    "learned_ms": gradient_ms,
                }
                lines.append(msgspec.json.encode(line) + b"\n")
                row += 1
        return lines
