"""A device that is not there: tensors that say they are elsewhere, with real values, and mix with the host's only where
a GPU's would.

`ELSEWHERE` is torch's `meta` device. While `Elsewhere()` is active, whatever is made there or sent there is an `Away`,
which holds its values on the host; an operation on some computes them there. What would fail on a GPU fails here: an
operation on tensors of both places (scalars of the host and copies apart), and `numpy` of one that is away.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Away(Tensor):
    """A tensor elsewhere; `values` are its own, on the host."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Away":
        made: Away = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=ELSEWHERE
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} where nothing is watched")


class Elsewhere(TorchDispatchMode):
    """Watches every operation; `operations` counts those that ran elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        away = [x for x in tensors if isinstance(x, Away)]
        here = [x for x in tensors if not isinstance(x, Away) and x.dim() > 0]
        if away and here and func not in MOVES:
            raise AssertionError(f"{func} on tensors of two devices: {[tuple(x.shape) for x in tensors]}")
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        there = torch.device(target) == ELSEWHERE if target is not None else bool(away)
        if func is torch.ops.aten.copy_.default:
            there = isinstance(args[0], Away)
        held = {id(x.values): x for x in away}
        values_args, values_kwargs = tree_map(lambda x: x.values if isinstance(x, Away) else x, (args, kwargs))
        out = func(*values_args, **values_kwargs)
        self.operations += there
        if not there:
            return out.clone() if away and isinstance(out, Tensor) else out

        def wrapped(x: Any) -> Any:
            return x if not isinstance(x, Tensor) else held[id(x)] if id(x) in held else Away(x)

        return tree_map(wrapped, out)
