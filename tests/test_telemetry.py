"""Logs an operator can search, probes that tell the truth."""

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from streamgr import telemetry
from streamgr.clock import Deadline, ManualClock
from streamgr.config import Telemetry
from streamgr.errors import ConfigError
from streamgr.telemetry import Health, Log, Probes


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_log_line_is_one_json_object_with_its_event(capsys: pytest.CaptureFixture[str]) -> None:
    Log("trainer", Telemetry(), ManualClock(5)).info("published", "version 3", version=3)
    assert json.loads(capsys.readouterr().err) == {
        "ts": 5, "level": "info", "role": "trainer", "event": "published", "msg": "version 3", "version": 3,
    }  # fmt: skip


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("trainer", Telemetry(log_level="warning", log_format="text"), ManualClock())
    log.info("quiet")
    log.warning("loud", "something", reason="x")
    assert capsys.readouterr().err == "warning trainer loud: something reason=x\n"


def test_probes_follow_the_conditions_and_the_loop() -> None:
    clock = ManualClock()
    health = Health("probed", clock, "assigned")
    probes = Probes(Telemetry(port=0), health)
    try:
        assert get(probes.port, "/readyz") == (503, '{"assigned": "starting"}')
        health.hold("assigned")
        assert get(probes.port, "/readyz") == (200, '{"assigned": "ok"}')
        health.turned()
        clock.advance(31)
        assert get(probes.port, "/livez")[0] == 503
        health.turned()
        assert get(probes.port, "/livez")[0] == 200
        assert 'streamgr_ready{role="probed"} 1.0' in get(probes.port, "/metrics")[1]
        assert get(probes.port, "/secrets")[0] == 404
        with pytest.raises(ConfigError, match=r"telemetry\.port"):
            Probes(Telemetry(port=probes.port), health)
    finally:
        probes.close()


def test_a_role_that_has_not_said_what_it_waits_for_is_not_ready() -> None:
    health = Health("new", ManualClock())
    assert health.ready() == (False, {"started": "starting"})
    health.hold("open")
    assert health.ready() == (True, {"open": "ok"})


def test_a_deadline_is_one_budget() -> None:
    clock = ManualClock()
    deadline = Deadline(clock, 2.0)
    clock.advance(1.5)
    assert deadline.remaining() == pytest.approx(0.5)
    assert not deadline.passed()
    clock.advance(1.0)
    assert deadline.passed()


def test_a_role_that_still_waits_to_begin_is_live_but_not_ready() -> None:
    clock = ManualClock()
    health = Health("waiting", clock)
    clock.advance(600)
    assert health.live()[0]
    assert health.ready() == (False, {"started": "starting"})
    health.turned()
    clock.advance(31)
    assert not health.live()[0]


def test_the_disk_under_the_state_is_asked_at_each_scrape_even_before_the_directory_is_there(tmp_path: Path) -> None:
    def value(name: str) -> float | None:
        return REGISTRY.get_sample_value(f"streamgr_state_{name}_bytes")

    telemetry.watch_disk(tmp_path / "state" / "trainer")
    free, capacity = value("free"), value("capacity")
    assert free is not None and capacity is not None
    assert 0 < free <= capacity == shutil.disk_usage(tmp_path).total
    telemetry.watch_disk(Path("relative/state"))
    assert value("capacity") == shutil.disk_usage(Path()).total
