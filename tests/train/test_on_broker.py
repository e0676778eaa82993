"""The trainer between real topics: examples in, versions out, as a scorer would take them."""

from pathlib import Path

import msgspec
import torch

from streamgr.clock import Deadline, SystemClock
from streamgr.config import Kafka
from streamgr.kafka import topics
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.model import probe
from streamgr.model.table import WIRE
from streamgr.service import Stop
from streamgr.telemetry import Health, Log
from streamgr.train.trainer import Trainer
from streamgr.weights.digest import StateDigest, row_hashes
from streamgr.weights.subscriber import Subscriber, Version
from tests.train.kit import settings, stream

PARTITIONS, EXAMPLES = 4, 12


def test_examples_become_versions_that_a_scorer_takes(broker: EmbeddedBroker, prefix: str, tmp_path: Path) -> None:
    kafka = Kafka(bootstrap=broker.bootstrap, topic_prefix=prefix)
    config = msgspec.structs.replace(settings(tmp_path, publish_seconds=0.1), kafka=kafka)
    clock = SystemClock()
    log = Log("trainer", config.telemetry, clock)
    topics.apply(kafka, topics.load_specs(topics.specs_path(), prefix))
    producer = Producer(kafka, client_id="test")
    for partition, outputs in enumerate(stream(PARTITIONS, EXAMPLES)):
        for value in outputs[: len(outputs) // 2]:
            producer.send(config.topic("examples"), value, partition=partition)
    producer.confirm(30)

    def trainer() -> Trainer:
        return Trainer(config, clock, log, Health("trainer", clock), Stop())

    first = trainer()
    first.run_until_end()
    for partition, outputs in enumerate(stream(PARTITIONS, EXAMPLES)):
        for value in outputs[len(outputs) // 2 :]:
            producer.send(config.topic("examples"), value, partition=partition)
    producer.confirm(30)
    second = trainer()
    second.start()
    deadline = Deadline(clock, 30)
    while (
        second._targets_learned < PARTITIONS * (3 * EXAMPLES + EXAMPLES // 5)
        or second._learner.step > second._published_step
        or second._versions.busy
    ):
        assert not deadline.passed()
        second.turn()
    second._closing.close()
    producer.close()

    subscriber = Subscriber(config, clock, log, lambda: Consumer(kafka, client_id="test"))
    taken: list[Version] = []
    while not taken or taken[-1].manifest.step < second._learner.step:
        assert not deadline.passed()
        if (version := subscriber.poll(0.2)) is not None:
            taken.append(version)
    subscriber.close()
    assert taken[0].manifest.kind == "snapshot"
    digest = StateDigest(len(second._learner.table.weight))
    for version in taken:
        part = {name.removeprefix("table/"): t for name, t in version.payload.items() if name.startswith("table/")}
        digest.replace(part["rows"].numpy(), row_hashes(part))
        assert digest.text == version.manifest.state_digest
        assert len(version.manifest.probe.logits) == probe.CANDIDATES
    served = torch.zeros_like(second._learner.table.weight, dtype=WIRE)
    for version in taken:
        served[version.payload["table/rows"]] = version.payload["table/weight"]
    used = second._learner.table.snapshot_rows(second._learner.watermark_ms)
    assert torch.equal(served[used], second._learner.table.weight[used].to(WIRE))
    for name, value in second._learner.model.state_dict().items():
        assert torch.equal(taken[-1].payload[f"dense/{name}"], value)
