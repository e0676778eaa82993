"""The role against brokers: exactly once in effect, by the store's own offset."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import confluent_kafka
import msgspec
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from streamgr.clock import SystemClock
from streamgr.config import Config, Kafka, Sequence, State, Telemetry
from streamgr.errors import ConfigError, RetentionPassed, StateNotWritable, TryAgain
from streamgr.events import Record
from streamgr.kafka import topics
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.sequence import examples as wire
from streamgr.sequence import maintenance, views
from streamgr.sequence import sequencer as module
from streamgr.sequence.follower import Follower
from streamgr.sequence.partition import Partition
from streamgr.sequence.sequencer import Sequencer
from streamgr.service import Stop
from streamgr.state.rocks import Memory
from streamgr.state.store import Store, partition_directory
from streamgr.telemetry import Health, Log
from tests.oracle import Oracle
from tests.streams import START, Row, events, heartbeats, row

PARTITIONS = 4


class Town:
    """One broker, one topic prefix, one state directory."""

    def __init__(self, bootstrap: str, prefix: str, directory: Path) -> None:
        self.config = Config(
            kafka=Kafka(bootstrap=bootstrap, topic_prefix=prefix),
            state=State(directory=str(directory), cache_bytes=1 << 20, write_buffer_bytes=1 << 20),
            sequence=Sequence(attribution_window_seconds=2, lateness_seconds=1, close_step_seconds=0.2),
            telemetry=Telemetry(log_level="error"),
        )
        specs = topics.load_specs(topics.specs_path(), prefix)
        assert not [f for f in topics.apply(self.config.kafka, specs) if f.level == "fail"]
        self.clock, self.directory = SystemClock(), directory

    def changed(self, **fields: Any) -> Config:
        sequence = msgspec.structs.replace(self.config.sequence, **fields)
        return msgspec.structs.replace(self.config, sequence=sequence)

    def role(self, config: Config | None = None, stop: Stop | None = None, **how: bool) -> Sequencer:
        log, health = Log("sequencer", self.config.telemetry, self.clock), Health("test-sequencer", self.clock)
        return Sequencer(config or self.config, self.clock, log, health, Stop() if stop is None else stop, **how)

    def publish(self, rows: list[Row]) -> None:
        producer = Producer(self.config.kafka, client_id="test")
        for key, value, partition in rows:
            producer.send(self.config.topic("events"), value, key=key, partition=partition)
        producer.confirm()
        producer.close()

    def read(self, topic: str) -> list[Record]:
        """All records of a topic as it stands, partition by partition."""
        consumer, name = Consumer(self.config.kafka, client_id="test"), self.config.topic(topic)
        ends = {p: consumer.bounds(name, p)[1] for p in range(PARTITIONS)}
        consumer.assign({(name, p): 0 for p in range(PARTITIONS)})
        found: list[Record] = []
        while len(found) < sum(ends.values()):
            found += consumer.poll()
        consumer.close()
        return sorted(found, key=lambda r: (r.partition, r.offset))

    def ends(self) -> dict[int, int]:
        """The end offset of each partition of the events."""
        consumer, name = Consumer(self.config.kafka, client_id="test"), self.config.topic("events")
        ends = {p: consumer.bounds(name, p)[1] for p in range(PARTITIONS)}
        consumer.close()
        return ends

    def committed(self) -> dict[int, int]:
        """What the group tells lag tools."""
        consumer = confluent_kafka.Consumer(
            {"bootstrap.servers": self.config.kafka.bootstrap, "group.id": self.config.group("sequencer")}
        )
        asked = [TopicPartition(self.config.topic("events"), p) for p in range(PARTITIONS)]
        found = {p.partition: p.offset for p in consumer.committed(asked, 10)}
        consumer.close()
        return found

    def accepted(self) -> list[tuple[int, int, str, str, tuple[str, ...]]]:
        """Targets as a reader takes them (decision 3): by partition, each position once, none missing."""
        marks = dict.fromkeys(range(PARTITIONS), wire.BEFORE_ALL)
        found = []
        for record in self.read("examples"):
            output = wire.decode(record.value or b"")
            if isinstance(output, wire.Progress) or output.position <= marks[record.partition]:
                continue
            assert output.prev <= marks[record.partition], "an output is missing"
            marks[record.partition] = output.position
            shown = views.examples_json(output, record.partition, self.config.sequence.actions)
            found += [
                (record.partition, output.position[0], output.user, t["event_id"], tuple(t["labels"]))
                for t in shown["targets"]
            ]
        return sorted(found)

    def assert_like_the_oracle(self) -> None:
        oracles = [Oracle(2_000, 1_000, 200) for _ in range(PARTITIONS)]
        for r in self.read("events"):
            if r.value is not None and not r.value.startswith(b"{"):
                continue
            event = {"erase": (r.key or b"").decode()} if r.value is None else json.loads(r.value)
            oracles[r.partition].feed(r.offset, event)
        wanted = [(p, t.offset, t.user, t.event_id, t.labels) for p, o in enumerate(oracles) for t in o.targets]
        assert self.accepted() == sorted(wanted)
        sequences = sorted((s for o in oracles for s in o.sequences()), key=lambda s: s["user_id"])
        assert list(views.export(self.directory)) == sequences
        assert len(wanted) > 100


@pytest.fixture
def town(broker: EmbeddedBroker, prefix: str, tmp_path: Path) -> Town:
    """On a real Kafka and on the mock."""
    return Town(broker.bootstrap, prefix, tmp_path)


@pytest.fixture
def real(kafka: str, prefix: str, tmp_path: Path) -> Town:
    return Town(kafka, prefix, tmp_path)


@pytest.fixture
def running() -> Iterator[Callable[[Sequencer, Stop], threading.Thread]]:
    """Run a role in a thread; told to stop and waited for at the end."""
    started: list[tuple[threading.Thread, Stop]] = []

    def start(role: Sequencer, stop: Stop) -> threading.Thread:
        thread = threading.Thread(target=role.run)
        thread.start()
        started.append((thread, stop))
        return thread

    yield start
    for thread, stop in started:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    clock, pause = SystemClock(), threading.Event()
    end = clock.monotonic() + seconds
    while not condition():
        assert clock.monotonic() < end, "it did not come"
        pause.wait(0.05)


def rows(seed: int, n: int) -> list[Row]:
    return [row(e) for e in events(seed, n)]


def test_until_the_end_in_two_parts_gives_the_oracles_answer(town: Town) -> None:
    stream = rows(1, 1_200)
    town.publish(stream[:700])
    town.role().run_until_end()
    town.publish([*stream[700:], (b"u1", None, None), (b"u", b"rubbish", 2), *heartbeats(120_000, PARTITIONS)])
    town.role().run_until_end()
    town.assert_like_the_oracle()
    (letter,) = town.read("dead-letters")
    assert (letter.partition, letter.key, letter.value) == (2, b"u", b"rubbish")
    ends = {r.partition: r.offset + 1 for r in town.read("events")}
    told = {}
    for record in town.read("examples"):
        output = wire.decode(record.value or b"")
        if isinstance(output, wire.Progress):
            told[record.partition] = output.offset
    assert told == ends
    before = len([r for r in town.read("examples") if isinstance(wire.decode(r.value or b""), wire.Example)])
    town.role().run_until_end()  # nothing came: nothing is said, but for where each partition is
    again = [wire.decode(r.value or b"") for r in town.read("examples")]
    assert len([o for o in again if isinstance(o, wire.Example)]) == before


def test_the_group_takes_the_partitions_works_and_drains(
    town: Town, running: Callable[[Sequencer, Stop], threading.Thread]
) -> None:
    stop = Stop()
    thread = running(town.role(stop=stop), stop)
    town.publish(rows(2, 800) + heartbeats(120_000, PARTITIONS))
    until(lambda: len({p for p, *_ in town.accepted()}) == PARTITIONS)
    stop.set()
    thread.join(30)
    town.role().run_until_end()  # the locks are free
    town.assert_like_the_oracle()


def test_a_partition_moves_between_two_members_without_a_trace(
    real: Town, running: Callable[[Sequencer, Stop], threading.Thread]
) -> None:
    stream, first, second = rows(3, 1_200), Stop(), Stop()
    thread = running(real.role(stop=first), first)
    real.publish(stream[:400])
    until(lambda: len(real.read("examples")) > 20)
    running(real.role(stop=second), second)
    real.publish(stream[400:800])
    first.set()
    thread.join(30)
    real.publish(stream[800:] + heartbeats(120_000, PARTITIONS))
    marks = dict.fromkeys(range(PARTITIONS), 0)

    def all_told() -> bool:
        for record in real.read("examples"):
            output = wire.decode(record.value or b"")
            if isinstance(output, wire.Progress):
                marks[record.partition] = output.offset
        return marks == {r.partition: r.offset + 1 for r in real.read("events")}

    until(all_told)
    second.set()
    real.assert_like_the_oracle()


@pytest.mark.parametrize("step", ["before confirm", "before write", "between two writes", "after write"])
def test_a_crash_at_any_step_of_the_commit_order_leaves_no_trace(
    real: Town, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The crash is an exception nobody catches; what a kill loses in memory is dropped by closing unwritten."""
    real.publish(rows(4, 900) + heartbeats(120_000, PARTITIONS))

    class Crash(Exception):
        pass

    commit, writes = Partition.commit, 0

    def crashing(self: Partition) -> None:
        nonlocal writes
        writes += 1
        if step == "before write" or (step == "between two writes" and writes % 2 == 0):
            raise Crash
        commit(self)
        if step == "after write":
            raise Crash

    def unconfirmed(self: Producer, timeout: float | None = None) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        if step == "before confirm":
            patch.setattr(Producer, "confirm", unconfirmed)
        else:
            patch.setattr(Partition, "commit", crashing)
        for _ in range(2):
            with pytest.raises(Crash):
                real.role().run_until_end()
    real.role().run_until_end()
    real.assert_like_the_oracle()


def test_a_locked_store_means_try_again(town: Town) -> None:
    path = partition_directory(town.directory / "sequencer", 1)
    store = Store(path, Memory(town.config.state))
    with pytest.raises(TryAgain, match="another process holds"):
        town.role().run_until_end()
    store.close()
    town.role().run_until_end()


def test_a_partition_that_is_still_locked_waits_while_the_others_go_on(
    town: Town, running: Callable[[Sequencer, Stop], threading.Thread]
) -> None:
    store, stop = Store(partition_directory(town.directory / "sequencer", 1), Memory(town.config.state)), Stop()
    role = town.role(stop=stop)
    thread = running(role, stop)
    town.publish(rows(13, 900) + heartbeats(120_000, PARTITIONS))
    until(lambda: {p for p, *_ in town.accepted()} == {0, 2, 3})
    assert role._health.ready() == (False, {"partitions": "opening [1]"})
    assert thread.is_alive()
    store.close()
    until(lambda: len({p for p, *_ in town.accepted()}) == PARTITIONS)
    until(lambda: role._health.ready()[0])
    stop.set()
    thread.join(30)
    town.role().run_until_end()
    town.assert_like_the_oracle()


def test_a_state_that_cannot_be_written_is_named(town: Town) -> None:
    (town.directory / "sequencer").write_text("in the way")
    with pytest.raises(StateNotWritable):
        town.role().run_until_end()


def test_changed_settings_take_effect_only_where_the_old_ones_have_ended(real: Town) -> None:
    real.publish(rows(5, 600) + heartbeats(120_000, PARTITIONS))
    real.role().run_until_end()
    other = real.changed(attribution_window_seconds=3.0)
    real.role(other).run_until_end()  # every output lies below the stored offset: accepted
    real.role(real.config).run_until_end()
    with pytest.raises(ConfigError, match=r"fingerprint.*old settings") as caught:
        real.role(other, rebuild=True).run_until_end()  # the same records would be answered again, otherwise
    assert caught.value.exit_code == 78


def test_a_rebuild_says_the_same_again(real: Town) -> None:
    real.publish(rows(6, 600) + heartbeats(120_000, PARTITIONS))
    real.role().run_until_end()
    exported, before = list(views.export(real.directory)), len(real.read("examples"))
    real.role(rebuild=True).run_until_end()
    assert list(views.export(real.directory)) == exported
    assert len(real.read("examples")) > before
    real.assert_like_the_oracle()


def test_a_log_that_lost_its_start_needs_the_loss_accepted(real: Town) -> None:
    stream = rows(7, 400)
    real.publish(stream)
    cut = {r.partition: r.offset + 1 for r in real.read("events")}
    admin = AdminClient({"bootstrap.servers": real.config.kafka.bootstrap})
    name = real.config.topic("events")
    for future in admin.delete_records([TopicPartition(name, p, offset) for p, offset in cut.items()]).values():
        future.result(10)
    with pytest.raises(RetentionPassed, match=r"the log starts at.*--accept-loss"):
        real.role().run_until_end()
    real.publish(heartbeats(120_000, PARTITIONS))
    real.role(accept_loss=True).run_until_end()
    assert [len(s["events"]) for s in views.export(real.directory)] == []
    real.role().run_until_end()


def test_retention_that_overtakes_the_store_is_an_error_not_a_jump(real: Town) -> None:
    stream = rows(8, 400)
    real.publish(stream[:200])
    real.role().run_until_end()
    real.publish(stream[200:])
    admin = AdminClient({"bootstrap.servers": real.config.kafka.bootstrap})
    name = real.config.topic("events")
    cut = [TopicPartition(name, r.partition, r.offset) for r in real.read("events")]
    for future in admin.delete_records([max(cut, key=lambda t: t.offset)]).values():
        future.result(10)
    with pytest.raises(RetentionPassed):
        real.role().run_until_end()


def test_a_recreated_topic_is_refused(real: Town) -> None:
    real.publish(rows(9, 50))
    real.role().run_until_end()
    admin = AdminClient({"bootstrap.servers": real.config.kafka.bootstrap})
    name = real.config.topic("events")
    admin.delete_topics([name])[name].result(10)
    specs = topics.load_specs(topics.specs_path(), real.config.kafka.topic_prefix)
    until(lambda: not [f for f in topics.apply(real.config.kafka, specs) if f.level == "fail"])
    with pytest.raises(ConfigError, match=r"the topic was recreated.*remove"):
        real.role().run_until_end()


def test_what_transactions_leave_in_the_log_is_passed_over(
    real: Town, running: Callable[[Sequencer, Stop], threading.Thread]
) -> None:
    """Their control records take up offsets and never arrive; aborted events are not to be seen."""
    stream = rows(10, 400)
    producer = confluent_kafka.Producer(
        {
            "bootstrap.servers": real.config.kafka.bootstrap,
            "transactional.id": real.config.kafka.topic_prefix,
            "partitioner": "murmur2_random",
        }
    )
    producer.init_transactions(10)
    for n, part in enumerate((stream[:150], stream[150:200], stream[200:], heartbeats(120_000, PARTITIONS))):
        producer.begin_transaction()
        for key, value, partition in part:
            where = {} if partition is None else {"partition": partition}
            producer.produce(real.config.topic("events"), value, key, **where)
        if n == 1:
            producer.flush(10)
            producer.abort_transaction(10)
        else:
            producer.commit_transaction(10)
    real.role().run_until_end()
    until(lambda: all(row["next_offset"] == real.ends()[row["partition"]] for row in maintenance.show(real.directory)))
    follower = Follower(real.config, real.clock, Log("scorer", real.config.telemetry, real.clock))
    follower.open()

    def ready() -> bool:
        follower.step()
        return not follower.why_not_ready() and follower.age_seconds() == 0

    until(ready)
    shown = {s["user_id"]: follower.sequence(s["user_id"]) for s in views.export(real.directory)}
    follower.close()
    assert [*shown.values()] == list(views.export(real.directory))
    aborted = {json.loads(value)["event_id"] for _, value, _ in stream[150:200] if value}
    kept = {json.loads(value)["event_id"] for _, value, _ in stream[:150] + stream[200:] if value}
    seen = {event["event_id"] for s in shown.values() for event in s["events"]}
    assert not seen & (aborted - kept)
    stop = Stop()
    running(real.role(stop=stop), stop)
    until(lambda: real.committed() == real.ends())


def test_heartbeats_where_nobody_else_sends_them(
    real: Town, running: Callable[[Sequencer, Stop], threading.Thread]
) -> None:
    stop = Stop()
    running(real.role(real.changed(heartbeat_seconds=0.2), stop), stop)
    until(lambda: {r.partition for r in real.read("events")} == set(range(PARTITIONS)))
    record = real.read("events")[0]
    assert record.key is None
    assert json.loads(record.value or b"")["type"] == "heartbeat"
    assert START > 0
    until(lambda: any(isinstance(wire.decode(r.value or b""), wire.Progress) for r in real.read("examples")))
    assert module.PROGRESS_SECONDS <= 1.0
