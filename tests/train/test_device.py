"""The trainer on a GPU, without one: what is on which device, what the steps are, what a checkpoint is.

The GPU is one that is not there (`elsewhere`), its attention the kernels themselves, interpreted. Everything else of a
step is real, and its result is the CPU's.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgr.errors import ConfigError
from streamgr.model.tokens import Layout
from streamgr.train.device import REPEATABLE, training_device
from streamgr.train.learner import Learner
from tests.model.interpreter import DEVICE, attention_triton, interpreting

from .elsewhere import ELSEWHERE, Away, Elsewhere
from .test_learner import batches, settings

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="needs the interpreter")
PRESETS = ["paper", "dlrm_v3"]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    """Launches read and write the values of tensors that are away; all their arguments must be."""
    launch = attention_triton._launch

    def values(x: Any) -> Any:
        assert isinstance(x, Away) or not isinstance(x, Tensor), "a kernel was given a tensor of the host"
        return x.values if isinstance(x, Away) else x

    def launched(
        name: str, programs: int, q: Any, tensors: Any, position: Any, time: Any, plan: Any, work: Any
    ) -> None:
        fields = [values(getattr(plan, field)) for field in plan.__slots__]
        launch(
            name, programs, values(q), [values(x) for x in tensors], values(position), values(time),
            attention_triton.Plan(*fields), values(work),
        )  # fmt: skip

    monkeypatch.setattr(attention_triton, "_launch", launched)
    with interpreting(), Elsewhere() as watching:
        yield watching


def step(learner: Learner, count: int, first: int = 0) -> list[Any]:
    assert learner.model.layout == Layout(2)
    return [learner.learn(batch) for batch in batches(count)[first:]]


def near(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert type(tensor) is Tensor and tensor.device.type == "cpu", name
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # it does copy: see `Away`
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_elsewhere_is_a_step_here(preset: str, elsewhere: Elsewhere) -> None:
    """Two steps on each, then the one goes on from the other's checkpoint; predictions are of the host."""
    rules = settings(slots=256, preset=preset)
    here, there = Learner(rules), Learner(rules, ELSEWHERE)
    assert all(isinstance(p, Away) for p in there.model.parameters()) and elsewhere.operations > 0
    for (mine, why_not), (its, _) in zip(step(there, 2), step(here, 2), strict=True):
        assert why_not == ""
        np.testing.assert_allclose(mine.probabilities, its.probabilities, rtol=1e-4)
        assert mine.rank.tolist() == its.rank.tolist()
    near(there.state(), here.state())
    assert there.take_gradient_norm() == pytest.approx(here.take_gradient_norm(), rel=1e-4)
    moved, back = Learner(rules, ELSEWHERE), Learner(rules)
    moved.load_state(here.state(), here.step, here.watermark_ms)
    back.load_state(there.state(), there.step, there.watermark_ms)
    for learner in (moved, back):
        step(learner, 3, first=2)
    near(moved.state(), back.state())


def test_the_watch_can_fail(elsewhere: Elsewhere) -> None:
    away = torch.ones(3).to(ELSEWHERE)
    assert isinstance(away * 2 + torch.ones(()), Away) and type(away.cpu()) is Tensor
    with pytest.raises(AssertionError, match="two devices"):
        away + torch.ones(3)
    with pytest.raises((TypeError, RuntimeError)):
        away.numpy()


@pytest.mark.parametrize("name", ["gpu", "tpu:0", "meta", "cuda:x", ""])
def test_a_device_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.device: no device .*remedy"):
        training_device(name)


def test_a_gpu_is_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv(REPEATABLE, "")
    monkeypatch.delenv(REPEATABLE)
    assert training_device("cuda:1") == torch.device("cuda", 1)
    assert os.environ[REPEATABLE] == ":4096:8"
    with pytest.raises(ConfigError, match="finds 2 here; remedy: count from 0"):
        training_device("cuda:2")
