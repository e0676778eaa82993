"""The model's side: torch and its device, the fast path against the plain one, and the weights that are published.

Nothing here is imported with torch before a check runs: a stream-side installation has none.
"""

from collections.abc import Iterator
from importlib.util import find_spec

from streamgr.clock import Deadline
from streamgr.doctor.case import Case, age, fail, ok, warn
from streamgr.errors import ConfigError, DataError
from streamgr.kafka.consumer import Consumer
from streamgr.sanity import Finding

TOKENS, TOLERANCE = 64, 1e-4
SECONDS = 15.0


def torch_and_device(case: Case) -> Iterator[Finding]:
    """What the configured device needs."""
    import torch

    cuda = (
        f"CUDA {torch.version.cuda} with {torch.cuda.device_count()} device(s)"
        if torch.cuda.is_available()
        else "no CUDA"
    )
    triton = "Triton" if find_spec("triton") else "no Triton"
    device = case.config.trainer.device
    what = f"torch {torch.__version__}, {cuda}, {triton}; trainer.device is {device!r}"
    if device.startswith("cuda") and not torch.cuda.is_available():
        remedy = "give the container the GPU (driver, nvidia-container-toolkit, torch with CUDA), or the cpu"
        yield fail("torch", what, remedy, ConfigError.exit_code)
    elif device.startswith("cuda") and not find_spec("triton"):
        yield fail("torch", what, "pip install 'streamgr[gpu]'", ConfigError.exit_code)
    else:
        yield ok("torch", what)


def attention(case: Case) -> Iterator[Finding]:
    """The one that is used against the one that can be read, on a batch of 64 tokens."""
    import numpy as np
    import torch

    from streamgr.events import FIRST_ACTION, IMPRESSION, History
    from streamgr.model import attention, attention_blocks
    from streamgr.model.tokens import Layout, tokenize

    random, settings = np.random.default_rng(1), case.config.model
    lengths = (TOKENS // 2, TOKENS // 4, TOKENS // 4)
    histories = [
        History(
            random.integers(IMPRESSION, FIRST_ACTION, n, endpoint=True).astype(np.uint8),
            random.integers(1, 1 << 60, n).astype(np.uint64),
            1_700_000_000_000 + np.sort(random.integers(0, 3_600_000, n)),
            np.arange(n, dtype=np.uint64) // 3,
        )
        for n in lengths
    ]
    tokens, shape = tokenize(histories, Layout(1)), attention.Shape.of(settings)
    draw = torch.Generator().manual_seed(1)
    width = settings.dim // settings.heads
    q, k, v = (torch.randn(len(tokens), settings.heads, width, generator=draw) for _ in range(3))
    position, time = (torch.randn(n, generator=draw) for n in (shape.positions, shape.times))
    fast = attention_blocks.attend(q, k, v, position, time, attention_blocks.plan(tokens, shape))
    plain = attention.reference(q, k, v, position, time, attention.pairs(tokens, shape))
    apart = float((fast - plain).abs().max() / plain.abs().max().clamp(min=1e-9))
    what = f"fast and plain differ by {apart:.1e} of the largest value on {len(tokens)} tokens"
    if apart > TOLERANCE:
        yield fail("attention", what, "this torch computes something else here: install the pinned one", 1)
    else:
        yield ok("attention", what)


def claims(case: Case) -> Iterator[Finding]:
    """Who may publish weights: the newest claim, and what came under an older one since."""
    from streamgr.weights.log import ManifestLog
    from streamgr.weights.manifest import ClaimRecord, Manifest, Rejected

    log = ManifestLog(Consumer(case.config.kafka, client_id="streamgr-doctor"), case.config.topic("manifests"))
    claim, epoch, newest, fenced, unreadable = None, -1, None, 0, 0
    try:
        log.start(SECONDS)
        for entry in log.read_until(log.bounds(SECONDS)[1], Deadline(case.clock, SECONDS)):
            match entry.content:
                case ClaimRecord() as record:
                    claim, epoch, fenced = record, entry.offset, 0
                case Manifest() as manifest if manifest.epoch < epoch:
                    fenced += 1
                case Manifest() as manifest:
                    newest = manifest
                case Rejected():
                    unreadable += 1
    finally:
        log.close()
    if unreadable:
        yield warn("trainer", f"{unreadable} records of the manifests cannot be read", "see `streamgr weights list`")
    if claim is None:
        yield warn("trainer", "no trainer has ever claimed the weights", "start one")
        return
    since = age((case.clock.now_ms() - claim.claimed_ms) / 1000)
    if fenced:
        remedy = "stop that one: two trainers run on one topic prefix"
        yield warn("trainer", f"{fenced} versions of a trainer that was fenced off {since} ago, refused by all", remedy)
    if newest is None or newest.epoch < epoch:
        yield warn(
            "trainer", f"epoch {epoch} was claimed {since} ago and nothing published since", "see the trainer's log"
        )
    else:
        old = age((case.clock.now_ms() - newest.published_ms) / 1000)
        yield ok(
            "trainer", f"epoch {epoch} holds the claim since {since}; version {newest.version} published {old} ago"
        )


def weights(case: Case) -> Iterator[Finding]:
    """The newest version and all that it stands on, byte by byte."""
    from streamgr.weights import views

    versions = [row for row in views.list_versions(case.config, case.clock) if not row["fenced"]]
    if not versions:
        yield warn("weights", "no version yet", "start the trainer")
        return
    for row in versions:
        if row["pinned"]:
            yield warn("weights", f"scorers are held at version {row['version']}", "streamgr weights pin --remove")
    verdict = views.verify(case.config, case.clock, versions[-1]["version"])
    chain = f"version {verdict['version']} on {len(verdict['checked'])} links, {verdict['bytes'] / (1 << 20):.1f} MiB"
    if verdict["ok"]:
        yield ok("weights", f"{chain}: whole")
    else:
        remedy = "the next snapshot heals this; until then: streamgr weights rollback"
        yield fail("weights", f"{chain}: {verdict['reason']}: {verdict['detail']}", remedy, DataError.exit_code)
