"""Each message before both judges: the rule book of the tests, and the decoder of the system, fast path and slow.

They agree when all three say the same: the same reason, or good and the same event. Where they do not, that is a
finding: findings of one kind (who said what) are counted together, and the shortest message of each kind is kept, with
the seed and number that make it again. `shortened` cuts it down to what it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from streamgr.decoder import Decoder
from streamgr.events import (
    FIRST_ACTION,
    IMPRESSION,
    PROFILE,
    BadRecord,
    Erasure,
    Event,
    Heartbeat,
    Record,
    Records,
)
from tests.fuzz.messages import Message, Rules
from tests.rulebook import Json, judge

Outcome = Event | Heartbeat | Erasure | BadRecord
SHOWN = 400  # bytes of a message that are printed


@dataclass(slots=True)
class Finding:
    """One kind of disagreement: how often, and its shortest example."""

    what: str
    number: int
    message: Message | None
    times: int = 0


@dataclass(slots=True)
class Findings:
    """All disagreements of a run, by kind. seed: None where the messages depend on more than that."""

    seed: int | None = None
    kinds: dict[str, Finding] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(f.times for f in self.kinds.values())

    def add(self, kind: str, what: str, number: int, message: Message | None = None) -> None:
        known = self.kinds.setdefault(kind, Finding(what, number, message))
        if message is not None and known.message is not None and _size(message) < _size(known.message):
            known.what, known.number, known.message = what, number, message
        known.times += 1

    def text(self, most: int = 20) -> str:
        """What to print, the most frequent first."""
        ordered = sorted(self.kinds.items(), key=lambda kind: -kind[1].times)
        lines = []
        for kind, found in ordered[:most]:
            lines.append(f"{found.times} times: {kind}\n  {found.what}")
            if found.message is not None:
                lines.append(f"  key   {_short(found.message.key)}\n  value {_short(found.message.value)}")
            if self.seed is not None:
                lines.append(f"  again: --seed {self.seed} --only {found.number}")
        if len(ordered) > most:
            lines.append(f"and {len(ordered) - most} kinds more")
        return "\n".join(lines)


class Judges:
    """Both of them under the same rules."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.decoder = Decoder(rules.actions, rules.max_future_ms, rules.closing_ms)
        self._kinds = {"profile": PROFILE, "impression": IMPRESSION}
        self._kinds |= {name: FIRST_ACTION + bit for bit, name in enumerate(rules.actions)}

    def judged(self, message: Message) -> str | Json:
        """What the rule book of the tests says: the reason, or the event as the oracle takes it."""
        rules = self.rules
        return judge(*message, actions=rules.actions, max_future_ms=rules.max_future_ms, closing_ms=rules.closing_ms)

    def verdicts(self, messages: list[Message], first: int, findings: Findings) -> list[str | Json | None]:
        """The verdict on each message; None where there is none to rely on. `first`: the number of the first."""
        records = batch(messages, first)
        decoded = _decoded(self.decoder, records)
        verdicts: list[str | Json | None] = []
        for i, message in enumerate(messages):
            judged, fast, slow = self.judged(message), decoded[i], _explained(self.decoder, records[i])
            wanted = judged if isinstance(judged, str) else self._outcome(judged)
            if _same(wanted, fast) and _same(wanted, slow):
                verdicts.append(judged)
                continue
            findings.add(_kind(wanted, fast, slow), _says(wanted, fast, slow), first + i, message)
            verdicts.append(None)
        return verdicts

    def kind(self, message: Message) -> str | None:
        """The kind of disagreement over this message; None where all agree."""
        findings = Findings()
        self.verdicts([message], 0, findings)
        return next(iter(findings.kinds), None)

    def _outcome(self, e: Json) -> Outcome:
        """What the decoder should make of an event that the rule book of the tests found good."""
        if "erase" in e:
            return Erasure(e["erase"])
        if e["type"] == "heartbeat":
            return Heartbeat(e["event_time"])
        return Event(
            self._kinds[e["type"]],
            e["user_id"],
            e.get("item_id", ""),
            e["event_id"],
            e["event_time"],
            e.get("request_id", ""),
            e.get("surface", ""),
            e.get("position", -1),
            e.get("features") or None,
        )


def batch(messages: Sequence[Message], first: int) -> Records:
    """The messages as records whose offsets are their numbers."""
    keys, values, append_ms = zip(*messages, strict=True)
    end = first + len(messages)
    return Records("e", 0, list(range(first, end)), list(keys), list(values), list(append_ms), end)


def shortened(message: Message, judges: Judges) -> Message:
    """The message with as much of its value gone as can go while the judges disagree in the same way."""
    kind = judges.kind(message)
    if message.value is None or kind is None:
        return message
    value, before = message.value, None
    while value != before:
        before = value
        least = max(1, len(value) >> 9)  # of a long one no single bytes: that would take hours
        for size in [len(value) >> n for n in range(1, len(value).bit_length())] + [*range(12, 0, -1)]:
            at = 0
            while size >= least and at < len(value):
                fewer = value[:at] + value[at + size :]
                if judges.kind(message._replace(value=fewer)) == kind:
                    value = fewer
                else:
                    at += size if size > 12 else 1
    return message._replace(value=value)


def _decoded(decoder: Decoder, records: Records) -> list[Outcome | Exception]:
    """The batch, or where it raises, record by record."""
    try:
        return [*decoder.decode(records)]
    except Exception:
        cut = ((records.offsets[i], records.offsets[i] + 1) for i in range(len(records)))
        return [*chain.from_iterable(_decoded_alone(decoder, records.between(*ends)) for ends in cut)]


def _decoded_alone(decoder: Decoder, record: Records) -> list[Outcome | Exception]:
    try:
        return [*decoder.decode(record)]
    except Exception as error:
        return [error]


def _explained(decoder: Decoder, record: Record) -> Outcome | Exception:
    try:
        return decoder.explain(record)
    except Exception as error:
        return error


def _same(wanted: Outcome | str, outcome: Outcome | Exception) -> bool:
    return outcome.reason == wanted if isinstance(outcome, BadRecord) else outcome == wanted


def _kind(wanted: Outcome | str, *outcomes: Outcome | Exception) -> str:
    book, fast, slow = (_word(o) for o in (wanted, *outcomes))
    other = ", another event" if book == fast == slow else ""
    return f"the rule book says {book}, decode {fast}, explain {slow}{other}"


def _word(outcome: Outcome | Exception | str) -> str:
    if isinstance(outcome, str):
        return outcome
    if isinstance(outcome, Exception):
        return f"raises {type(outcome).__name__}"
    return outcome.reason if isinstance(outcome, BadRecord) else "good"


def _says(wanted: Outcome | str, fast: Outcome | Exception, slow: Outcome | Exception) -> str:
    return f"decode: {_clipped(repr(fast))}; explain: {_clipped(repr(slow))}; wanted: {_clipped(repr(wanted))}"


def _size(message: Message) -> int:
    return len(message.key or b"") + len(message.value or b"")


def _short(raw: bytes | None) -> str:
    return "null" if raw is None else f"{_clipped(repr(raw))} ({len(raw)} bytes)"


def _clipped(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
