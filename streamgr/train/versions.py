"""Versions on their way to the scorers: cut between two steps, judged and published by a thread of their own.

Training stands still for the cut alone, and the cut copies little. As a virtual machine is moved while it runs:

1. `copy_ahead`: the thread copies the rows that changed since the last published version, while the loop trains on.
   Some change under its hands; they are marked, so nothing of that matters.
2. `cut`, between two steps: the loop copies the rows marked since then, the network, and the facts. From here on the
   version stands still.
3. The thread puts the two copies together, a late row in place of an early one, and has them judged by the guard. It
   syncs the step log, hashes the rows into the state digest, asks the probe, and sends.
4. `ended`: the version is acknowledged, or withheld, or an error of the thread is raised here, in the loop.

The mark from which changes count moves with an acknowledged version only: whatever was withheld, or was not sent
whole, is in the next one. One version is on its way at a time; while it waits for a broker, the loop trains on. What is
learned is a function of the steps: the thread reads the learner and never writes it.
"""

import copy
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from streamgr.clock import Clock
from streamgr.model import probe
from streamgr.model.hashing import I64, U64
from streamgr.model.recommender import Recommender
from streamgr.model.table import ITEM, IdTable
from streamgr.telemetry import DURATION_BUCKETS, histogram
from streamgr.train.guard import CLASS_TARGETS, Candidate, Guard, Verdict
from streamgr.train.prequential import Prequential
from streamgr.weights.digest import StateDigest, row_hashes
from streamgr.weights.manifest import Kind, Manifest, Probe
from streamgr.weights.publisher import Facts, Publisher

CUT = histogram("weights_cut_duration_seconds", "For how long a version held training up.", (), DURATION_BUCKETS)
LEAVE_SECONDS = 5.0  # how long `close` waits for the thread

Part = dict[str, Tensor]  # rows as `IdTable.rows` gives them


@dataclass(frozen=True, slots=True)
class Ahead:
    """Rows copied before the cut; those changed at or after `mark` may be torn. `size`: the table's rows."""

    kind: Kind
    size: int
    mark: int
    part: Part


@dataclass(frozen=True, slots=True)
class Cut:
    """A version as it stood between two steps. `late` goes before `ahead`; what changes at or after `mark` came later.

    keys u64[n] and vectors f32[n, D] are the probe's; prequential is a copy; facts lack what the thread finds out.
    """

    kind: Kind
    size: int
    mark: int
    ahead: Ahead | None
    late: Part
    dense: dict[str, Tensor]
    keys: U64
    vectors: Tensor
    prequential: Prequential
    gradient_norm: float
    facts: Facts


@dataclass(frozen=True, slots=True)
class Published:
    """Every byte of this version is acknowledged."""

    cut: Cut
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Withheld:
    """The guard has held this version back; nothing was sent."""

    cut: Cut
    verdict: Verdict


Result = Ahead | Published | Withheld | BaseException


class Versions:
    """The way out of one trainer. Its loop calls everything; the publisher, once claimed, is ours."""

    def __init__(
        self,
        publisher: Publisher,
        guard: Guard,
        table: IdTable,
        recommender: Recommender,
        *,
        compared_targets: int,
        sync: Callable[[], None],
        clock: Clock,
    ) -> None:
        """recommender: another one of the learner's kind, to ask. sync: makes the steps learned so far durable."""
        self._publisher, self._guard, self._table, self._clock = publisher, guard, table, clock
        self._recommender = recommender.eval().requires_grad_(False)
        self._compared_targets, self._sync = compared_targets, sync
        self._since = 0  # the table's mark at the last acknowledged version
        self._digest: StateDigest | None = None  # of what is published; None: nobody knows
        self.ahead: Ahead | None = None
        self.busy = False  # the thread is at work
        self._work: queue.SimpleQueue[Callable[[], Result] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def copy_ahead(self, watermark_ms: int) -> None:
        """Begin with the next version while training goes on; `ahead` is there when it may be `cut`."""
        kind, size, since, mark = self._kind(), len(self._table.weight), self._since, self._table.mark()
        self._begin(lambda: Ahead(kind, size, mark, self._table.rows(self._wanted(kind, since, watermark_ms))))

    def cut(self, dense: Mapping[str, Tensor], prequential: Prequential, gradient_norm: float, facts: Facts) -> None:
        """Freeze a version, between two steps, and have it published."""
        started = self._clock.monotonic()
        table, kind, size = self._table, self._kind(), len(self._table.weight)
        ahead, self.ahead = self.ahead, None
        if ahead is not None and (ahead.kind, ahead.size) == (kind, size):
            late = table.changed_since(ahead.mark)
        else:  # nothing was copied, or the table has grown since
            ahead, late = None, self._wanted(kind, self._since, facts.watermark_ms)
        rng = np.random.default_rng(facts.step)
        keys = probe.pick(table.draw(probe.KEYS, ITEM, facts.watermark_ms, rng)[1], facts.step)
        cut = Cut(
            kind=kind,
            size=size,
            mark=table.mark(),
            ahead=ahead,
            late=table.rows(late),
            dense={name: tensor.detach().to("cpu", copy=True) for name, tensor in dense.items()},
            keys=keys,
            vectors=table.vectors(table.lookup(keys, watermark_ms=facts.watermark_ms)),
            prequential=copy.deepcopy(prequential),
            gradient_norm=gradient_norm,
            facts=facts,
        )
        CUT.observe(self._clock.monotonic() - started)
        self._begin(lambda: self._publish(cut))

    def ended(self, timeout: float = 0.0) -> Published | Withheld | None:
        """What became of the version on its way, once; None while there is nothing to tell. Raises what the thread
        raised: the version's number is then used up, and the next one is a snapshot.
        """
        try:
            result = self._results.get(timeout > 0, timeout or None)
        except queue.Empty:
            return None
        self.busy = False
        match result:
            case BaseException():
                raise result
            case Ahead():
                self.ahead = result
                return None
            case Published(cut):
                self._since = cut.mark
        return result

    def close(self) -> None:
        """Let the thread go; what it has not finished is finished by nobody."""
        self._work.put(None)
        self._thread.join(LEAVE_SECONDS)

    def _kind(self) -> Kind:
        known = self._digest is not None and len(self._digest.hashes) == len(self._table.weight)
        return "delta" if known and not self._publisher.snapshot_due() else "snapshot"

    def _wanted(self, kind: Kind, since: int, watermark_ms: int) -> I64:
        table = self._table
        return table.snapshot_rows(watermark_ms) if kind == "snapshot" else table.changed_since(since)

    def _begin(self, work: Callable[[], Result]) -> None:
        if self.busy:
            raise ValueError("one version at a time")
        self.busy = True
        self._work.put(work)

    # -- in the thread

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                self._results.put(work())
            except BaseException as error:  # raised where the loop asks: whatever it is, it ends the role there
                self._results.put(error)

    def _publish(self, cut: Cut) -> Published | Withheld:
        part = _together(cut, self._table.first_slot)
        entropy = cut.prequential.recent_entropy(self._compared_targets, CLASS_TARGETS)
        candidate = Candidate(cut.dense, part["rows"], part["weight"], cut.gradient_norm, entropy)
        quality = cut.prequential.export()
        if (verdict := self._guard.judge(candidate)) is not None:
            return Withheld(cut, verdict)
        self._sync()
        digest, self._digest = self._digest, None  # until it is published
        if digest is None or cut.kind == "snapshot":
            digest = StateDigest(cut.size)
        digest.replace(part["rows"].numpy(), row_hashes(part))
        self._recommender.load_state_dict(cut.dense)
        logits = probe.ask(self._recommender, cut.vectors)
        payload = {f"dense/{name}": tensor for name, tensor in cut.dense.items()}
        payload |= {f"table/{name}": column for name, column in part.items()}
        facts = replace(
            cut.facts,
            quality=quality,
            state_digest=digest.text,
            probe=Probe(cut.keys.tolist(), logits.tolist()),
        )
        manifest = self._publisher.publish(cut.kind, payload, facts)
        self._digest = digest
        self._guard.published(candidate)
        return Published(cut, manifest)


def _together(cut: Cut, first_slot: int) -> Part:
    """The rows of a cut: those copied ahead that have not changed since, then those copied late.

    What has expired since it was copied is no part of a snapshot: it is the same, however it came about.
    """
    if cut.ahead is None:
        return cut.late
    part = cut.ahead.part
    changed = torch.zeros(cut.size, dtype=torch.bool)
    changed[cut.late["rows"]] = True
    kept = torch.nonzero(~changed[part["rows"]])[:, 0]
    part = {name: _joined(column, kept, cut.late[name]) for name, column in part.items()}
    held = (part["rows"] < first_slot) | (part["until_ms"] >= cut.facts.watermark_ms)
    if cut.kind == "delta" or bool(held.all()):
        return part
    return {name: column[held] for name, column in part.items()}


def _joined(column: Tensor, kept: Tensor, more: Tensor) -> Tensor:
    """column[kept], then `more`; each byte is moved once."""
    joined = column.new_empty((len(kept) + len(more), *column.shape[1:]))
    torch.index_select(column, 0, kept, out=joined[: len(kept)])
    joined[len(kept) :] = more
    return joined
