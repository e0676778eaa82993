"""What a trainer that was killed again and again has left, held against one that was never disturbed.

The reference is an ordinary trainer in this process, on a directory that holds nothing but the killed one's step log,
whole: it recovers, which is to follow the log from the first step on. Wherever the killed one published it publishes
too, and every version must come out the same: the state digest, each tensor of the network, the figures, the probe's
answer. (Digests of the table's rows as sent are not compared: they come in the order in which they were copied. So
are positions and horizon: they move between two steps as records without targets arrive.) In the end the two have the
same tensors in every bit, optimizers included.
"""

from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from streamgr.clock import SystemClock
from streamgr.config import Config
from streamgr.errors import StreamgrError
from streamgr.model.table import TableStats
from streamgr.service import Stop
from streamgr.telemetry import Health, Log
from streamgr.train.checkpoint import Checkpoints
from streamgr.train.reader import Formed
from streamgr.train.steplog import Step, StepLog, _step
from streamgr.train.trainer import Trainer
from streamgr.weights import payload as payloads
from streamgr.weights.manifest import Manifest, decode, model_digest
from streamgr.weights.payload import Payload
from streamgr.weights.publisher import Claim, Facts
from tests.crash import verdict
from tests.crash.hosts import Host
from tests.oracle import Target

SHOWN = 5
MARKS = {"table/changed", "table/mark"}  # when rows changed for whom they were copied: no part of what is learned
Json = dict[str, Any]
Place = tuple[int, Target]  # the partition, and a target in it


def manifests(host: Host) -> list[Manifest]:
    """Every version ever published, in log order."""
    found = (decode(m.key(), m.value(), m.offset()) for m in host.read("manifests"))
    return [m for m in found if isinstance(m, Manifest)]


def taken(diary: Path) -> list[Step]:
    """The steps that count: one that comes again takes the place of all from there on."""
    steps = dict[int, Step]()
    for line in diary.read_bytes().split(b"\n")[:-1]:
        step = _step(line)
        for later in [n for n in steps if n >= step.step]:
            del steps[later]
        steps[step.step] = step
    return list(steps.values())


class Comparing:
    """A publisher that holds what it is given against what another one published, version by version."""

    def __init__(self, versions: list[Manifest]) -> None:
        self.left, self.problems, self.compared = deque(versions), list[str](), 0

    def claim(self, at_least: int = 0) -> Claim:
        return Claim(0, 0)

    def snapshot_due(self) -> bool:
        return bool(self.left) and self.left[0].kind == "snapshot"

    def publish(self, kind: str, payload: Payload, facts: Facts) -> Manifest:
        theirs = self.left.popleft()
        specs = payloads.encode(payload)[1]
        ours = msgspec.structs.replace(
            theirs,
            kind=kind,
            model_digest=model_digest(facts.model),
            step=facts.step,
            targets_learned=facts.targets_learned,
            watermark_ms=facts.watermark_ms,
            tensors=theirs.tensors | {n: spec for n, spec in specs.items() if n.startswith("dense/")},
            quality=dict(facts.quality),
            state_digest=facts.state_digest,
            probe=facts.probe,
        )
        self.compared += 1
        if different := [n for n in ours.__struct_fields__ if getattr(ours, n) != getattr(theirs, n)]:
            self.problems.append(f"{theirs.name()} of step {theirs.step} has another {', '.join(different)}")
        return ours

    def close(self) -> None: ...


class Reference(Trainer):
    """Publishes where the other one did, and nowhere else."""

    def _recover(self) -> bool:
        self._publish_what_is_due()
        return super()._recover()

    def _learn(self, formed: Formed, *, replay: bool = False) -> None:
        super()._learn(formed, replay=replay)
        self._publish_what_is_due()

    def _publish_what_is_due(self) -> None:
        left = self._publisher.left  # type: ignore[attr-defined]
        while left and left[0].step == self._learner.step:
            before = len(left)
            self._cut()
            assert self._wait() is None and len(left) < before, "what was published once was withheld"


def follow(config: Config, steps: list[Step], versions: list[Manifest]) -> tuple[Reference, Comparing]:
    """An undisturbed trainer, as far along the steps as it gets. The directory is the configuration's, and empty."""
    log = StepLog(config.role_directory("trainer") / "steps.jsonl")
    for step in steps:
        log.append(step)
    log.close()
    clock, comparing = SystemClock(), Comparing(versions)
    reference = Reference(
        config, clock, Log("trainer", config.telemetry, clock), Health("trainer", clock), Stop(), publisher=comparing
    )
    with reference._closing:
        try:
            reference._open()
        except StreamgrError as error:
            comparing.problems.append(f"nobody can follow the step log: {error}")
    return reference, comparing


def wanted(host: Host) -> Counter[Place]:
    """What the oracle says must be learned."""
    return Counter((p, target) for p, oracle in enumerate(verdict.expected(host).oracles) for target in oracle.targets)


def learned(prequential: Path) -> Counter[Place]:
    """What was learned, as often as the log names it."""
    lines = prequential.read_bytes().splitlines(keepends=True) if prequential.exists() else []
    each = [msgspec.json.decode(line) for line in lines if line.endswith(b"\n")]
    return Counter(
        (x["partition"], Target(x["offset"], x["user"], x["event_id"], x["item"], tuple(sorted(x["labels"]))))
        for x in each
    )


def judge(
    host: Host, want: Counter[Place], config: Config, diary: Path, prequential: Path, directory: Path
) -> tuple[Json, list[str]]:
    """What is there against what must be: counts, and what is wrong.

    config: the killed trainer's; prequential: its log of targets; directory: where the reference may live.
    """
    got = learned(prequential)
    versions, steps = manifests(host), taken(diary)
    problems = [f"a target too many: {t}" for t in list(got - want)[:SHOWN]]
    problems += [f"a target missing: {t}" for t in list(want - got)[:SHOWN]]
    if [m.step for m in versions] != sorted(m.step for m in versions):
        problems.append("a version was published, and then one of an earlier step")
    settings = {"state": {"directory": str(directory)}, "trainer": {"prequential_log": ""}}
    reference, comparing = follow(_with(config, settings), steps, versions)
    problems += comparing.problems[:SHOWN]
    if comparing.left:
        problems.append(
            f"{len(comparing.left)} versions are of steps that nobody took, the first: {comparing.left[0].step}"
        )
    loaded = Checkpoints(config.role_directory("trainer") / "checkpoints", reference._log).load(
        reference._architecture, config.trainer.seed
    )
    assert loaded is not None, "the last life leaves a checkpoint"
    facts, tensors = loaded
    problems += difference(tensors, reference)
    if (facts.step, facts.targets_learned) != (len(steps), want.total()):
        problems.append(f"{facts.targets_learned} targets in {facts.step} steps, not {want.total()} in {len(steps)}")
    stats: TableStats = reference._learner.table.stats()
    counted = {
        "targets": want.total(),
        "targets_twice": (got - want).total(),
        "targets_missing": (want - got).total(),
        "steps": len(steps),
        "versions": len(versions),
        "versions_compared": comparing.compared,
        "versions_different": len(comparing.problems),
        "slots": stats.slots,
        "evictions": stats.evictions,
        "expiries": stats.expiries,
    }
    return counted, problems


def difference(tensors: Mapping[str, Tensor], reference: Reference) -> list[str]:
    """Which tensors of a checkpoint are not the reference's, bit for bit."""
    own = reference._learner.state()
    own |= {f"prequential/{name}": tensor for name, tensor in reference._outcomes.prequential.state().items()}
    if own.keys() != tensors.keys():
        return [f"tensors of other names: {sorted(own.keys() ^ tensors.keys())[:SHOWN]}"]
    return [f"{name} differs in the end" for name in sorted(own.keys() - MARKS) if not _same(own[name], tensors[name])]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def _with(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    sections = {name: msgspec.structs.replace(getattr(config, name), **keys) for name, keys in changes.items()}
    return msgspec.structs.replace(config, **sections)
