"""Compile the kernels of the attention for GPUs, without one: `python -m tests.model.compile_attention [--all]`.

A line each: kernel, architecture, dtype, head dim, bytes of machine code, bytes of shared memory, bytes of registers
that a thread spills. `--all`: every dtype and head dim; otherwise one of each dtype.
"""

import os
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from streamgr.model import attention_kernels, attention_triton
from streamgr.model.attention import Shape

HEADS = 2
SHAPE = Shape(512, 64)
SOME = [(80, "fp32", 25), (90, "bf16", 64)]
ALL = [(arch, dtype, dim) for arch in (80, 90) for dtype in ("fp32", "bf16") for dim in (8, 25, 50, 64, 128)]
BYTES = {"fp32": 4, "bf16": 2}
TYPES = {"asked": "*i64", "stamped": "*i64", "visible": "*i32", "work": "*i32"}
FLOATS = {"position", "time", "position_parts", "time_parts"}
VALUES = {"q", "k", "v", "g", "out", "dq", "dk", "dv"}


def build(name: str, arch: int, dtype: str, dim: int) -> tuple[int, int, int]:
    """Bytes of machine code, of shared memory, and spilled."""
    kernel = getattr(attention_kernels, name)
    tile = {4: 32, 2: 64}[BYTES[dtype]]
    sizes = attention_triton.kernel_sizes(name, HEADS, dim, SHAPE, biased=True, tile=tile)
    types = {p.name: "constexpr" if p.is_constexpr else typed(p.name, dtype) for p in kernel.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
    warps, stages = attention_triton.LAUNCHES[name][BYTES[dtype]][sizes["WIDTH"] > 64]
    source = ASTSource(kernel, types, constexprs=sizes, attrs=aligned)
    made = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})
    return len(made.asm["cubin"]), made.metadata.shared, spilled(made.asm["cubin"])


def typed(name: str, dtype: str) -> str:
    return f"*{dtype}" if name in VALUES else "*fp32" if name in FLOATS else TYPES.get(name, "i32")


def spilled(code: bytes) -> int:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return next(int(word[6:]) for word in shown.stdout.split() if word.startswith("STACK:"))


for name in attention_triton.LAUNCHES:
    for target in ALL if "--all" in sys.argv else SOME:
        print(name, *target, *build(name, *target), flush=True)
