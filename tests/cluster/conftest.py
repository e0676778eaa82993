"""One cluster of three for all of these tests, whole at the start of each.

They take many minutes and run only where they are asked for (`make cluster-test`, which sets
`STREAMGR_CLUSTER_TESTS`); anywhere else they are skipped with that reason.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.work import OnCluster
from tests.e2e.test_stream import SETTINGS

ASKED_FOR = "STREAMGR_CLUSTER_TESTS"


@pytest.fixture(scope="session")
def _three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not os.environ.get(ASKED_FOR):
        pytest.skip("three brokers and many minutes: make cluster-test")
    home = os.environ.get("KAFKA_HOME")
    if not home or not shutil.which("java"):
        pytest.skip("needs KAFKA_HOME and java on the PATH")
    with Cluster(Path(home), tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(_three: Cluster) -> Cluster:
    """Three nodes, all well, whatever the last test did to them."""
    return _three.restore()


@pytest.fixture
def system(cluster: Cluster, prefix: str, tmp_path: Path) -> OnCluster:
    """An installation on the cluster, with its topics."""
    system = OnCluster(cluster.bootstrap, prefix, tmp_path, **SETTINGS)
    system.apply()
    cluster.await_in_sync()
    return system
