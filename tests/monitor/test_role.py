"""`streamgr monitor` as a process: Faust against a real Kafka, beside its plain twin on the same topics."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from streamgr.clock import SystemClock
from streamgr.config import Kafka
from streamgr.kafka.producer import Producer
from streamgr.weights.manifest import CLAIM_KEY, ClaimRecord, encode
from tests.monitor import kit
from tests.monitor.test_canary import FakeScorer
from tests.system import System, free_port, wait_for

Json = dict[str, Any]


class Role:
    """One running monitor of a system, under its engine."""

    def __init__(self, system: System, engine: str, scorer: str) -> None:
        self.page, self.telemetry = free_port(), free_port()
        system._environment |= {
            "STREAMGR_MONITOR__ENGINE": engine,
            "STREAMGR_MONITOR__PORT": str(self.page),
            "STREAMGR_MONITOR__SCORER": scorer,
            "STREAMGR_MONITOR__SCRAPE": json.dumps([f"nobody=http://127.0.0.1:{free_port()}"]),
            "STREAMGR_MONITOR__CANARY_SECONDS": "1" if engine == "faust" else "0",
            "STREAMGR_MONITOR__PUBLISH_SECONDS": "1" if engine == "faust" else "1000",
            "STREAMGR_TELEMETRY__PORT": str(self.telemetry),
        }
        self.process = system.start("monitor")

    def get(self, port: int, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError:
            return 0, b""

    def ready(self) -> bool:
        return self.get(self.telemetry, "/readyz")[0] == 200

    def state(self) -> Json:
        return dict(json.loads(self.get(self.page, "/api/state")[1]))

    def figures(self) -> Json:
        """What both engines must agree on."""
        state = self.state()
        return {
            "dead_letters": state["dead_letters"],
            "online": {k: v for k, v in state["online"].items() if k != "samples"},
            "versions": state["weights"]["versions"],
        }

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)


def publish(bootstrap: str, prefix: str, scorer: FakeScorer) -> None:
    """Forty answers of two versions, what became of them, three dead letters, and two versions of weights."""
    producer = Producer(Kafka(bootstrap=bootstrap), client_id="test")
    now = SystemClock().now_ms()
    producer.send_confirmed(f"{prefix}.manifests", encode(ClaimRecord(now, 0)), key=CLAIM_KEY, partition=0)
    for n in range(40):
        user = f"u{n}"
        producer.send(f"{prefix}.scores", kit.score(user, now, 1 + n // 20, {"a": 0.3, "b": 0.2}), key=user.encode())
        shown = {"type": "impression", "event_id": f"e{n}", "user_id": user, "item_id": "a", "event_time": now}
        rows = [shown] + [shown | {"type": "click", "event_id": f"c{n}", "event_time": now + 200}] * (n % 3 == 0)
        for row in rows:
            producer.send(f"{prefix}.events", json.dumps(row).encode(), key=user.encode())
    for n, reason in enumerate((b"bad_time", b"bad_time", b"null_key")):
        headers = [("reason", reason), ("topic", b"e"), ("partition", b"0"), ("offset", b"1")]
        producer.send(f"{prefix}.dead-letters", b"{", key=b"u", partition=n, headers=headers)
    producer.confirm(10)
    producer.close()


def test_faust_and_its_plain_twin_come_to_the_same_and_tables_outlive_the_process(
    kafka: str, prefix: str, tmp_path: Path
) -> None:
    scorer = FakeScorer()
    window = {"sequence__attribution_window_seconds": 1.0, "monitor__online_window_seconds": 120.0}
    with System(kafka, prefix, tmp_path, **window) as system:
        system.run("topics", "apply")
        faust, plain = (Role(system, engine, scorer.url) for engine in ("faust", "plain"))
        for role in (faust, plain):
            wait_for("readiness", lambda role=role: role.ready() or role.process.poll(), 40)
            assert role.process.poll() is None, system.logs()
        publish(kafka, prefix, scorer)

        def decided() -> bool:
            return all(r.state()["online"]["tasks"]["click"]["targets"] == 40 for r in (faust, plain))

        wait_for("the outcomes", decided, 30)
        assert faust.figures() == plain.figures()
        click = faust.state()["online"]["tasks"]["click"]
        assert (click["ctr"], click["calibration"]) == (14 / 40, round(40 * 0.3 / 14, 4))
        assert faust.state()["dead_letters"]["by_reason"] == {"bad_time": 2, "null_key": 1}
        assert faust.state()["weights"]["marks"][0]["kind"] == "claim"
        assert [s["up"] for s in faust.state()["sources"]] == [True, False]

        wait_for("a summary", lambda: system.count("freshness"), 10)
        record = json.loads(system.read("freshness")[-1].value())
        assert record["format"] == 1 and record["freshness"]["status"] == "unknown"
        metrics = faust.get(faust.telemetry, "/metrics")[1].decode()
        assert 'streamgr_dead_letters_seen_total{reason="bad_time"} 2.0' in metrics
        assert 'streamgr_online_ctr_ratio{task="click"} 0.35' in metrics
        assert 'streamgr_monitor_source_up{source="nobody"} 0.0' in metrics
        assert "streamgr_open_impressions" not in metrics, "the sequencer's metrics are not the monitor's"

        wait_for("the tables", lambda: system.count("monitor-quality") and system.count("monitor-dead-letters"), 10)
        before = faust.figures()
        time.sleep(1.2)  # what is decided is in its table within a second
        assert (faust.stop(), plain.stop()) == (0, 0), system.logs()
        assert "faust_failed" not in system.logs() and "drain_incomplete" not in system.logs(), system.logs()
        again = Role(system, "faust", scorer.url)
        wait_for("readiness", again.ready, 40)
        wait_for("what was there before", lambda: again.figures() == before, 5)
        assert again.stop() == 0
    scorer.server.shutdown()
    scorer.server.server_close()


def test_it_is_live_and_says_what_it_waits_for_without_a_broker(prefix: str, tmp_path: Path) -> None:
    with System(f"127.0.0.1:{free_port()}", prefix, tmp_path) as system:
        role = Role(system, "faust", "http://127.0.0.1:1")
        wait_for("its page", lambda: role.get(role.page, "/livez")[0] == 200, 20)
        status, body = role.get(role.telemetry, "/readyz")
        assert status == 503 and b"waiting for the broker" in body
        assert role.get(role.telemetry, "/livez")[0] == 200
        assert role.stop() == 0, system.logs()


def test_a_missing_topic_is_a_configuration_error(kafka: str, prefix: str, tmp_path: Path) -> None:
    with System(kafka, prefix, tmp_path) as system:
        role = Role(system, "faust", "http://127.0.0.1:1")
        assert role.process.wait(30) == 78
        assert "streamgr topics apply" in system.logs()


def test_it_imports_no_torch_and_names_its_extra() -> None:
    code = "import sys; import streamgr.monitor.monitor, streamgr.monitor.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    code = "import sys; sys.modules['faust'] = None; from streamgr.cli import main; sys.exit(main(['monitor']))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--set", "telemetry.port=0"],
        env={"STREAMGR_TELEMETRY__PORT": "0", "STREAMGR_MONITOR__PORT": "0", "PATH": ""},
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 78 and b"pip install 'streamgr[monitor]'" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"sasl.oauthbearer.method": "oidc"}, "oauthbearer"),
        ({"enable.ssl.certificate.verification": False}, "verification"),
    ],
)
def test_security_that_faust_cannot_be_told_is_refused_with_the_way_out(settings: Json, names: str) -> None:
    from streamgr.errors import ConfigError
    from streamgr.monitor.app import credentials

    with pytest.raises(ConfigError, match=names) as caught:
        credentials(Kafka(librdkafka=settings))
    assert 'monitor.engine = "plain"' in str(caught.value)


def test_security_settings_reach_faust() -> None:
    from streamgr.monitor.app import credentials

    assert credentials(Kafka()) is None
    sasl = {"security.protocol": "sasl_ssl", "sasl.mechanism": "SCRAM-SHA-512", "sasl.username": "u"}
    made = credentials(Kafka(librdkafka=sasl, sasl_password="secret"))
    assert (made.protocol.value, made.mechanism.value) == ("SASL_SSL", "SCRAM-SHA-512")
    assert (made.username, made.password) == ("u", "secret") and made.ssl_context is not None
    tls = {"security.protocol": "SSL", "ssl.endpoint.identification.algorithm": "none"}
    assert credentials(Kafka(librdkafka=tls)).context.check_hostname is False
