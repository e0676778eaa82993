"""Compile the kernels of the index for an H100, and print each name and the size of its machine code."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import JITFunction

from streamgr.model import index_kernels
from streamgr.model.index_triton import BLOCK

H100 = GPUTarget("cuda", 90, 32)
BYTES = {"fields", "fates", "field", "tag", "kind", "evicted", "left"}
WORDS = {"pin", "bucket"}


def pointer(name: str) -> str:
    return "*u8" if name in BYTES else "*i32" if name in WORDS else "*i64"


for name, kernel in vars(index_kernels).items():
    if isinstance(kernel, JITFunction) and not name.startswith("_"):
        types = {p.name: "constexpr" if p.is_constexpr else p.annotation_type or pointer(p.name) for p in kernel.params}
        sizes = {"GROUPS": 2, "BLOCK": BLOCK}
        source = ASTSource(kernel, types, constexprs={size: sizes[size] for size in sizes if size in types})
        print(name, len(compile(source, target=H100).asm["cubin"]))
