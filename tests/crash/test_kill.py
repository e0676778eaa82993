"""kill -9 of any one role during a replay, restart: the same sequences, and every target learned once."""

import json
from pathlib import Path

import pytest

from tests.e2e.test_stream import SETTINGS, assert_equal, expected
from tests.streams import START, events, heartbeats, row
from tests.system import PARTITIONS, System, kill, wait_for


@pytest.fixture
def system(kafka: str, prefix: str, tmp_path: Path) -> System:
    slowly = {"trainer__batch_tokens": 64, "trainer__publish_seconds": 0.2, "trainer__checkpoint_seconds": 0.5}
    system = System(kafka, prefix, tmp_path, **slowly, **SETTINGS)
    system.run("topics", "apply")
    return system


def targets_learned(system: System) -> int:
    versions = [json.loads(line) for line in system.run("weights", "list").splitlines()]
    return int(max(versions, key=lambda v: v["version"])["targets_learned"]) if versions else 0


def test_killed_sequencers_leave_no_trace(system: System) -> None:
    stream = [row(e) for e in events(21, 3_000, users=60)]
    with system:
        for third in range(3):
            before = system.count("examples")
            sequencer = system.start("sequencer")
            system.publish(stream[third * 1_000 : (third + 1) * 1_000])
            wait_for("examples" + system.logs(), lambda before=before: system.count("examples") > before + 20)
            kill(sequencer)
        system.publish(heartbeats(120_000, PARTITIONS))
        system.run("sequencer", "--until-end")
        assert_equal(system, expected(system, set()))


def test_a_killed_trainer_learns_each_target_once(system: System) -> None:
    stream = [row(e) for e in events(22, 3_000, users=60)]
    system.publish(stream + heartbeats(120_000, PARTITIONS))
    system.run("sequencer", "--until-end")
    targets = sum(len(o.targets) for o in expected(system, set()))
    with system:
        for _ in range(2):
            before = system.count("manifests")
            trainer = system.start("trainer")
            wait_for("versions", lambda before=before: system.count("manifests") > before + 4)
            kill(trainer)
            assert 0 < targets_learned(system) < targets, "it was killed in the middle"
        system.run("trainer", "--until-end")
        assert targets_learned(system) == targets
        system.run("trainer", "--until-end")
        assert targets_learned(system) == targets


def test_a_killed_scorer_answers_as_before(system: System) -> None:
    stream = events(23, 1_500)
    system.publish([row(e) for e in stream] + heartbeats(120_000, PARTITIONS))
    system.run("sequencer", "--until-end")
    system.run("trainer", "--until-end")
    ask = {"user_id": "u0", "candidates": [f"i{k}" for k in range(40)], "at": START + 70_000}
    with system:
        answers = []
        for _ in range(2):
            scorer = system.start("scorer")
            wait_for("a ready scorer", lambda: system.get("/readyz")[0] == 200)
            status, answer = system.post("/v1/rank", ask)
            assert status == 200
            answers.append((answer["items"], answer["weights_version"], answer["sequence_length"]))
            kill(scorer)
        assert answers[0] == answers[1]
        assert answers[0][2] > 0
        scorer = system.start("scorer")
        wait_for("a ready scorer", lambda: system.get("/readyz")[0] == 200)
        for sequence in system.exported():
            assert system.get(f"/v1/users/{sequence['user_id']}/sequence") == (200, sequence)
