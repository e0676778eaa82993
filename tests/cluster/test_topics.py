"""`topics` on a cluster: the brokers' defaults hold, and what one broker knows another may learn a little later."""

from tests.cluster.cluster import NODES, Cluster
from tests.e2e.test_stream import SETTINGS
from tests.system import System


def test_apply_makes_three_replicas_and_check_has_nothing_to_say(cluster: Cluster, system: System) -> None:
    lines = system.run("topics", "check").splitlines()
    assert lines and all(line.startswith("ok ") for line in lines), lines
    replicas = cluster.replicas(system.prefix)
    assert len(replicas) == len(lines)
    assert all(nodes == set(NODES) for partitions in replicas.values() for nodes in partitions), replicas
    assert {cluster.setting(topic, "min.insync.replicas") for topic in replicas} == {"2"}


def test_apply_and_check_work_while_a_broker_is_away(cluster: Cluster, system: System) -> None:
    cluster.nodes[1].kill()
    cluster.await_gone(1)
    for verb in ("apply", "check"):
        lines = system.run("topics", verb).splitlines()
        assert lines and all(line.startswith("ok ") for line in lines), lines


def test_apply_succeeds_at_once_however_late_a_broker_learns_of_a_topic(cluster: Cluster, system: System) -> None:
    for n in range(24):
        other = System(cluster.bootstrap, f"{system.prefix}-{n}", system.directory, **SETTINGS)
        lines = other.run("topics", "apply").splitlines()
        assert lines and all(line.startswith("done ") for line in lines), lines
