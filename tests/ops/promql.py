"""As much of PromQL as it takes to see which metrics and labels an expression names. Whether it is well formed is
promtool's to say.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

TOKEN = re.compile(
    r"""(?P<space>\s+)
    | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    | (?P<number>\d+(?:ms|[smhdwy])(?:\d+(?:ms|[smhdwy]))* | \d*\.?\d+(?:[eE][+-]?\d+)?)
    | (?P<name>[A-Za-z_$][\w:]*)
    | (?P<sign>=~|!~|[!=<>]=|[-+*/%^<>=(){}\[\],:@])""",
    re.VERBOSE,
)
GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
AGGREGATIONS = {"sum", "min", "max", "avg", "count", "topk", "bottomk", "quantile", "group", "stddev", "stdvar"}


@dataclass(frozen=True)
class Selector:
    """A metric's name as it is written, and its matchers: label, operator, value."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Named:
    """What an expression names. grouped: in `by`, `on` and their like; made: by `label_replace`."""

    selectors: tuple[Selector, ...]
    grouped: frozenset[str]
    made: frozenset[str]


def read(expression: str) -> Named:
    """Raises `ValueError` where this is no PromQL that we know."""
    tokens = list(_tokens(expression))
    selectors: list[Selector] = []
    grouped, made = set[str](), set[str]()
    i = 0
    while i < len(tokens):
        (kind, text), following = tokens[i], tokens[i + 1][1] if i + 1 < len(tokens) else ""
        i += 1
        if kind == "sign" and text == "{":
            raise ValueError(f"a selector without a name: {expression}")
        if kind != "name":
            continue
        if text in GROUPINGS and following == "(":
            end = _closing(tokens, i)
            grouped |= {name for kind, name in tokens[i:end] if kind == "name"}
            i = end
        elif text == "label_replace":
            made.add(_second_argument(tokens, i))
        elif following == "(" or text in WORDS or (text in AGGREGATIONS and following in GROUPINGS):
            pass  # a function, an operator
        elif text.startswith("$"):
            pass  # a duration of Grafana's
        else:
            end = _closing(tokens, i) if following == "{" else i
            selectors.append(Selector(text, tuple(_matchers(tokens[i + 1 : end - 1]))))
            i = end
    return Named(tuple(selectors), frozenset(grouped), frozenset(made))


def _tokens(expression: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(expression):
        match = TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"not PromQL at {expression[at : at + 20]!r}: {expression}")
        at = match.end()
        if match.lastgroup != "space":
            assert match.lastgroup is not None
            yield match.lastgroup, match.group()


def _closing(tokens: list[tuple[str, str]], opening: int) -> int:
    """The place after the bracket that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(tokens)):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(tokens[i][1], 0)
        if depth == 0:
            return i + 1
    raise ValueError("a bracket is not closed")


def _second_argument(tokens: list[tuple[str, str]], opening: int) -> str:
    depth = 0
    for i in range(opening, _closing(tokens, opening)):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(tokens[i][1], 0)
        if depth == 1 and tokens[i][1] == ",":
            return tokens[i + 1][1].strip("\"'")
    raise ValueError("label_replace wants five arguments")


def _matchers(tokens: list[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    for i in range(0, len(tokens), 4):
        (_, label), (_, operator), (kind, value) = tokens[i : i + 3]
        if operator not in ("=", "!=", "=~", "!~") or kind != "string":
            raise ValueError(f"not a matcher: {label}{operator}{value}")
        yield label, operator, value[1:-1].encode().decode("unicode_escape")
