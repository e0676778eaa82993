"""Random deaths of sequencers and broker under load, and then everything against the oracle.

Three workers of one group: 0 and 1 share a disk (one host: RocksDB's lock is the fence), 2 has its own (it gets
partitions by snapshot and replay, and now and then loses its disk). A publisher feeds them all the while. Deaths are
dealt from a seeded deck, the next one when work has been seen since the last:

    kill     SIGKILL, also while it starts or drains
    term     SIGTERM; it must leave with 0 before its drain deadline
    point    a life that ends by itself at a named point of the commit order (`tests.crash.worker`)
    zombie   SIGSTOP for longer than the session timeout, while others take over; then SIGCONT
    broker   kill -9, sometimes of a worker too, restart on the same directory

In the end the workers alone must have come to the end of the log and say so to the group; then every disk, one restored
from snapshots and one made from the log alone must export the same bytes, the oracle's.
"""

import json
import random
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from tests.crash import verdict
from tests.crash.feed import Publisher, Stream
from tests.crash.hosts import CLOSING_MS, DRAIN_SECONDS, SETTINGS, Broker, Host, Worker, opened_from
from tests.crash.worker import POINTS
from tests.system import PARTITIONS, wait_for

KINDS = ("kill", "term", "point", "zombie", "broker")
LEAVE_SECONDS = 3.0  # beyond the drain deadline: the interpreter's own end
WORK_SECONDS = 90.0  # without an output for so long, the system stands still
DRAINED_SECONDS = 180.0
ARMED_SECONDS = 8.0  # a worker that is to die by itself is spared so long; thrice that where others must come first
RARE = {"after_open", "in_assign", "in_revoke", "in_revoke_written", "after_checkpoint", "mid_restore"}
RARE |= {"before_manifest", "after_manifest"}
WIPED_AFTER = {1, *range(8, 10_000, 8)}  # lives of the worker that has a disk of its own
LINGERING = 0.8  # the share of lives whose outputs wait until they are confirmed
FROZEN_SECONDS = (2.0, 8.0)  # beyond the session timeout: at least, and at most until others have taken over
Json = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to happen. The storm is over after `kills` deaths, of each kind one, or `seconds`; 0: no limit."""

    kills: int = 100
    seconds: float = 0.0
    seed: int = 1
    rate: float = 1_000.0
    kinds: tuple[str, ...] = KINDS
    points: tuple[str, ...] = POINTS
    armed: float = 0.45  # the share of lives that end at a point
    pause: tuple[float, float] = (0.3, 2.0)
    session_seconds: float = 3.0
    control: str = ""


@dataclass
class Tally:
    """What has happened."""

    kills: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    wipes: int = 0
    taken_over: int = 0  # zombies whose partitions somebody else had opened when they woke
    problems: list[str] = field(default_factory=list)


class Storm:
    """One storm in a directory of its own; `run` gives the verdict."""

    def __init__(self, plan: Plan, directory: Path, bootstrap: str, broker: Broker | None) -> None:
        """broker: the one at `bootstrap`, if it may be killed."""
        self.plan, self.directory, self.broker = plan, directory, broker
        self.tally = Tally()
        self._rng = random.Random(plan.seed)
        self._began = time.monotonic()
        prefix = f"s{uuid.uuid4().hex[:8]}"
        options = ["--session-seconds", str(plan.session_seconds)]
        options += ["--control", plan.control] if plan.control else []
        snapshots: Json = {"state__snapshots_directory": str(directory / "snapshots")}
        if plan.control:  # no snapshots, one disk; the group is told at each commit
            snapshots = {"state__sync_seconds": 0.0}

        def host(name: str, **keys: Any) -> Host:
            return Host(bootstrap, prefix, directory / name, options, **(SETTINGS | keys))

        self.shared = host("shared", **snapshots)
        self.own = self.shared if plan.control else host("own", **snapshots)
        self.restored = host("restored", **snapshots)
        self.replayed = host("replayed")
        self.workers = [Worker(f"w{n}", self.own if n == 2 else self.shared) for n in range(3)]
        self._asking = self._asker()
        self._outputs = 0  # as last seen
        self._storming = True
        self._tries: Counter[str] = Counter()  # how often a life was to end at a point

    def run(self) -> Json:
        """The whole of it. Raises `AssertionError` where it stands still."""
        try:
            self.shared.command("topics", "apply")
            stream = Stream(self.plan.seed, PARTITIONS, repeats=not self.plan.control)
            publisher = Publisher(self.shared.bootstrap, f"{self.shared.prefix}.events", stream, self.plan.rate)
            publisher.start()
            self._began = time.monotonic()
            for worker in self.workers:
                worker.start()
            self._rage()
            stormed = time.monotonic() - self._began
            self._tell(f"the storm is over: {self._deaths} deaths; closing every label")
            self._storming = False
            publisher.finish(2 * CLOSING_MS, 120.0)
            said = self._drain()
            return {**self._judge(said), "storm_seconds": round(stormed, 1), "seconds": self._elapsed}
        except BaseException:
            for worker in self.workers:
                self._tell(f"== {worker.log.name}\n{worker.last_words()}")
            raise
        finally:
            for host in (self.shared, self.own, self.restored, self.replayed):
                host.close()
            self._asking.close()

    # --- the storm ---

    def _rage(self) -> None:
        deck = self._deck()
        while not self._over:
            self._await_work()
            self._tend(self._rng.uniform(*self.plan.pause))
            if any(self._spared(w) for w in self.workers if w.point.startswith("in_revoke")):
                self._tend(self.plan.session_seconds)  # a revocation needs a group that comes to rest
            if not self._over:
                getattr(self, f"_{next(deck)}")()

    @property
    def _deaths(self) -> int:
        return self.tally.kills.total()

    @property
    def _elapsed(self) -> float:
        return round(time.monotonic() - self._began, 1)

    @property
    def _over(self) -> bool:
        plan = self.plan
        enough = bool(plan.kills) and self._deaths >= plan.kills
        if plan.seconds and self._elapsed >= plan.seconds:
            return True
        return enough and all(self.tally.kills[kind] or (kind == "broker" and not self.broker) for kind in plan.kinds)

    def _deck(self) -> Iterator[str]:
        """Kinds of death without end. Points come by themselves, as lives that end there are begun."""
        size = min(24, max(5, round(self.plan.kills * 0.6))) if self.plan.kills else 24
        cards = ["zombie", "broker"] + ["term"] * (size // 4)
        cards += ["kill"] * (size - len(cards))
        if self.broker is None:
            cards.remove("broker")
        cards = [card for card in cards if card in self.plan.kinds]
        while True:
            self._rng.shuffle(cards)
            yield from cards or ["wait"]

    def _wait(self) -> None:
        """Where all deaths are to come by themselves."""

    def _kill(self) -> None:
        if victim := self._victim([w for w in self.workers if w.alive]):
            self._tell(f"SIGKILL {victim.name}")
            victim.killed = True
            victim.send(signal.SIGKILL)
            self.tally.kills["kill"] += 1

    def _term(self) -> None:
        if victim := self._victim([w for w in self.workers if w.listens]):
            self._tell(f"SIGTERM {victim.name}")
            victim.told = time.monotonic()
            victim.send(signal.SIGTERM)
            self.tally.kills["term"] += 1

    def _zombie(self) -> None:
        """Stopped for longer than the group waits for it; what it owned goes to the others, who may wait for locks."""
        if not (candidates := [w for w in self.workers if w.listens and w.opened]):
            return
        victim = self._rng.choice(candidates)
        owned, taken, began = victim.opened, set[int](), time.monotonic()
        self._tell(f"SIGSTOP {victim.name}, who owns {sorted(owned)}")
        victim.send(signal.SIGSTOP)
        self.tally.kills["zombie"] += 1
        self._tend(self.plan.session_seconds + FROZEN_SECONDS[0])
        while not taken and time.monotonic() - began < self.plan.session_seconds + FROZEN_SECONDS[1]:
            self._tend(0.1)
            taken = owned & set[int]().union(*(w.opened for w in self.workers if w is not victim and w.alive))
        self.tally.taken_over += bool(taken)
        seconds = time.monotonic() - began
        self._tell(f"SIGCONT {victim.name} after {seconds:.1f} s; others have opened {sorted(taken)}")
        victim.send(signal.SIGCONT)

    def _broker(self) -> None:
        assert self.broker is not None
        self._tell("kill -9 of the broker")
        self.broker.kill()
        self.tally.kills["broker"] += 1
        self._tend(self._rng.uniform(0.2, 1.5))
        self._rng.choice([self._kill, self._kill, self._term, self._wait])()
        self._tend(self._rng.uniform(0.2, 1.0))
        self.broker.restart()
        self._tell("the broker is back")

    def _victim(self, candidates: list[Worker]) -> Worker | None:
        """A random one; who is to die by itself is spared for a while."""
        ripe = [w for w in candidates if not self._spared(w)]
        return self._rng.choice(ripe) if ripe else None

    @staticmethod
    def _spared(worker: Worker) -> bool:
        seconds = ARMED_SECONDS * (3 if worker.point.startswith("in_revoke") else 1)
        return bool(worker.point) and worker.alive and time.monotonic() - worker.began < seconds

    def _await_work(self) -> None:
        """Until there is an output that was not there before."""
        before, patience = self._count_outputs(), time.monotonic() + WORK_SECONDS
        while not self._over and self._count_outputs() <= before:
            assert time.monotonic() < patience, f"no output for {WORK_SECONDS} s after {before}: {self._outputs}"
            self._tend(0.1)

    def _count_outputs(self) -> int:
        try:
            self._outputs = sum(verdict.ends(self._asking, f"{self.shared.prefix}.examples").values())
        except KafkaException as error:  # the broker is just back, or this client has not seen it yet
            self._tell(f"no answer: {error}")
            self._asking.close()
            self._asking = self._asker()
            self._tend(0.2)
        return self._outputs

    def _asker(self) -> Consumer:
        """Never subscribes; it only asks."""
        group = f"{self.shared.prefix}-sequencer"
        return Consumer({"bootstrap.servers": self.shared.bootstrap, "group.id": group, "log_level": 0})

    # --- the workers' lives ---

    def _tend(self, seconds: float) -> None:
        """See to the workers for so long: bury who has died, begin the next lives."""
        end = time.monotonic() + seconds
        while True:
            for worker in self.workers:
                self._see_to(worker)
            if (left := end - time.monotonic()) <= 0:
                return
            time.sleep(min(0.05, left))

    def _see_to(self, worker: Worker) -> None:
        now = time.monotonic()
        if worker.process is None:
            if now >= worker.due:
                self._begin(worker)
        elif (code := worker.process.poll()) is not None:
            self._bury(worker, code)
            worker.process, worker.due = None, now + self._rng.choice([0.0, 0.0, self._rng.uniform(0.2, 1.5)])
        elif worker.told is not None and now - worker.told > DRAIN_SECONDS + LEAVE_SECONDS and not worker.killed:
            self._complain(worker, f"told to leave {now - worker.told:.1f} s ago, and still here")
            worker.killed = True
            worker.send(signal.SIGKILL)

    def _bury(self, worker: Worker, code: int) -> None:
        if code == -signal.SIGKILL and worker.grave.exists():
            self.tally.kills["point"] += 1
            self.tally.points[worker.point] += 1
            self._tell(f"{worker.name} died at {worker.point}")
        elif worker.told is not None and code == 0:
            self._tell(f"{worker.name} left after {time.monotonic() - worker.told:.1f} s")
        elif not (code == -signal.SIGKILL and worker.killed):
            self._complain(worker, f"exited {code}")

    def _begin(self, worker: Worker) -> None:
        wiped = self._storming and worker.host is self.own is not self.shared and worker.lives in WIPED_AFTER
        if wiped:
            worker.host.wipe()
            self.tally.wipes += 1
            self._tell(f"{worker.name} has lost its disk")
        point, passages = "", 1
        if self._storming and "point" in self.plan.kinds and self._rng.random() < self.plan.armed:
            point = self._next_point(wiped)
            passages = 1 if point in RARE else self._rng.randint(1, 12)
        if worker.lives:
            self.tally.restarts += 1
        linger = ("--linger-seconds", "0.5") if self._rng.random() < LINGERING else ()
        worker.start(*linger, point=point, passages=passages)
        if point:
            self._tell(f"{worker.name} begins, to die at {point}:{passages}")

    def _next_point(self, wiped: bool) -> str:
        """The one that was reached least, then tried least; a snapshot is restored where there is nothing else."""
        if wiped and "mid_restore" in self.plan.points and any(self.directory.glob("snapshots/*/*/*.json")):
            return "mid_restore"
        awaited = {w.point for w in self.workers if w.alive} | {"mid_restore"}
        if any(p.startswith("in_revoke") for p in awaited):  # somebody else must come and go
            awaited |= {"in_revoke", "in_revoke_written"}
        points = [p for p in self.plan.points if p not in awaited] or [*self.plan.points]
        self._rng.shuffle(points)
        point = min(points, key=lambda p: self.tally.points[p] + 0.2 * self._tries[p])
        self._tries[point] += 1
        return point

    def _tended(self) -> list[Worker]:
        self._tend(0.1)
        return self.workers

    # --- the end ---

    def _drain(self) -> dict[int, int]:
        """Wait until the group has reached the end of the log by itself, then end it; where the examples end."""
        name, group = f"{self.shared.prefix}.events", self._asking
        log_ends = verdict.ends(group, name)

        def reported() -> bool:
            self._tend(0.1)
            try:
                known = group.committed([TopicPartition(name, p) for p in log_ends], timeout=5)
            except KafkaException:
                return False
            return {tp.partition: tp.offset for tp in known} == log_ends

        wait_for("the workers to reach the end of the log, and to tell the group", reported, DRAINED_SECONDS)
        wait_for("three living workers", lambda: all(w.listens for w in self._tended()))
        for worker in self.workers:
            worker.told = time.monotonic()
            worker.send(signal.SIGTERM)
        for worker in self.workers:
            assert worker.process is not None and worker.told is not None
            code = worker.process.wait(DRAIN_SECONDS + LEAVE_SECONDS)
            if code != 0:
                self._complain(worker, f"drained in the end, exited {code}")
        self._tell("the workers have reached the end and left")
        return verdict.ends(self._asking, f"{self.shared.prefix}.examples")

    def _judge(self, said: dict[int, int]) -> Json:
        """Everything against the oracle."""
        hosts = {"shared": self.shared}
        if not self.plan.control:
            hosts |= {"own": self.own, "restored": self.restored, "replayed": self.replayed}
        with ThreadPoolExecutor(2) as pool:
            exports = dict(zip(hosts, pool.map(self._export, hosts.values()), strict=True))
        self._tell("asking the oracle")
        problems = self.tally.problems
        problems += [f"the export of {n} is not that of shared" for n, e in exports.items() if e != exports["shared"]]
        counted, wrong = verdict.judge(self.shared, exports["shared"], said)
        problems += wrong
        reached = {p: self.tally.points[p] for p in self.plan.points if "point" in self.plan.kinds}
        return {
            "exact": not problems,
            "seed": self.plan.seed,
            "control": self.plan.control,
            "deaths": self._deaths,
            "kills": {kind: self.tally.kills[kind] for kind in KINDS},
            "restarts": self.tally.restarts,
            "wipes": self.tally.wipes,
            "zombies_taken_over": self.tally.taken_over,
            **counted,
            "points": reached,
            "points_never_reached": [p for p, count in reached.items() if not count],
            "problems": problems,
        }

    def _export(self, host: Host) -> str:
        """Work off what is left (without a group, alone), verify every byte, and show every sequence."""
        try:
            if not self.plan.control:
                self._settle(host)
            return host.command("sequences", "export")[0]
        except AssertionError as error:
            self.tally.problems.append(str(error))
            return ""

    def _settle(self, host: Host) -> None:
        _, told = host.command("sequencer", "--until-end")
        opened: dict[int, str] = {}
        for line in told.splitlines():
            opened |= opened_from(json.loads(line)) if line.startswith("{") else {}
        self._tell(f"{host.directory.name} was opened from {opened}")
        sources = set(opened.values())
        if host is self.replayed and sources != {"log"}:
            self.tally.problems.append(f"without disk and snapshots it was opened from {opened}")
        if host is self.restored and self._deaths >= 20 and "snapshot" not in sources:
            self.tally.problems.append(f"no snapshot was there to restore: opened from {opened}")
        host.command("state", "verify")

    def _complain(self, worker: Worker, what: str) -> None:
        self.tally.problems.append(f"{worker.log.name}: {what}: {worker.last_words()[-1_000:]}")
        self._tell(self.tally.problems[-1])

    def _tell(self, what: str) -> None:
        print(f"{self._elapsed:7.1f} {self._deaths:3}  {what}", file=sys.stderr, flush=True)


def controlled(control: str, plan: Plan) -> Plan:
    """The same storm over workers without identities: SIGKILLs only, most of them right after a write."""
    points = ("after_write", "between_two_writes")
    return replace(plan, kinds=("kill", "point"), points=points, armed=0.8, control=control)
