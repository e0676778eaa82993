"""Good events of every kind, and what bad producers, bad disks and bad luck make of them; all from one seed.

A message starts as a draft: the JSON text of each field of a good event, in a list, because what is wanted can stand
in no dict (a name twice, 01, half a surrogate pair). Some drafts are written as they are, others are broken first:

1. in structure, as a draft: wrong types, missing, doubled and renamed fields, numbers, times and lengths at every limit
2. in bytes, once written: flipped, dropped, inserted, doubled, cut off, spliced with an earlier message
3. around the value: its size, its absence, its key

Many a break leaves the message good: no one here knows which, `tests.rulebook` does. Good events fit together (actions
follow impressions, slates share a request, earlier messages come again), so that what is left of the stream still means
something to the joins. Everything is written as text, for speed.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from random import Random
from typing import NamedTuple, TypeVar

T = TypeVar("T")
MIB = 1 << 20
EPOCH = date(1970, 1, 1).toordinal()
SECOND = 1_000
WINDOW_MS = 10 * SECOND  # within which an action joins an impression
KNOWN = (
    "type", "event_id", "user_id", "item_id", "event_time", "request_id", "surface", "position", "features",
)  # fmt: skip
LONGEST = {"type": 128, "event_id": 128, "user_id": 256, "item_id": 256, "request_id": 256, "surface": 128}

# --- pieces of JSON text, and of what only looks like it ---

INT64 = (1 << 63) - 1
GOOD_NUMBERS = ["0", "-0", "1", "-1", "7", str(2**53 + 1), str(INT64), str(-INT64 - 1), "1700000000000"]
FLOATS = ["1.0", "-0.0", "0.0", "1e0", "1E5", "1E+2", "1e-2", "1.7e12", "1700000000000.0", "1.5", "0e0", "-0e-0"]
HUGE = [
    "1e999", "-1e999", "1e-999", "1e400", f"{'9' * 400}.5", f"0.{'0' * 400}1", str(INT64 + 1), str(-INT64 - 2),
    str(1 << 64), str((1 << 64) - 1), "12345678901234567890", "-12345678901234567890", "9" * 21, "-" + "9" * 21,
    "1" + "0" * 400, "9" * 5_000,
]  # fmt: skip
NO_NUMBERS = [
    "01", "-01", "00", "+1", ".5", "1.", "1e", "1e+", "-", "--1", "0x10", "1_000", "1e5.5", "NaN", "Infinity",
    "-Infinity", "nan", "1,", "1 2", "\u0661",
]  # fmt: skip
WRONG_TYPES = [
    "true", "false", "[]", "{}", "[1]", '{"a": 1}', "[[]]", '[{"type": "click"}]', "1.5", '{"type": "click"}', "[null]",
]  # fmt: skip
NO_VALUES = [
    "nul",
    "True",
    "None",
    "undefined",
    "'x'",
    "[1,]",
    '{"a": 1,}',
    '{"a"}',
    "[",
    "}",
    "",
    '"',
    '"\\"',
    "/**/1",
]
STRINGS = [
    '""', '"x"', '"null"', '" "', '"\\u0000"', '"\\u0078"', '"\\/"', '"\\n\\t\\"\\\\"', '"\u2028"', '"\x7f"', '"💡"',
    '"\\ud83d\\udca1"', '"\\uD83D\\uDCA1"', '"[{"', '"e\u0301"', '"\ufeff"', '"\U0010ffff"', '"\ufffe"', '"\\ufffe"',
]  # fmt: skip
NO_STRINGS = ['"\n"', '"\x01"', '"\\x"', '"\\u12"', '"\\u12g4"', '"\\u{41}"', '"\\', '"\\a"', '"\\U0041"', '"\x00"']
LONE = [
    "\\ud800", "\\udfff", "\\udc00\\ud800", "\\ud800\\ud800", "\\ud83d\\u0041", "\\uD83D", "\\ud83d\\n", "\\ud83d\\\\",
    "\\udca1\\ud83d\\udca1", "\\ud83d\\ud83d\\udca1",
]  # fmt: skip
SURROGATES = ["\ud800", "\udfff", "\ud83d\udca1"]  # as characters: written as bytes that are not UTF-8
CHARACTERS = [
    ("x", "x"), ("é", "é"), ("€", "€"), ("💡", "💡"), ("é", "\\u00e9"), ("💡", "\\ud83d\\udca1"), ("\0", "\\u0000"),
    ('"', '\\"'), ("\\", "\\\\"), ("\u0301", "\u0301"), ("\U0010ffff", "\U0010ffff"), ("[", "["),
]  # fmt: skip
TYPES = [
    '"Click"', '"CLICK"', '""', '"purchase"', '"click "', '"clicks"', '"profil"', '"like\\u0000"', '"clíck"', '"view"',
    '"cl\\u0069ck"', '"\\u006cike"', '"heartbeat"', '"profile"', '"impression"', '"click"', '"null"', f'"{"y" * 500}"',
]  # fmt: skip
TIMES = [
    "2023-11-14", "2023-11-14T22:13:20", "2023-11-14T22:13:20.5", "2023-11-14T22:13Z", "2023-11-14T22:13:20+01",
    "2023-11-14T22:13:20+0100", "2023-11-14T24:00:00Z", "2023-11-14T22:60:00Z", "2023-11-14T22:13:61Z",
    "2023-11-14T22:13:20.Z", "2023-11-14T22:13:20,5Z", "2023-11-14T22:13:20+24:00", "2023-11-14T22:13:20+01:60",
    "2023-11-14T22:13:20-00:00", "2023-11-14T22:13:60Z", "2023-11-14t22:13:20z", "2023-11-14 22:13:20Z",
    "2023-11-14_22:13:20Z", "2023-13-01T00:00:00Z", "2023-00-10T00:00:00Z", "2023-01-00T00:00:00Z",
    "2023-02-29T00:00:00Z", "2024-02-29T00:00:00Z", "1900-02-29T00:00:00Z", "2000-02-29T00:00:00Z",
    "2023-04-31T00:00:00Z", "2016-12-31T23:59:60Z", "1969-12-31T23:59:59.999Z", "1969-12-31T23:30:00-01:00",
    "1970-01-01T00:30:00+01:00", "1970-01-01T00:00:00Z", "1969-12-31T23:59:60Z", "0001-01-01T00:00:00Z",
    "0000-01-01T00:00:00Z", "0000-12-31T23:59:59Z", "0000-02-30T00:00:00Z", "9999-12-31T23:59:59Z",
    "9999-12-31T23:59:60-23:59", "10000-01-01T00:00:00Z", "-0001-01-01T00:00:00Z", "23-11-14T22:13:20Z",
    "2023-11-14T22:13:20Z\\n", "2023-11-14T22:13:20\\u005a", " 2023-11-14T22:13:20Z", "2023-11-14T22:13:20 Z",
    "2023-11-14T22:13:20ZZ", "2023-11-14T22:13:20.123456789012345678901234567890Z", "2023-W46-2T22:13:20Z",
    "2023-11-14T22:13:20−01:00", "٢٠٢٣-11-14T22:13:20Z", "２０23-11-14T22:13:20Z", "1700000000000", "yesterday", "",
    "20231114T221320Z", "Tue, 14 Nov 2023 22:13:20 GMT", "2023-11-14T22:13:20.\u0661Z", "2023-11-14T22:13:20\\u0000Z",
]  # fmt: skip
NEAR_TIME = "0123456789-:.TZtz+ 6٣"
NAMES = [
    "Type", "type ", "typ", "eventId", "userid", "", "\\u0000", "event_time\\u0000", "features.a", "f" * 300, "💡", "é",
    "actions", "late", "erase", "__class__", "timestamp",
]  # fmt: skip
SCALARS = [*GOOD_NUMBERS, *STRINGS, "null", '"BR"', '"US"']
ANYTHING = [*SCALARS, *FLOATS, *HUGE, *WRONG_TYPES]
NO_JSON = [*NO_NUMBERS, *NO_VALUES, *NO_STRINGS]
INTEGERS = ("event_time", "position", "user_id", "item_id", "request_id")
WORDS = ["clicks", "home", "feed", "BR", "US", "e\u0301", "null"]
BLANKS = [" ", "\t", "\n", "\r", "  \r\n\t", "", "", ""]
NO_BLANKS = ["\x0b", "\x0c", "\xa0", "\u2028", "\ufeff", "\x00", "//\n", "\u3000"]
NO_UTF_8 = [
    b"\xff", b"\xfe", b"\x80", b"\xc0\x80", b"\xc1\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf4\x90\x80\x80", b"\xe2",
    b"\xf0\x9f\x92", b"\xc3", b"\xf8\x88\x80\x80\x80", b"\xe0\x80\xaf",
]  # fmt: skip
TOKENS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"0", b"-", b".", b"e", b" ", b"\x00", b"\xef\xbb\xbf", b"n"]


class Rules(NamedTuple):
    """What a verdict depends on, besides the record."""

    actions: tuple[str, ...] = ("click", "like")
    max_future_ms: int = 2 * SECOND
    closing_ms: int = WINDOW_MS + 6 * SECOND


class Message(NamedTuple):
    """A record before it has a topic. `append_ms`: what the broker's clock shall say."""

    key: bytes | None
    value: bytes | None
    append_ms: int


class User(NamedTuple):
    """A user id as JSON text, and the key that goes with it."""

    text: str
    key: bytes


class Shown(NamedTuple):
    """An impression that later actions may belong to; all but the time as JSON text or as a user."""

    user: User
    item: str
    request: str | None
    time: int


@dataclass(slots=True)
class Draft:
    """A message being written."""

    fields: list[tuple[str, str]]
    key: bytes | None
    blank: str = ""  # before, after and within


@dataclass(slots=True)
class Maker:
    """The state of one stream."""

    rng: Random
    rules: Rules
    at: int  # the broker's clock
    users: list[User]
    number: int = 0
    shown: deque[Shown] = field(default_factory=lambda: deque(maxlen=256))
    slate: list[Draft] = field(default_factory=list)
    sent: deque[tuple[bytes | None, bytes | None]] = field(default_factory=lambda: deque(maxlen=200))


def messages(seed: str, count: int, rules: Rules, start_ms: int, pace_ms: int) -> Iterator[Message]:
    """`count` messages, about `pace_ms` apart; the same for the same arguments."""
    rng = Random(seed)
    maker = Maker(rng, rules, start_ms, _users(rng))
    for _ in range(count):
        maker.number += 1
        maker.at += rng.randrange(2 * pace_ms + 1) if rng.random() < 0.98 else -rng.randrange(pace_ms + 1)
        key, value = _message(maker)
        yield Message(key, value, maker.at)


def _message(maker: Maker) -> tuple[bytes | None, bytes | None]:
    rng = maker.rng
    luck = rng.random()
    if luck < 0.03 and maker.sent:
        return _pick(rng, maker.sent)
    if luck < 0.06:
        return _erasure(maker)
    if luck < 0.065:
        return _big(maker)
    draft = _draft(maker)
    if luck < 0.30:
        value = _written(draft)
        maker.sent.append((draft.key, value))
        return draft.key, value
    if luck < 0.72:
        for _ in range(_few(rng)):
            _pick(rng, STRUCTURE)(maker, draft)
        return draft.key, _written(draft)
    if luck < 0.80:
        draft.key = _other_key(maker, draft.key)
        return draft.key, _written(draft)
    value = _written(draft)
    for _ in range(_few(rng)):
        value = _pick(rng, BYTES)(maker, value)
    return draft.key, value


def _pick(rng: Random, among: Sequence[T]) -> T:
    return among[int(rng.random() * len(among))]


def _few(rng: Random) -> int:
    """Mostly one."""
    return 1 if rng.random() < 0.75 else rng.randrange(2, 5)


def _quoted(rng: Random, text: str) -> str:
    """The text in JSON, as one encoder or another writes it."""
    return json.dumps(text, ensure_ascii=rng.random() < 0.5)


def _users(rng: Random) -> list[User]:
    plain = [f"u{n}" for n in range(40)]
    odd = ["é", "💡", "nul\0", 'quo"te', "back\\slash", " ", "\u2028", "e\u0301", "null", "x" * 256, "💡" * 256, "1.0"]
    users = [User(_quoted(rng, name), name.encode()) for name in [*plain, *odd]]
    users += [User(number, str(int(number)).encode()) for number in GOOD_NUMBERS]
    rng.shuffle(users)
    return users


# --- good events ---


def _draft(maker: Maker) -> Draft:
    """A good event."""
    rng = maker.rng
    if maker.slate:
        return maker.slate.pop()
    luck = rng.random()
    if luck < 0.04:
        return _heartbeat(maker)
    if luck < 0.16:
        return _profile(maker)
    if luck < 0.50 or not maker.shown:
        return _impression(maker)
    return _action(maker)


def _heartbeat(maker: Maker) -> Draft:
    fields = [("type", '"heartbeat"'), ("event_time", _time(maker, maker.at - maker.rng.randrange(4 * SECOND)))]
    if maker.rng.random() < 0.2:  # of a heartbeat nothing else is read
        fields.append((_pick(maker.rng, KNOWN[1:4] + KNOWN[5:]), _pick(maker.rng, ANYTHING)))
    return Draft(fields, None)


def _profile(maker: Maker) -> Draft:
    rng = maker.rng
    user = _user(maker)
    event = _event(maker, '"profile"', user, None, _moment(maker))
    if rng.random() < 0.9:
        event.fields.append(("features", _pick(rng, ['{"country": "BR"}', '{"country":"US"}', "{}"])))
    if rng.random() < 0.1:  # nobody reads a profile's item
        event.fields.append(("item_id", _pick(rng, ANYTHING)))
    return event


def _impression(maker: Maker) -> Draft:
    rng = maker.rng
    user, time = _user(maker), _moment(maker)
    request = f'"r{maker.number}"' if rng.random() < 0.6 else None
    for _ in range(1 if rng.random() < 0.8 else rng.randrange(2, 7)):
        shown = Shown(user, _item(maker), request, time)
        maker.shown.append(shown)
        maker.slate.append(_event(maker, '"impression"', user, shown, time))
    return maker.slate.pop()


def _action(maker: Maker) -> Draft:
    rng = maker.rng
    kind = f'"{_pick(rng, maker.rules.actions)}"'
    shown = _pick(rng, maker.shown)
    if rng.random() < 0.2:  # organic, perhaps
        shown = Shown(_user(maker), _item(maker), None if rng.random() < 0.5 else '"r"', 0)
        return _event(maker, kind, shown.user, shown, _moment(maker))
    if rng.random() < 0.4:
        shown = shown._replace(request=None)
    after = _pick(rng, (0, 1, WINDOW_MS - 1, WINDOW_MS, rng.randrange(3 * SECOND), rng.randrange(-SECOND, 12 * SECOND)))
    return _event(maker, kind, shown.user, shown, min(shown.time + after, maker.at))


def _event(maker: Maker, kind: str, user: User, shown: Shown | None, time: int) -> Draft:
    rng = maker.rng
    fields = [("type", kind), ("event_id", f'"e{maker.number}.{rng.randrange(1000)}"'), ("user_id", user.text)]
    if shown is not None:
        fields.append(("item_id", shown.item))
    fields.append(("event_time", _time(maker, time)))
    if shown is not None and shown.request is not None:
        fields.append(("request_id", shown.request))
    more = rng.random()
    if more < 0.2:
        fields += [("surface", _quoted(rng, _pick(rng, WORDS))), ("position", str(rng.randrange(-3, 50)))]
    elif more < 0.25:
        fields.append(("features", _features(rng, 0.0)))
    elif more < 0.3:
        fields.append((_pick(rng, NAMES), _pick(rng, ANYTHING)))
    elif more < 0.35:
        fields.append((_pick(rng, KNOWN[5:]), "null"))
    elif more < 0.4:
        rng.shuffle(fields)
    blank = _pick(rng, BLANKS) if more > 0.7 else ""
    return Draft(fields, user.key, blank)


def _user(maker: Maker) -> User:
    return maker.users[int(maker.rng.random() ** 2 * len(maker.users))]


def _item(maker: Maker) -> str:
    """One of forty, a few of them odd."""
    n = maker.rng.randrange(40)
    return f'"i{n}"' if n < 34 else ("7", "-0", str(INT64), '"💡"', '"\\u0000"', '"7"')[n - 34]


def _moment(maker: Maker) -> int:
    """An event time: mostly of late, sometimes long past the lateness."""
    rng = maker.rng
    return max(0, maker.at - int(rng.random() ** 3 * (6 * SECOND if rng.random() < 0.95 else 60 * SECOND)))


def _time(maker: Maker, ms: int) -> str:
    """A time in JSON: an integer, or text now and then (what it cuts off shall not matter)."""
    return str(ms) if maker.rng.random() < 0.85 else f'"{_rfc_3339(maker.rng, ms)}"'


def _rfc_3339(rng: Random, ms: int) -> str:
    """The time in any of the forms that RFC 3339 has for it, to the millisecond or (sometimes) cut to the second."""
    minutes = 0 if rng.random() < 0.6 else rng.randrange(-1439, 1440)
    seconds, part = divmod(ms + minutes * 60_000, 1000)
    days, seconds = divmod(seconds, 86_400)
    if not 0 < days + EPOCH <= date.max.toordinal():
        return "9999-12-31T23:59:59Z"
    fraction = "" if rng.random() < 0.1 else f".{part:03d}" + "".join(str(rng.randrange(10)) for _ in range(_tail(rng)))
    sign = "-" if minutes < 0 else "+"
    zone = _pick(rng, "ZZZz") if minutes == 0 else f"{sign}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{date.fromordinal(days + EPOCH).isoformat()}{_pick(rng, 'TTTt ')}{clock}{fraction}{zone}"


def _tail(rng: Random) -> int:
    """How many digits after the milliseconds."""
    return 0 if rng.random() < 0.7 else rng.randrange(1, 30)


def _features(rng: Random, bad: float) -> str:
    """An object of features; each value and each name is odd with the given probability."""
    count = (
        _pick(rng, (0, 1, 1, 2, 3, 3, 31, 32))
        if rng.random() > bad
        else _pick(rng, (0, 1, 1, 2, 3, 32, 33, 33, 34, 100))
    )
    members = []
    for n in range(count):
        name, value = f'"f{n}"', _pick(rng, SCALARS)
        if rng.random() < bad:
            value = _pick(rng, (_pick(rng, ANYTHING), _long(rng, 128)[0], _lone(rng)))
        if rng.random() < bad:
            name = _pick(rng, (_long(rng, 128)[0], _long(rng, 128)[0], '"f0"', '""', _lone(rng)))
        members.append(f"{name}:{value}")
    return "{" + ",".join(members) + "}"


def _long(rng: Random, limit: int) -> tuple[str, bytes]:
    """Text of about `limit` code points, in JSON and as a key."""
    length = limit + _pick(rng, (-1, 0, 0, 1, 1, 2))
    if rng.random() < 0.05:
        length = _pick(rng, (limit // 2, limit * 2, limit * 40))
    character, written = _pick(rng, CHARACTERS)
    if rng.random() < 0.5:
        return f'"{written * length}"', (character * length).encode()
    return f'"{"y" * (length - 1)}{written}"', ("y" * (length - 1) + character).encode()


def _lone(rng: Random) -> str:
    """A string with half a surrogate pair in it; what stands around it matters to some parsers."""
    before, after = "x" * _pick(rng, (0, 0, 1, 5, 20)), "y" * _pick(rng, (0, 0, 1, 5, 12, 20))
    return f'"{before}{_pick(rng, LONE)}{after}"'


# --- breaking a draft ---


def _replace(draft: Draft, name: str, text: str) -> None:
    """Give a field another value; it is added where it is missing."""
    for i, (known, _) in enumerate(draft.fields):
        if known == name:
            draft.fields[i] = name, text
            return
    draft.fields.append((name, text))


def _rekey(maker: Maker, draft: Draft, name: str, key: bytes) -> None:
    """Where the user changed, the key mostly follows."""
    if name == "user_id" and draft.key is not None and maker.rng.random() < 0.8:
        draft.key = key


def _any_value(maker: Maker, draft: Draft) -> None:
    _replace(draft, _pick(maker.rng, KNOWN), _pick(maker.rng, ANYTHING))


def _no_json(maker: Maker, draft: Draft) -> None:
    name = _pick(maker.rng, (*KNOWN, "other"))
    _replace(draft, name, _pick(maker.rng, NO_JSON))


def _number(maker: Maker, draft: Draft) -> None:
    rng = maker.rng
    name, text = _pick(rng, INTEGERS), _pick(rng, (GOOD_NUMBERS, FLOATS, HUGE))
    number = _pick(rng, text)
    _replace(draft, name, number)
    _rekey(maker, draft, name, str(int(number)).encode() if number in GOOD_NUMBERS else number.encode())


def _missing(maker: Maker, draft: Draft) -> None:
    rng = maker.rng
    i = rng.randrange(len(draft.fields)) if draft.fields else 0
    if rng.random() < 0.4:
        _replace(draft, _pick(rng, KNOWN), "null")
    else:
        del draft.fields[i : i + 1]


def _doubled(maker: Maker, draft: Draft) -> None:
    """A name twice: the last one counts, wherever the good one is."""
    rng = maker.rng
    if not draft.fields:
        return
    name, text = _pick(rng, draft.fields)
    if rng.random() < 0.6:
        text = _pick(rng, ANYTHING) if rng.random() < 0.7 else _lone(rng)
    draft.fields.insert(rng.randrange(len(draft.fields) + 1), (name, text))


def _unknown(maker: Maker, draft: Draft) -> None:
    rng = maker.rng
    text = _pick(rng, (_pick(rng, ANYTHING), _lone(rng), _features(rng, 0.3)))
    draft.fields.insert(rng.randrange(len(draft.fields) + 1), (_pick(rng, NAMES), text))


def _renamed(maker: Maker, draft: Draft) -> None:
    """The same name in other letters, or another name."""
    rng = maker.rng
    if not draft.fields:
        return
    i = rng.randrange(len(draft.fields))
    name, text = draft.fields[i]
    k = rng.randrange(len(name)) if name else 0
    if rng.random() < 0.5 and name.isascii() and "\\" not in name and name:
        name = f"{name[:k]}\\u{ord(name[k]):04x}{name[k + 1 :]}"
    else:
        name = _pick(rng, NAMES)
    draft.fields[i] = name, text


def _deep(maker: Maker, draft: Draft) -> None:
    rng = maker.rng
    depth = _pick(rng, (50, 98, 99, 99, 100, 100, 101, 102, 200))
    if rng.random() < 0.02:
        depth = _pick(rng, (1_500, 20_000))
    opened, closed = _pick(rng, (("[", "]"), ('{"a":', "}"), ('[{"]":', "}]")))
    depth //= len(closed)
    inside = _pick(rng, ("1", '"["', "null", '"]]}}"', "[]", "1e999"))
    name = _pick(rng, KNOWN) if rng.random() < 0.3 else _pick(rng, NAMES)
    draft.fields.insert(rng.randrange(len(draft.fields) + 1), (name, opened * depth + inside + closed * depth))


def _length(maker: Maker, draft: Draft) -> None:
    name = _pick(maker.rng, tuple(LONGEST))
    text, key = _long(maker.rng, LONGEST[name])
    _replace(draft, name, text)
    _rekey(maker, draft, name, key)


def _text_time(maker: Maker, draft: Draft) -> None:
    """Times as text: of the list, or a good one with a character gone, changed or more."""
    rng = maker.rng
    if rng.random() < 0.5:
        text = _pick(rng, TIMES)
    else:
        text = _rfc_3339(rng, maker.at)
        if rng.random() < 0.8:
            i = rng.randrange(len(text))
            text = text[:i] + _pick(rng, ("", _pick(rng, NEAR_TIME))) + text[i + rng.randrange(2) :]
    _replace(draft, "event_time", f'"{text}"')


def _future(maker: Maker, draft: Draft) -> None:
    """At the limit, a millisecond before and after it, and beyond."""
    rng, rules = maker.rng, maker.rules
    limit = maker.at + rules.max_future_ms
    if draft.fields and draft.fields[0][1] == '"heartbeat"' and rng.random() < 0.3:
        limit += rules.closing_ms
    ms = limit + _pick(rng, (-SECOND, -1, 0, 0, 1, 1, SECOND, 60 * SECOND, 10**12, INT64 - limit))
    text = str(ms) if rng.random() < 0.7 else f'"{_rfc_3339(rng, ms)}"'
    _replace(draft, "event_time", text)


def _past(maker: Maker, draft: Draft) -> None:
    _replace(draft, "event_time", _pick(maker.rng, ("0", "1", "-1", "-0", "-1700000000000", "-86400000", "999")))


def _bad_features(maker: Maker, draft: Draft) -> None:
    _replace(draft, "features", _features(maker.rng, _pick(maker.rng, (0.02, 0.1, 0.5))))


def _type(maker: Maker, draft: Draft) -> None:
    _replace(draft, "type", _pick(maker.rng, TYPES))


def _surrogate(maker: Maker, draft: Draft) -> None:
    rng = maker.rng
    name, text = _pick(rng, KNOWN), _lone(rng)
    match rng.randrange(6):
        case 0:  # beside what a parser may stumble over first
            text = f"[{_pick(rng, HUGE)}, {text}]"
        case 1:
            text = f'{{"a": {_pick(rng, HUGE)}, {text}: 1, {_lone(rng)}: 2}}'
        case 2:
            text = f'{{"a": {text}, "a": 1}}'
        case 3:
            text = f'"{_pick(rng, SURROGATES)}"'
    _replace(draft, name, text)


def _odd_user(maker: Maker, draft: Draft) -> None:
    """Another user, under his own key or not."""
    user = _pick(maker.rng, maker.users)
    _replace(draft, "user_id", user.text)
    _rekey(maker, draft, "user_id", user.key)


def _blank(maker: Maker, draft: Draft) -> None:
    draft.blank = _pick(maker.rng, (*BLANKS, *NO_BLANKS))


def _nested_event(maker: Maker, draft: Draft) -> None:
    """A whole event in place of a value."""
    text = "{" + ",".join(f'"{name}":{value}' for name, value in _draft(maker).fields) + "}"
    _replace(draft, _pick(maker.rng, (*KNOWN, *NAMES)), text)


# --- breaking bytes ---


def _flip(maker: Maker, value: bytes) -> bytes:
    if not value:
        return b"\x01"
    i = maker.rng.randrange(len(value))
    return value[:i] + bytes((value[i] ^ 1 << maker.rng.randrange(8),)) + value[i + 1 :]


def _insert(maker: Maker, value: bytes) -> bytes:
    rng = maker.rng
    i = rng.randrange(len(value) + 1)
    piece = _pick(rng, TOKENS) if rng.random() < 0.7 else bytes((rng.randrange(256),))
    return value[:i] + piece + value[i:]


def _overwrite(maker: Maker, value: bytes) -> bytes:
    i = maker.rng.randrange(len(value) + 1)
    return value[:i] + _pick(maker.rng, TOKENS) + value[i + 1 :]


def _drop(maker: Maker, value: bytes) -> bytes:
    i, n = maker.rng.randrange(len(value) + 1), _pick(maker.rng, (1, 1, 1, 2, 5, 30))
    return value[:i] + value[i + n :]


def _repeat(maker: Maker, value: bytes) -> bytes:
    i, n = maker.rng.randrange(len(value) + 1), _pick(maker.rng, (1, 1, 2, 5, 30))
    return value[: i + n] + value[i:]


def _truncate(maker: Maker, value: bytes) -> bytes:
    rng = maker.rng
    return value[: rng.randrange(len(value) + 1) if rng.random() < 0.5 else max(0, len(value) - rng.randrange(4))]


def _splice(maker: Maker, value: bytes) -> bytes:
    """The beginning of one and the end of another, or one after the other."""
    rng = maker.rng
    other = (_pick(rng, maker.sent)[1] if maker.sent else None) or b"{}"
    i, k = rng.randrange(len(value) + 1), rng.randrange(len(other) + 1)
    match rng.randrange(5):
        case 0:
            return value + other
        case 1:
            return value[:-1] + b"," + other[1:]  # one object of both: names twice
        case 2:
            return b"[" + value + b"," + other + b"]"
        case 3:
            return value[: value.rfind(b",", 0, i) + 1] + other[other.find(b",", k) + 1 :]
    return value[:i] + other[k:]


def _no_utf_8(maker: Maker, value: bytes) -> bytes:
    rng = maker.rng
    if rng.random() < 0.2:
        return value.decode(errors="replace").encode(_pick(rng, ("utf-16", "utf-16-le", "utf-32-be", "utf-8-sig")))
    i = value.find(b'"', rng.randrange(len(value) + 1)) + 1 if rng.random() < 0.7 else rng.randrange(len(value) + 1)
    return value[:i] + _pick(rng, NO_UTF_8) + value[i:]


def _no_object(maker: Maker, value: bytes) -> bytes:
    """Good JSON that is no event: what JSON has besides objects, or the event in a list, a string, another object."""
    rng = maker.rng
    match rng.randrange(4):
        case 0:
            return b"[" + value + b"]"
        case 1:
            return json.dumps(value.decode(errors="replace")).encode()
        case 2:
            return b'{"event":' + value + b"}" if rng.random() < 0.3 else b"[]"
    return _pick(rng, (*ANYTHING, "null", "true")).encode()


def _empty(maker: Maker, value: bytes) -> bytes:
    return _pick(maker.rng, (b"", b" ", b"{}", b"\x00", b"\xef\xbb\xbf", b"\xef\xbb\xbf" + value, b"{" + value + b"}"))


STRUCTURE: list[Callable[[Maker, Draft], None]] = [
    change
    for change, weight in {
        _any_value: 12, _no_json: 2, _number: 10, _missing: 8, _doubled: 8, _unknown: 6, _renamed: 4, _deep: 4,
        _length: 12, _text_time: 9, _future: 9, _past: 3, _bad_features: 10, _type: 7, _surrogate: 4, _odd_user: 3,
        _blank: 3, _nested_event: 2,
    }.items()
    for _ in range(weight)
]  # fmt: skip
BYTES: list[Callable[[Maker, bytes], bytes]] = [
    change
    for change, weight in {
        _flip: 8, _insert: 5, _overwrite: 4, _drop: 5, _repeat: 4, _truncate: 4, _splice: 6, _no_utf_8: 3,
        _no_object: 8, _empty: 2,
    }.items()
    for _ in range(weight)
]  # fmt: skip

# --- around the value ---


def _written(draft: Draft) -> bytes:
    blank = draft.blank
    between = f",{blank}"
    fields = between.join([f'"{name}":{blank}{text}' for name, text in draft.fields])
    return f"{blank}{{{fields}{blank}}}{blank}".encode("utf-8", "surrogatepass")


def _other_key(maker: Maker, key: bytes | None) -> bytes | None:
    """What else may be there: nothing, somebody, almost the same."""
    rng = maker.rng
    user = _user(maker)
    if key is None:
        return _pick(rng, (b"", b"u0", user.key, b"heartbeat"))
    near = _pick(rng, (key[:-1], key + b" ", key + b"\x00", b"0" + key, key.upper(), key + b"\xff", b'"' + key + b'"'))
    return _pick(rng, (None, None, b"", b"\xff\xfe", b"\xed\xa0\x80", user.key, near, near, user.text.encode()))


def _erasure(maker: Maker) -> tuple[bytes | None, bytes | None]:
    """A null value, mostly under a user's key."""
    rng = maker.rng
    key: bytes | None = _pick(rng, maker.users).key if rng.random() < 0.5 else b"nobody %d" % maker.number
    if rng.random() < 0.3:
        key = _long(rng, 256)[1] if rng.random() < 0.5 else _other_key(maker, key)
    return key, None


def _big(maker: Maker) -> tuple[bytes | None, bytes | None]:
    """A value around 1 MiB, or (not often) twice that; most are too large."""
    rng = maker.rng
    draft = _draft(maker)
    size = MIB + _pick(rng, (-1, 0, 0, 1, 1, 2, 1_000, 1_000, 100_000))
    if rng.random() < 0.1:
        size = 2 * MIB + _pick(rng, (-70_000, -300, 1, 500_000))
    value = _written(draft)
    room = size - len(value)
    match rng.randrange(6):
        case 0:
            value = b" " * room + value
        case 1:
            value += b"\n" * room
        case 2:
            value = value[: value.rfind(b"}")] + b',"pad":"' + b"x" * (room - 9) + b'"' + value[value.rfind(b"}") :]
        case 3:
            pad = "💡".encode() * ((room - 9) // 4) + b"x" * ((room - 9) % 4)
            value = value[: value.rfind(b"}")] + b',"pad":"' + pad + b'"' + value[value.rfind(b"}") :]
        case 4:  # a known field of that length
            pad = b',"surface":"' + b"x" * (room - 13) + b'"'
            value = value[: value.rfind(b"}")] + pad + value[value.rfind(b"}") :]
        case 5:
            value = _pick(rng, (b"x", b"[", b"\xff", b"{", b"1")) * size
    return draft.key, value
