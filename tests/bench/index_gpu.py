"""How fast the index of the ID table is on a GPU: `python -m tests.bench.index_gpu`.

    agree   a few small batches through this index and numpy's: every slot, column and count equal, or it ends here
    lookup  ids a second that are looked up, half of the slots live, one in ten of the ids unknown
    map     ids a second that are mapped with 0, 1 and 10 % new ones a batch, repeats among the others; the life of an
            id is such that the new ones fill another quarter of the slots and then expire

Goals on an H100: 0.5 G lookups/s and 100 M mapped ids/s, three times that hoped for. `find` is one kernel and waits for
nothing. `map` waits for the device twice a batch (who has no slot; what happened), and once more and once a round of
placing where ids are new: so small batches should be bound by launches and waiting, large ones by the two sorts.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.bench.kit import Json, machine, report

if TYPE_CHECKING:  # imported only once it is known that there is Triton
    from streamgr.model.index_triton import TritonIndex

START = 1_700_000_000_000
WIDTH = 16
NEW = (0.0, 0.01, 0.10)
WARM = 5  # batches that are not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="1048576,8388608", help="one or several sizes, powers of two")
    parser.add_argument("--batch", default="65536,1048576", help="ids a batch")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cuda", help="`cpu` only with TRITON_INTERPRET=1, to try this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return print("skipped: no CUDA device here")
    try:
        import triton
    except ModuleNotFoundError:
        return print("skipped: no Triton here, `pip install -e .[gpu]`")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "none: interpreted"
    found: Json = {"machine": {**machine(), "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}}
    agree(args.device)
    found["runs"] = []
    for slots in (int(n) for n in args.slots.split(",")):
        for batch in (int(n) for n in args.batch.split(",")):
            found["runs"].append(measure(slots, batch, args.repeats, args.device))
            print(found["runs"][-1], file=sys.stderr)
    report("bench-index-gpu", found)


def agree(device: str) -> None:
    """The interpreter cannot vouch for the compiled kernels, so they are held against numpy before they are timed."""
    from streamgr.model.admission import Sketch
    from streamgr.model.index import Index
    from streamgr.model.index_triton import TritonIndex

    r, now = np.random.default_rng(1), START
    for width in (8, 16, 32):
        rules: dict[str, Any] = {"lives_ms": [100_000], "half_life_ms": 25_000, "admit_min": 2, "pin_depth": 1}
        one = Index(4 * width, width, sketch=Sketch(4 * width), **rules)
        other = TritonIndex(4 * width, width, sketch=Sketch(4 * width), device=device, **rules)
        for _ in range(20):
            now += int(r.integers(0, 30_000))
            keys, times = r.integers(0, 12 * width, 10 * width), now - r.integers(0, 60_000, 10 * width)
            a = one.map(keys.astype(np.uint64), times, 0, watermark_ms=now)
            b = other.map(torch.from_numpy(keys).to(device), torch.from_numpy(times).to(device), 0, watermark_ms=now)
            same = np.array_equal(a.slots, b.slots.cpu().numpy()) and np.array_equal(a.fresh, b.fresh.cpu().numpy())
            x, y = one.state(), other.state()
            if not same or any(not np.array_equal(x[name], y[name]) for name in x):
                sys.exit(f"the GPU's index differs from numpy's at width {width}")
        if min(one.tally.evictions, one.tally.unplaced, one.tally.unadmitted) == 0:
            sys.exit("nothing was compared")


def measure(slots: int, batch: int, repeats: int, device: str) -> Json:
    """Ids a second of one table size and one batch size."""
    r = np.random.default_rng(2)
    known = r.integers(-(2**63), 2**63 - 1, slots // 2, dtype=np.int64)

    def ids(new: float, count: int) -> list[torch.Tensor]:
        """Batches in which so many ids are new."""
        batches = [known[r.integers(0, len(known), batch)] for _ in range(count)]
        for some in batches:
            some[: round(batch * new)] = r.integers(-(2**63), 2**63 - 1, round(batch * new), dtype=np.int64)
        return [torch.from_numpy(some).to(device) for some in batches]

    index = filled(slots, batch, known, life_ms=1_000, device=device)
    took = seconds(lambda some, _: index.find(some, START), ids(0.10, WARM + 8), repeats, device)
    one: Json = {"slots": slots, "batch": batch, "lookups_per_second": round(batch / took), "map": {}}
    for new in NEW:
        fill = max(1, round(slots / 4 / max(1, batch * new)))  # batches that fill a quarter of the slots
        index = filled(slots, batch, known, life_ms=1_000 * fill, device=device)
        one["map"][f"{new:.0%} new"] = mapped(index, ids(new, WARM + repeats), device)
    return one


def filled(slots: int, batch: int, known: NDArray[np.int64], *, life_ms: int, device: str) -> "TritonIndex":
    """An index that holds these keys for good (field 0); others live so long (field 1)."""
    from streamgr.model.index_triton import TritonIndex

    index = TritonIndex(slots, WIDTH, lives_ms=[1 << 50, life_ms], half_life_ms=life_ms, device=device)
    for part in torch.from_numpy(known).to(device).split(batch):
        index.map(part, torch.full_like(part, START), 0, watermark_ms=START)
    return index


def mapped(index: "TritonIndex", batches: list[torch.Tensor], device: str) -> Json:
    """Ids a second, a batch a second of event time; and what became of the new ones."""
    times = [torch.full_like(some, START + 1_000 * i) for i, some in enumerate(batches)]

    def step(some: torch.Tensor, i: int) -> None:
        index.map(some, times[i], 1, watermark_ms=START + 1_000 * i)

    took = seconds(step, batches, len(batches) - WARM, device)
    tally = index.tally
    return {
        "ids_per_second": round(len(batches[0]) / took),
        "admissions": tally.admissions,
        "evictions": tally.evictions,
        "unplaced": tally.unplaced,
        "used": len(index.live(index.watermark)) / len(index),
    }


def seconds(what: Callable[[torch.Tensor, int], Any], batches: list[torch.Tensor], repeats: int, device: str) -> float:
    """Of one call, the mean of so many; the first batches are for the compiler."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for i in range(WARM):
        what(batches[i], i)
    wait()
    started = time.perf_counter()
    for i in range(repeats):
        at = WARM + i % (len(batches) - WARM)
        what(batches[at], at)
    wait()
    return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    main()
