"""One running system a module: the scenarios lie beside each other under users of their own."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamgr.kafka.embedded import EmbeddedBroker
from tests.system import System

Fresh = Callable[..., System]


@pytest.fixture(scope="module")
def fresh(_real: EmbeddedBroker | str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """Makes a system of the module's own, topics applied; every process it started ends with the module."""
    if isinstance(_real, str):
        pytest.skip(_real)
    made: list[System] = []

    def make(**keys: object) -> System:
        system = System(_real.bootstrap, f"c{uuid.uuid4().hex[:10]}", Path(tmp_path_factory.mktemp("system")), **keys)
        made.append(system)
        system.run("topics", "apply")
        return system

    yield make
    for system in made:
        system.close()
