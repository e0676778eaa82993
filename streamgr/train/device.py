"""Where the network is trained: `trainer.device`, which is `cpu`, `cuda` or `cuda:<n>`.

On a GPU are the dense parameters and their optimizer, the tokens' and negatives' vectors, and all that lies between
them and the loss. The ID table and the optimizer of its rows stay in the host's memory: a step gathers the rows that it
may change, sends them over as one tensor, and gets their gradient back as one. What leaves the trainer (predictions,
checkpoints, versions) is on the host, so a trainer on either device goes on where one on the other has stopped.

A step on a GPU repeats to the bit on the same kind of GPU, not on a CPU.
"""

import os
from importlib.util import find_spec

import torch

from streamgr.errors import ConfigError

REPEATABLE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS adds up in one order only with workspaces of its own


def training_device(name: str) -> torch.device:
    """The device of this name, ready to use; `ConfigError` where this machine has none."""
    where = "trainer.device"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"no device {name!r}", where=where, remedy="'cpu', 'cuda', or 'cuda:<n>' for one of several")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        what = f"no device {name!r}: torch {torch.__version__} finds {count} here"
        remedy = "count from 0" if count else "set it to 'cpu', or install a driver and a build of torch for CUDA"
        raise ConfigError(what, where=where, remedy=remedy)
    if find_spec("triton") is None:
        remedy = "pip install 'streamgr[gpu]', or set it to 'cpu'"
        raise ConfigError(f"{name!r} needs Triton", where=where, remedy=remedy)
    os.environ.setdefault(REPEATABLE, ":4096:8")
    return device
