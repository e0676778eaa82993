"""The attention on a GPU for tests: compiled where STREAMGR_TEST_DEVICE is `cuda`, interpreted on the CPU elsewhere.

Triton asks for the interpreter as it is imported, and once for all: so one process does the one or the other.

Triton 3.7's interpreter multiplies the bits of bfloat16 as if they were integers, and rounds to it towards zero. Here
its products are those of the values, in float32, and it rounds to the nearest, as a GPU does both.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = os.environ.get("STREAMGR_TEST_DEVICE", "cpu")
INTERPRETED = "1" if DEVICE == "cpu" else "0"

with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TRITON_INTERPRET", INTERPRETED)
    pytest.importorskip("triton", reason="no Triton here (it is for Linux): `pip install -e .[gpu]`")
    import triton.language as tl
    from triton.runtime import interpreter

    from streamgr.model import attention_triton

__all__ = ["DEVICE", "attention_triton", "interpreting"]


@contextmanager
def interpreting() -> Iterator[None]:
    """The first launch imports more of Triton. Not for longer: other tests start processes that inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", INTERPRETED)
        patch.setattr(interpreter, "_convert_float", convert)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


_convert = interpreter._convert_float


def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
    if (source, target) == (tl.bfloat16, tl.float32):
        return (values.astype(np.uint32) << 16).view(np.float32)
    return _convert(values, source, target, rounding)


def dot(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
    return interpreter.TensorHandle(np.matmul(plain(a), plain(b)) + total.data, total.dtype.scalar)


def plain(x: Any) -> Any:
    return convert(x.data, tl.bfloat16, tl.float32, None) if x.dtype.scalar == tl.bfloat16 else x.data
