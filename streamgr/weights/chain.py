"""What a version stands on, link by link: each delta on its parent, of the same trainer, model and form."""

from collections.abc import Mapping

from streamgr.weights import payload as payloads
from streamgr.weights.manifest import Manifest, Rejected

Order = tuple[int, int]  # epoch, version


def links(known: Mapping[Order, Manifest], order: Order, upto: Manifest | None = None) -> list[Manifest]:
    """The way to a version: from its snapshot, or from the delta after `upto`, to itself, each standing on the last.

    Raises `Rejected` (gap, schema, shape) where there is none.
    """
    if order not in known:
        raise Rejected(
            "gap",
            "is not in the log, damaged, or of a trainer that was fenced off",
            where=f"weights version {order[1]}",
        )
    path = [known[order]]
    while (parent := path[-1].parent) is not None:
        if upto is not None and upto.order == (path[-1].epoch, parent):
            require_link(path[-1], upto)
            break
        link = known.get((path[-1].epoch, parent))
        if link is None:
            raise Rejected("gap", f"version {parent}, on which it stands, is gone", where=path[-1].name())
        require_link(path[-1], link)
        path.append(link)
    return path[::-1]


def require_link(delta: Manifest, parent: Manifest) -> None:
    """Raises `Rejected` (schema, shape) unless a delta could follow this version, whose number it names."""
    if delta.model_digest != parent.model_digest:
        raise Rejected("schema", "a delta of another model than its parent", where=delta.name())
    payloads.require_same_form(delta.tensors, parent.tensors)
