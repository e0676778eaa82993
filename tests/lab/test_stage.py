"""Setting the stage: the profile, the files, the children."""

import os
import signal
import tomllib
from pathlib import Path

import pytest

from streamgr.clock import Deadline, SystemClock
from streamgr.config import Config, Kafka, Scorer, load
from streamgr.decoder import Decoder
from streamgr.lab import stage
from streamgr.lab.children import ChildFailed, Children


def test_the_demo_profile_is_the_contracts() -> None:
    demo = stage.profile("demo", Config(), {})
    assert demo.sequence.attribution_window_seconds == 1.5 and demo.sequence.lateness_seconds == 0.5
    assert demo.sequence.close_step_seconds == 0.2 and demo.trainer.publish_seconds == 1.0
    assert demo.table.ttl_seconds == 45.0 and demo.table.slots <= 16_384
    assert demo.feed.act_within_seconds == 1.2 and demo.feed.item_life_seconds == (20.0, 60.0)
    assert demo.feed.rate >= 300


def test_what_was_set_by_hand_wins_over_the_profile() -> None:
    config, origin = load([], {"STREAMGR_FEED__USERS": "7"}, {"trainer.publish_seconds": "3"})
    merged = stage.profile("demo", config, origin)
    assert (merged.feed.users, merged.trainer.publish_seconds, merged.sequence.lateness_seconds) == (7, 3.0, 0.5)


def test_the_files_say_what_was_decided(tmp_path: Path) -> None:
    config = Config(
        kafka=Kafka(librdkafka={"security.protocol": "SSL", "x": 1, "y": True}, sasl_password='a "b" \\ c'),
        scorer=Scorer(task_weights={"click": 1.0, "a.b": 0.5}),
    )
    built = stage.build(config, tmp_path)
    assert len({*built.ports.values(), built.config.scorer.port}) == 5
    for process, file in built.files.items():
        read, _ = load([Path(file)], {})
        assert read.telemetry.port == built.ports[process]
        assert read.kafka == config.kafka and read.scorer.task_weights == config.scorer.task_weights
        assert read.trainer.prequential_log == str(built.predictions)
        assert Path(read.state.directory).is_relative_to(tmp_path)
    assert tomllib.loads(stage.to_toml(Config())).keys() == tomllib.loads(stage.to_toml(built.config)).keys()


def test_a_log_is_surveyed_for_its_targets_and_kinds(tmp_path: Path) -> None:
    lines = [
        f'{{"type":"{kind}","event_id":"e{n}","user_id":"u","item_id":"i","event_time":{n}}}'
        for n, kind in enumerate(["impression", "click", "bookmark", "impression", "bookmark"])
    ]
    shown, organic = tmp_path / "shown.jsonl", tmp_path / "organic.jsonl"
    shown.write_text("\n".join(lines) + "\n")
    organic.write_text("\n".join(line for line in lines if "impression" not in line) + "\n")
    assert stage.survey(shown, "").targets == 2
    assert stage.survey(organic, "").targets == 3
    fitted = stage.survey(organic, "").fit(Config())
    assert fitted.sequence.actions == ("click", "like", "bookmark")
    assert isinstance(Decoder(list(fitted.sequence.actions), 0), Decoder)


# -- children


def test_a_child_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with Children(tmp_path, SystemClock(), os.environ) as children:
        child = children.start("trainer", "-c", "print('the last words'); raise SystemExit(3)", is_role=True)
        assert child.wait(Deadline(SystemClock(), 20.0))
        with pytest.raises(ChildFailed, match=r"trainer ended with exit code 3[^$]*the last words"):
            children.check()


def test_a_role_that_leaves_unasked_has_failed_but_a_feed_may_end(tmp_path: Path) -> None:
    with Children(tmp_path, SystemClock(), os.environ) as children:
        feed = children.start("feed", "-c", "pass", is_role=False)
        assert feed.wait(Deadline(SystemClock(), 20.0)) and feed.exit_code == 0
        children.check()
        role = children.start("scorer", "-c", "pass", is_role=True)
        role.wait(Deadline(SystemClock(), 20.0))
        with pytest.raises(ChildFailed, match="scorer"):
            children.check()


def test_children_are_told_to_drain_and_the_deaf_are_killed(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, {}); print('up', flush=True); time.sleep(60)"
    deaf, good = code.format("signal.SIG_IGN"), code.format("lambda *_: sys.exit(0)")
    with Children(tmp_path, SystemClock(), os.environ) as children:
        started = [children.start(name, "-c", code, is_role=True) for name, code in (("deaf", deaf), ("good", good))]
        deadline = Deadline(SystemClock(), 20.0)
        while any("up" not in child.tail() for child in started):
            assert not deadline.passed()
        assert children.stop(1.0) == ["deaf"]
        assert [child.exit_code for child in started] == [-signal.SIGKILL, 0]
        children.check()


def test_settings_reach_children_by_their_files_only(tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(any(name.startswith('STREAMGR_') for name in os.environ))"
    with Children(tmp_path, SystemClock(), {**os.environ, "STREAMGR_KAFKA__BOOTSTRAP": "elsewhere:1"}) as children:
        child = children.start("feed", "-c", code, is_role=False)
        assert child.wait(Deadline(SystemClock(), 20.0)) and child.exit_code == 0
