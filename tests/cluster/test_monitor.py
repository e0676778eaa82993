"""The monitor and a broker that goes away: Faust's application is built anew until it works again."""

import os
import time
from pathlib import Path

import pytest

from streamgr.config import Kafka
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from tests.monitor.test_role import Role
from tests.system import System, wait_for

pytestmark = pytest.mark.skipif(
    not os.environ.get("STREAMGR_CLUSTER_TESTS"), reason="takes a minute: STREAMGR_CLUSTER_TESTS=1 (make cluster-test)"
)


def test_it_outlives_its_broker(kafka_home: Path, prefix: str, tmp_path: Path) -> None:
    directory = tmp_path / "broker"
    broker = EmbeddedBroker.start(directory)
    try:
        with System(broker.bootstrap, prefix, tmp_path) as system:
            system.run("topics", "apply")
            role = Role(system, "faust", "http://127.0.0.1:1")
            wait_for("readiness", role.ready, 40)
            broker.close()
            time.sleep(2)
            assert role.process.poll() is None and role.get(role.page, "/livez")[0] == 200, system.logs()
            broker = EmbeddedBroker.start(directory)

            def heard() -> bool:
                producer = Producer(Kafka(bootstrap=broker.bootstrap), client_id="test")
                headers = [("reason", b"bad_time")]
                producer.send_confirmed(f"{prefix}.dead-letters", b"{", key=b"u", headers=headers, timeout=5)
                producer.close()
                time.sleep(0.5)
                return bool(role.state()["dead_letters"]["hour"])

            wait_for("a dead letter of the new broker's", heard, 60)
            assert role.stop() == 0, system.logs()
    finally:
        broker.close()
