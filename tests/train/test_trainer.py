import itertools
import json
import shutil
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from streamgr.clock import ManualClock
from streamgr.config import Table, Weights
from streamgr.errors import ConfigError, DataError, TryAgain
from streamgr.events import IMPRESSION
from streamgr.model.table import WIRE, IdTable
from streamgr.model.tokens import Layout
from streamgr.sequence.examples import encode
from streamgr.telemetry import Log
from streamgr.train import learner
from streamgr.train.batch import assemble
from streamgr.train.checkpoint import Checkpoints
from streamgr.train.learner import Learner
from streamgr.train.meters import SLOTLESS, USED
from streamgr.train.steplog import Step, StepLog
from streamgr.train.trainer import Trainer
from streamgr.weights.digest import StateDigest, row_hashes
from streamgr.weights.manifest import Learned, Manifest
from tests.train.kit import TOPIC, MemoryPublisher, MemorySource, build, example, progress, settings, stream

EXAMPLES, PARTITIONS = 24, 3


def tick(trainer: Trainer, turns: int) -> None:
    """Turns of the loop, in each of which a version comes as far as it can: copied ahead, then published."""
    for _ in range(turns):
        trainer._clock.advance(0.3)
        trainer.turn()
        trainer._wait()


def weights_of(trainer: Trainer) -> dict[str, bytes]:
    state = trainer._learner.state()
    return {n: t.numpy().tobytes() for n, t in state.items() if n not in ("table/mark", "table/changed")}


def crash(trainer: Trainer) -> None:
    """What is left of a process that was killed: its files; its lock is free."""
    trainer._closing.close()


def test_a_killed_trainer_learns_the_same_steps_to_the_same_bits(tmp_path: Path) -> None:
    logs = stream(PARTITIONS, EXAMPLES)
    straight = build(settings(tmp_path / "a", prequential_log=str(tmp_path / "a.jsonl")), MemorySource(logs, 11))
    straight.start()
    tick(straight, 40)

    config = settings(tmp_path / "b", prequential_log=str(tmp_path / "b.jsonl"))
    publisher = MemoryPublisher()
    killed = build(config, MemorySource(logs, 11), publisher)
    killed.start()
    tick(killed, 4)
    killed._checkpoint()
    tick(killed, 3)  # learned, logged, and not in any checkpoint
    lost = killed._learner.step
    crash(killed)

    resumed = build(config, MemorySource(logs, 1000), publisher)  # records arrive quite otherwise
    resumed.start()
    assert resumed._learner.step == lost > 0
    assert weights_of(resumed) == weights_of(killed)
    resumed._source.chunk, resumed._source.positions = 11, killed._source.positions  # from here on as before
    for lane in resumed._reader.lanes.values():
        lane.queue.clear()
        lane.queued_tokens = 0
        lane.queue.extend(killed._reader.lanes[lane.partition].queue)
        lane.fetched = killed._reader.lanes[lane.partition].fetched
        lane._accepted = killed._reader.lanes[lane.partition]._accepted
    resumed._source.turns = killed._source.turns
    tick(resumed, 33)

    assert weights_of(resumed) == weights_of(straight)
    assert resumed._targets_learned == straight._targets_learned == PARTITIONS * (3 * EXAMPLES + EXAMPLES // 5)
    assert resumed._outcomes.prequential.figures() == straight._outcomes.prequential.figures()
    lines = [[json.loads(x) for x in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in "ab"]
    for line in [*lines[0], *lines[1]]:
        del line["version"], line["learned_ms"]
    assert lines[0] == lines[1]
    crash(straight)
    crash(resumed)


def test_a_state_that_is_older_than_what_was_published_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(Log, "warning", lambda _, event, message="", **__: warned.append(f"{event}: {message}"))
    publisher = MemoryPublisher()
    trainer = build(settings(tmp_path), MemorySource(stream(1, 20), 3), publisher)
    trainer.start()
    tick(trainer, 4)
    trainer._checkpoint()
    kept = trainer._learner.step
    backup = shutil.copytree(tmp_path / "trainer", tmp_path / "backup")
    tick(trainer, 8)
    crash(trainer)
    again = build(settings(tmp_path), MemorySource(stream(1, 20), 3), publisher)
    again.start()
    assert not warned
    crash(again)
    shutil.rmtree(tmp_path / "trainer")
    backup.rename(tmp_path / "trainer")
    restored = build(settings(tmp_path), MemorySource(stream(1, 20), 3), publisher)
    restored.start()
    published = publisher.versions[-2][0].step
    assert 0 < kept < published
    assert [w for w in warned if f"the last version was of step {published}, our files end at {kept}" in w] == warned
    assert len(warned) == 1
    crash(restored)


def test_until_end_is_a_function_of_the_topic(tmp_path: Path) -> None:
    logs = stream(PARTITIONS, EXAMPLES, seed=3)
    trainers = []
    for name, chunk in (("a", 3), ("b", 1000)):
        publisher = MemoryPublisher()
        trainers.append(build(settings(tmp_path / name), MemorySource(logs, chunk), publisher))
        trainers[-1].run_until_end()
        assert [m.kind for m, _ in publisher.versions] == ["snapshot"]
        assert publisher.versions[0][0].positions[TOPIC] == {p: len(log) for p, log in enumerate(logs)}
    assert weights_of(trainers[0]) == weights_of(trainers[1])
    again = build(settings(tmp_path / "b"), MemorySource(logs, 5))
    again.run_until_end()  # nothing is left to learn
    assert again._learner.step == trainers[1]._learner.step
    assert weights_of(again) == weights_of(trainers[1])


def test_a_damaged_checkpoint_costs_no_step_whichever_way_they_were_formed(tmp_path: Path) -> None:
    logs, source = stream(1, 30), MemorySource(stream(1, 12), 3)
    for _ in range(2):  # up to two ends, with a checkpoint at each
        trainer = build(settings(tmp_path), source)
        trainer.run_until_end()
        source = MemorySource(stream(1, 20), 3)
    trainer = build(settings(tmp_path), MemorySource(logs, 3))
    trainer.start()
    tick(trainer, 5)
    crash(trainer)
    newest = sorted((tmp_path / "trainer" / "checkpoints").iterdir())[-1]
    (newest / "checkpoint.json").write_bytes(b"")
    again = build(settings(tmp_path), MemorySource(logs, 3))
    again.start()
    assert again._learner.step == trainer._learner.step > int(newest.name)
    assert weights_of(again) == weights_of(trainer)
    crash(again)


def test_repeated_examples_are_learned_once(tmp_path: Path) -> None:
    logs = stream(1, 10)
    twice = [[*logs[0][:8], *logs[0][2:], *logs[0]]]
    trainer = build(settings(tmp_path), MemorySource(twice, 4))
    trainer.start()
    tick(trainer, 20)
    assert trainer._targets_learned == 10 * 3 + 2
    crash(trainer)


def test_versions_a_snapshot_first_then_deltas_that_add_up_to_the_weights(tmp_path: Path) -> None:
    publisher = MemoryPublisher()
    source = MemorySource(stream(2, 12), 3, events={0: 130, 1: 130})
    trainer = build(settings(tmp_path), source, publisher)
    trainer.start()
    tick(trainer, 30)
    crash(trainer)
    manifests = [m for m, _ in publisher.versions]
    assert [m.kind for m in manifests] == ["snapshot"] + ["delta"] * (len(manifests) - 1)
    assert len(manifests) > 3
    assert [m.step for m in manifests] == sorted(m.step for m in manifests)
    assert [m.horizon_ms for m in manifests] == sorted(m.horizon_ms for m in manifests)
    assert manifests[0].horizon_ms == 0  # there are records, none of them answered yet
    assert manifests[-1].horizon_ms == 10_000 + 10 * 10  # the last example's own record is not known to be complete
    assert sum(Learned.unpack(m.learned).total for m in manifests) == manifests[-1].targets_learned
    held = torch.zeros((len(trainer._learner.table.weight), 8), dtype=WIRE)
    for _, payload in publisher.versions:
        held[payload["table/rows"]] = payload["table/weight"]
    used = trainer._learner.table.snapshot_rows(trainer._learner.watermark_ms)
    assert torch.equal(held[used], trainer._learner.table.weight[used].to(WIRE))
    assert source.committed[TOPIC, 0] == trainer._reader.lanes[0].state.next_offset


def test_nothing_new_publishes_nothing_and_progress_alone_moves_the_horizon(tmp_path: Path) -> None:
    logs = [[encode(example((5, 0)))]]
    publisher = MemoryPublisher()
    trainer = build(settings(tmp_path), MemorySource(logs, events={0: 6}), publisher)
    trainer.start()
    tick(trainer, 20)
    assert len(publisher.versions) == 2
    logs[0].append(encode(progress(8, append_ms=20_000)))
    tick(trainer, 20)
    assert [m.horizon_ms for m, _ in publisher.versions] == [0, 0, 20_000]
    assert Learned.unpack(publisher.versions[-1][0].learned).total == 0
    crash(trainer)


def test_a_fenced_trainer_stops_with_try_again_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    publisher = MemoryPublisher()
    trainer = build(settings(tmp_path), MemorySource(stream(1, 9), 3), publisher)
    trainer.start()
    publisher.fence = TryAgain("another trainer has claimed epoch 2")
    with pytest.raises(TryAgain):
        tick(trainer, 20)
    crash(trainer)
    assert not (tmp_path / "trainer" / "checkpoints").exists()
    again = build(settings(tmp_path), MemorySource(stream(1, 9), 3))
    assert again.start()  # the step log brings back what was learned
    assert again._learner.step == trainer._learner.step > 0
    crash(again)


def test_drain_publishes_and_checkpoints(tmp_path: Path) -> None:
    publisher = MemoryPublisher()
    trainer = build(settings(tmp_path, publish_seconds=1e9), MemorySource(stream(1, 9), 100), publisher)
    turn = trainer.turn

    def once() -> None:
        turn()
        trainer._stop.set()

    trainer.turn = once
    trainer.run()
    assert [m.step for m, _ in publisher.versions] == [0, 1]
    assert len(list((tmp_path / "trainer" / "checkpoints").iterdir())) == 1


def test_another_geometry_is_refused(tmp_path: Path) -> None:
    build(settings(tmp_path), MemorySource(stream(1, 3))).run_until_end()
    with pytest.raises(ConfigError, match=r"trainer.seed: 1 is not 2"):
        build(settings(tmp_path, seed=2), MemorySource(stream(1, 3))).run_until_end()


def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no device 'cuda:99'"):
        build(settings(tmp_path, device="cuda:99"), MemorySource([[]]))


# -- the learner


def one_step(tmp_path: Path, *examples: object) -> tuple[Learner, object]:
    learner = Learner(settings(tmp_path))
    return learner, learner.learn(assemble(list(examples), Layout(2)))[0]


def test_predictions_are_made_before_learning(tmp_path: Path) -> None:
    each = example((1, 0), events=[(IMPRESSION, "a", 1, 0), (IMPRESSION, "b", 2, 0)], targets=[0, 1], labels=[1, 0])
    learner, first = one_step(tmp_path, each)
    batch = assemble([each], Layout(2))
    fresh = Learner(settings(tmp_path))
    lookup = fresh.table.lookup(batch.tokens.keys, watermark_ms=0)
    with torch.no_grad():
        hidden = fresh.model.transduce(batch.tokens, fresh.table.vectors(lookup))
        expected = fresh.model.rank(hidden).sigmoid().numpy()
    np.testing.assert_allclose(first.probabilities, expected, atol=1e-6)
    second, _ = learner.learn(batch)
    assert second.probabilities[0, 0] > first.probabilities[0, 0]
    moved = second.probabilities[:, 0] - first.probabilities[:, 0]
    assert moved[1] < moved[0], "the one that was clicked has risen more"


def test_an_item_that_was_not_live_is_a_miss_and_ranks_count_ties_against_us(tmp_path: Path) -> None:
    each = example((1, 0), events=[(2, "a", 1, 0), (2, "b", 2, 0)], targets=[0, 1], labels=[0, 0])
    learner, first = one_step(tmp_path, each)
    assert first.rank.tolist() == [-1, -1]
    assert first.live == 0
    learner.table.weight[learner.table.first_slot :] = 1.0  # every item scores the same
    second, _ = learner.learn(assemble([each], Layout(2)))
    assert second.rank.tolist() == [2, 2]
    assert second.live == 2
    assert np.isnan(second.probabilities).all()  # organic actions are not ranked


def test_what_is_not_finite_skips_the_lesson_only(tmp_path: Path) -> None:
    each = example((1, 0), events=[(IMPRESSION, "a", 1, 0)], targets=[0], labels=[1])
    learner, _ = one_step(tmp_path, each)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    row = learner.table.live(0)[0][0]
    learner.table.weight[row] = float("nan")
    _, skipped = learner.learn(assemble([each], Layout(2)))
    assert skipped == "loss"
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    assert learner.step == 2


def test_a_trainer_that_reads_nothing_still_serves_a_first_version(tmp_path: Path) -> None:
    publisher = MemoryPublisher()
    trainer = build(settings(tmp_path), MemorySource([[], []]), publisher)
    assert isinstance(trainer._clock, ManualClock)
    trainer.start()
    tick(trainer, 3)
    assert [(m.kind, m.step, m.horizon_ms) for m, _ in publisher.versions] == [("snapshot", 0, 1_000_000)]
    crash(trainer)


# -- versions on their way


def test_training_goes_on_while_a_version_is_held_up_and_learns_the_same(tmp_path: Path) -> None:
    logs = stream(2, 20)
    free, held = MemoryPublisher(), MemoryPublisher()
    straight = build(settings(tmp_path / "a"), MemorySource(logs, 3), free)
    straight.start()
    tick(straight, 30)

    blocked = build(settings(tmp_path / "b"), MemorySource(logs, 3), held)
    blocked.start()
    let_go = threading.Event()
    publish = held.publish

    def slow(*args: object) -> Manifest:
        assert let_go.wait(30)
        return publish(*args)  # type: ignore[arg-type]

    held.publish = slow  # type: ignore[method-assign]
    for _ in range(30):
        blocked._clock.advance(0.3)
        blocked.turn()
    assert blocked._versions.busy and len(held.versions) == 1
    assert blocked._learner.step == straight._learner.step > 8
    let_go.set()
    blocked._wait()
    tick(blocked, 10)
    assert weights_of(blocked) == weights_of(straight)
    assert held.versions[-1][0].step == blocked._learner.step
    assert len(held.versions) < len(free.versions)
    for publisher in (free, held):
        learned = [Learned.unpack(m.learned) for m, _ in publisher.versions]
        assert sum(each.total for each in learned) == sum(len(each.gradient_ms) for each in learned)
        assert sum(each.total for each in learned) == straight._targets_learned
    crash(straight)
    crash(blocked)


def test_the_step_log_is_synced_before_a_version_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = MemoryPublisher()
    trainer = build(settings(tmp_path), MemorySource(stream(1, 20), 3), publisher)
    order: list[str] = []
    sync, publish = StepLog.sync, publisher.publish
    monkeypatch.setattr(StepLog, "sync", lambda log: (order.append("sync"), sync(log)))
    monkeypatch.setattr(publisher, "publish", lambda *args: (order.append("publish"), publish(*args))[1])
    trainer.start()
    tick(trainer, 12)
    assert order == ["sync", "publish"] * len(publisher.versions)
    assert len(publisher.versions) > 2
    crash(trainer)


def test_the_step_log_is_synced_before_a_checkpoint_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the machine may lose steps between two checkpoints, and the older one no longer leads to the newer."""
    trainer = build(settings(tmp_path), MemorySource(stream(1, 20), 3))
    trainer.start()
    tick(trainer, 4)
    trainer._checkpoint()
    trainer._steps.append(Step(trainer._learner.step + 1, {}))  # no version has made it durable
    order: list[str] = []
    sync, save = StepLog.sync, Checkpoints.save
    monkeypatch.setattr(StepLog, "sync", lambda log: (order.append("sync"), sync(log)))
    monkeypatch.setattr(Checkpoints, "save", lambda *args: (order.append("save"), save(*args))[1])
    trainer._checkpoint()
    assert order == ["sync", "save"]
    crash(trainer)


def test_weights_that_break_are_withheld_and_not_kept_until_they_are_mended(tmp_path: Path) -> None:
    publisher = MemoryPublisher()
    trainer = build(settings(tmp_path, checkpoint_seconds=1.0), MemorySource(stream(1, 80), 3), publisher)
    trainer.start()
    tick(trainer, 10)
    checkpoints = tmp_path / "trainer" / "checkpoints"
    kept, before = sorted(checkpoints.iterdir()), len(publisher.versions)
    table = trainer._learner.table
    row = int(np.setdiff1d(np.arange(table.first_slot, len(table.weight)), table.live(0)[0])[0])  # nobody's
    table.weight[row] = float("nan")
    table.touch(np.array([row]))
    tick(trainer, 10)
    ready, conditions = trainer._health.ready()
    assert not ready and "not finite" in str(conditions["published"])
    assert trainer._health.live()[0]
    assert len(publisher.versions) == before and sorted(checkpoints.iterdir()) == kept
    stalled_at = trainer._learner.step
    table.weight[row] = 0.0
    tick(trainer, 10)
    assert trainer._health.ready() == (True, {"recovered": "ok", "published": "ok"})
    assert sorted(checkpoints.iterdir()) != kept
    healed = publisher.versions[before][0]
    assert healed.kind == "delta" and healed.step > stalled_at > publisher.versions[before - 1][0].step
    assert (
        sum(Learned.unpack(m.learned).total for m, _ in publisher.versions) == publisher.versions[-1][0].targets_learned
    )
    require_same_table(publisher, trainer)
    crash(trainer)


def test_until_end_fails_where_its_version_is_withheld(tmp_path: Path) -> None:
    config = settings(tmp_path)
    config = msgspec.structs.replace(config, weights=Weights(max_row_norm=1e-9))
    publisher = MemoryPublisher()
    with pytest.raises(DataError, match=r"row \d+ of the table has a norm.*raise weights.max_row_norm"):
        build(config, MemorySource(stream(1, 5)), publisher).run_until_end()
    assert publisher.versions == []


def test_a_trainer_that_has_grown_goes_on_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "GROW_STEPS", 2)
    logs = stream(1, 60, items=200)
    publisher = MemoryPublisher()
    config = settings(tmp_path)
    config = msgspec.structs.replace(config, table=msgspec.structs.replace(config.table, slots=16, max_slots=256))
    trainer = build(config, MemorySource(logs, 3), publisher)
    trainer.start()
    tick(trainer, 15)
    assert len(trainer._learner.table.index) > 16
    trainer._checkpoint()
    tick(trainer, 5)
    crash(trainer)
    again = build(config, MemorySource(logs, 3), publisher)
    again.start()
    assert weights_of(again) == weights_of(trainer)
    tick(again, 40)
    slots = [m.model["table"]["slots"] for m, _ in publisher.versions]
    assert slots == sorted(slots) and len(set(slots)) > 2
    assert slots[-1] == len(again._learner.table.index)
    for (before, _), (after, _) in itertools.pairwise(publisher.versions):
        if before.model != after.model:
            assert after.kind == "snapshot"
    require_same_table(publisher, again)
    crash(again)


def test_what_became_of_ids_is_counted_by_reason(tmp_path: Path) -> None:
    def count(reason: str) -> float:
        return SLOTLESS.labels("items", reason)._value.get()

    config = settings(tmp_path)
    config = msgspec.structs.replace(config, table=msgspec.structs.replace(config.table, admit_min=2))
    before = count("unadmitted")
    trainer = build(config, MemorySource(stream(1, 9), 3))
    trainer.start()
    tick(trainer, 12)
    assert count("unadmitted") == before + trainer._learner.table.stats().unadmitted > before
    assert USED.labels("items", "item")._value.get() == trainer._learner.table.stats().used > 0
    assert USED.labels("items", "user")._value.get() == 0
    crash(trainer)


def require_same_table(publisher: MemoryPublisher, trainer: Trainer) -> None:
    """The versions since the newest snapshot add up to the trainer's table, and to the digest that the last names."""
    begin = max(n for n, (m, _) in enumerate(publisher.versions) if m.kind == "snapshot")
    mine = trainer._learner.table
    table = IdTable(msgspec.convert(publisher.versions[begin][0].model["table"], Table), mine.dim, seed=9)
    digest = StateDigest(len(table.weight))
    for _, payload in publisher.versions[begin:]:
        part = {name.removeprefix("table/"): t for name, t in payload.items() if name.startswith("table/")}
        table.put_rows(part)
        digest.replace(part["rows"].numpy(), row_hashes(part))
    last = publisher.versions[-1][0]
    assert digest.text == last.state_digest
    rows = mine.snapshot_rows(last.watermark_ms)
    assert np.array_equal(rows, table.snapshot_rows(last.watermark_ms))
    assert all(torch.equal(column, table.rows(rows)[name]) for name, column in mine.rows(rows).items())
