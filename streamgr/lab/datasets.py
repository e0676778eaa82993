"""Logs as events: CSV or JSON lines (.gz too), one mapping of columns to the contract's fields a log.

    deskdrop   ts_ms,user,item,event,session,country,region: one action a row, of the kind it names; no impressions
    ebnerd     ts_ms,user,item,event,imp,pos,session: one list (request) is `imp`; a clicked item stands only as its
               click row, so that row gives an impression and a click at the same time
    globo      ts_ms,user,item,session,…: one click a row; env, device, os, country, region, referrer as features
    movielens  ts_ms,user,item,rating: a rating of 4 and more is a like, a lower one a click (chosen, not liked)
    events     our own fields, as `topics/schemas/event.json` has them

Without a name the header decides. `--column FIELD=COLUMN` maps other files: FIELD is a field of the event,
`features.NAME`, or `event_time_s` for seconds; a COLUMN that starts with `=` is a constant (`type==click`). A row
without an id gets `<name>-<row number>`, so that publishing a file again changes nothing. Every row passes the same
rule book as every record (`decoder.Decoder`); one that breaks it is an error naming file and line, or is counted.
"""

import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from streamgr import events
from streamgr.decoder import Decoder
from streamgr.errors import DataError, UsageError
from streamgr.events import BadRecord, Event, Heartbeat, Record

Json = dict[str, Any]
FIELDS = ("type", "event_id", "user_id", "item_id", "event_time", "request_id", "surface", "position")
MAX_KINDS = 30  # as many as `sequence.actions` can hold
MAX_LINE = events.MAX_VALUE_BYTES + (64 << 10)
INTEGER = re.compile(r"-?\d{1,19}", re.ASCII)


class Row(NamedTuple):
    """One event of a file. `key` is None for a heartbeat; `value` is what is published."""

    number: int  # of the file's row, from 1, header not counted
    event: Event | Heartbeat
    key: bytes | None
    value: bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """How the columns of a log become events.

    columns: field → column, or `=constant`. header: the columns by which the log is known. expand: one row's fields
    (and the row itself) to the events it stands for.
    """

    name: str
    columns: Mapping[str, str]
    header: frozenset[str] = frozenset()
    expand: Callable[[Json, Mapping[str, Any]], list[Json]] = field(default=lambda fields, row: [fields])


def _implied_impression(fields: Json, row: Mapping[str, Any]) -> list[Json]:
    if fields.get("type") != "click":
        return [fields]
    return [fields | {"type": "impression", "event_id": f"{fields['event_id']}-impression"}, fields]


def _liked(fields: Json, row: Mapping[str, Any]) -> list[Json]:
    try:
        return [fields | {"type": "like" if float(row.get("rating", "")) >= 4 else "click"}]
    except (ValueError, TypeError):
        raise _BadRow(f"wrong_type: `rating` must be a number, not {str(row.get('rating'))[:40]!r}") from None


def _named(name: str, columns: str, expand: Any = None, /, **extra: str) -> Layout:
    header = columns.split(",")
    base = {"event_time": "ts_ms", "user_id": "user", "item_id": "item"} | extra
    layout = Layout(name, base, frozenset(header))
    return layout if expand is None else Layout(name, base, frozenset(header), expand)


def _features(*names: str) -> dict[str, str]:
    return {f"features.{name}": name for name in names}


LAYOUTS = {
    layout.name: layout
    for layout in (
        _named(
            "deskdrop",
            "ts_ms,user,item,event,session,country,region",
            type="event",
            **_features("country", "region"),
        ),
        _named(
            "ebnerd",
            "ts_ms,user,item,event,imp,pos,session",
            _implied_impression,
            type="event",
            request_id="imp",
            position="pos",
        ),
        _named(
            "globo",
            "ts_ms,user,item,session,session_size,env,device,os,country,region,referrer",
            type="=click",
            **_features("env", "device", "os", "country", "region", "referrer"),
        ),
        _named("movielens", "ts_ms,user,item,rating", _liked),
        Layout("events", {name: name for name in FIELDS}, frozenset({"type", "user_id", "event_time"})),
    )
}


class _BadRow(Exception):
    """A row that breaks a rule: `reason: detail`."""


class Dataset:
    """The events of one file, in its order; `rows` may be called again. `kinds` and `skipped` fill as rows are read."""

    def __init__(
        self, path: Path, mapping: str = "", columns: Mapping[str, str] | None = None, *, skip_bad_rows: bool = False
    ) -> None:
        """Opens the file to learn its format. `UsageError`: unknown mapping or column; `DataError`: no rows."""
        self.path, self.skip_bad_rows = path, skip_bad_rows
        self.skipped: Counter[str] = Counter()
        self.kinds: list[str] = []  # action kinds in order of appearance
        self.size_bytes, self.read_bytes = _size(path), 0
        with _opened(path) as (_, lines):
            first = next((line for line in lines if line.strip()), b"")
        if not first:
            raise DataError("the file is empty", where=str(path), remedy="name a file with rows")
        self._json = first.lstrip().startswith(b"{")
        self._delimiter = "\t" if first.count(b"\t") > first.count(b",") else ","
        self.layout = _layout(mapping, columns or {}, self._header(first), path, fixed=not self._json)
        stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
        self.name = stem if self.layout.name in ("events", "columns") else self.layout.name
        self._decoder = Decoder([], 0)

    def rows(self) -> Iterator[Row]:
        """Every event of the file. Raises `DataError` on the first bad row unless bad rows are skipped."""
        self.skipped.clear()
        for number, (line, row) in enumerate(self._raw_rows(), 1):
            try:
                yield from self._events(number, row)
            except _BadRow as bad:
                reason = str(bad)
                if not self.skip_bad_rows:
                    raise DataError(
                        reason,
                        where=f"{self.path}:{line}",
                        remedy="correct the row, map its columns (--column), or pass --skip-bad-rows",
                    ) from None
                self.skipped[reason.split(":", 1)[0]] += 1

    def _events(self, number: int, row: "Json | bytes | str") -> list[Row]:
        if isinstance(row, str):
            raise _BadRow(row)
        if isinstance(row, bytes):
            given = _object(row)
            if self.layout.name == "events" and given.get("event_id") is not None:
                return [self._checked(number, given, row)]
        else:
            given = row
        fields = given if isinstance(row, bytes) and self.layout.name == "events" else self._fields(given)
        if fields.get("event_id") is None and fields.get("type") != "heartbeat":
            fields["event_id"] = f"{self.name}-{number}"
        return [self._checked(number, f, _encode(f)) for f in self.layout.expand(fields, given)]

    def _fields(self, row: Mapping[str, Any]) -> Json:
        """The row's columns as fields of an event; empty cells are absent."""
        fields: Json = {}
        for name, column in self.layout.columns.items():
            value = column[1:] if column.startswith("=") else row.get(column)
            if value is None or value == "":
                continue
            if isinstance(value, str) and (name in ("event_time", "position")) and INTEGER.fullmatch(value):
                value = int(value)
            if name == "event_time_s":
                name, value = "event_time", _milliseconds(value)
            if name.startswith("features."):
                fields.setdefault("features", {})[name.removeprefix("features.")] = value
            else:
                fields[name] = value
        return fields

    def _checked(self, number: int, fields: Json, value: bytes) -> Row:
        kind = fields.get("type")
        if isinstance(kind, str) and kind not in self.kinds and kind not in ("impression", "profile", "heartbeat"):
            if len(self.kinds) == MAX_KINDS:
                raise _BadRow(f"unknown_type: {kind[:80]!r} is one action kind more than the {MAX_KINDS} there can be")
            self.kinds.append(kind)
            self._decoder = Decoder(self.kinds, 0)
        user = fields.get("user_id")
        key = None if kind == "heartbeat" else str(user).encode(errors="replace")
        outcome = self._decoder.explain(Record(str(self.path), 0, number, key, value, events.INT64_MAX))
        if isinstance(outcome, BadRecord):
            raise _BadRow(f"{outcome.reason}: {outcome.detail}")
        if not isinstance(outcome, Event | Heartbeat):
            raise _BadRow("missing_field: the row holds no event")
        return Row(number, outcome, key, value)

    def _header(self, first: bytes) -> frozenset[str]:
        if self._json:
            try:
                return frozenset(_object(first))
            except _BadRow:
                return frozenset()  # the row itself will say what is wrong with it
        return frozenset(next(csv.reader([first.decode(errors="replace")], delimiter=self._delimiter)))

    def _raw_rows(self) -> Iterator[tuple[int, "Json | bytes | str"]]:
        """(line number, row): a CSV row as a dict, a JSON line as its bytes, or a text that says why it is neither."""
        with _opened(self.path) as (file, lines):
            if self._json:
                for number, line in enumerate(lines, 1):
                    self.read_bytes = file.tell()
                    if len(line) > MAX_LINE:
                        yield number, f"too_large: a line of more than {MAX_LINE} bytes"
                    elif line.strip():
                        yield number, line.strip()
                return
            # a byte that is not UTF-8 must not end the file: it becomes half a surrogate, which the row check refuses
            text = (line.decode(errors="surrogateescape") for line in lines)
            reader = csv.reader(text, delimiter=self._delimiter, strict=True)
            header = next(reader)
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield reader.line_num, f"invalid_csv: {error}"
                    continue
                self.read_bytes = file.tell()
                if len(cells) == len(header):
                    yield reader.line_num, dict(zip(header, cells, strict=True))
                elif cells:
                    yield reader.line_num, f"invalid_csv: {len(cells)} cells under a header of {len(header)}"


class _opened:
    """The file and its lines; turns what reading can raise into `DataError`. Lines over `MAX_LINE` bytes come cut."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[IO[bytes], Iterator[bytes]]:
        try:
            self._file = self._path.open("rb")
        except OSError as error:
            raise UsageError(f"cannot read the file: {error.strerror}", where=str(self._path)) from None
        return self._file, self._lines()

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _lines(self) -> Iterator[bytes]:
        gz = self._file.read(2) == b"\x1f\x8b"
        self._file.seek(0)
        file: IO[bytes] = gzip.GzipFile(fileobj=self._file) if gz else self._file  # type: ignore[assignment]
        number = 0
        try:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                rest = line
                while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE + 1)
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"the file breaks off: {error}", where=f"{self._path}:{number + 1}", remedy="fetch the file again"
            ) from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UsageError(f"cannot read the file: {error.strerror}", where=str(path)) from None


def _layout(mapping: str, columns: Mapping[str, str], header: frozenset[str], path: Path, *, fixed: bool) -> Layout:
    """The named, own, or recognised layout. `fixed`: every row has these columns (CSV), so they can be held to it."""
    if mapping and mapping not in LAYOUTS:
        raise UsageError(f"unknown mapping {mapping!r}", remedy=f"one of {', '.join(LAYOUTS)}, or --column")
    for name, column in columns.items():
        if name not in FIELDS and name != "event_time_s" and not name.startswith("features."):
            raise UsageError(
                f"--column: {name!r} is no field of an event",
                remedy=f"one of {', '.join(FIELDS)}, event_time_s, features.NAME",
            )
        if fixed and not column.startswith("=") and column not in header:
            raise UsageError(
                f"--column: no column {column!r}", where=str(path), remedy=f"one of {', '.join(sorted(header))}"
            )
    if columns and not mapping:
        return Layout("columns", {name: name for name in FIELDS if name in header or not fixed} | dict(columns))
    layout = LAYOUTS[mapping] if mapping else _recognised(header, path, fixed=fixed)
    replaced = {layout.columns.get(name) for name in columns}
    absent = (layout.header & set(layout.columns.values())) - header - replaced
    if fixed and absent:
        raise DataError(
            f"no column {', '.join(sorted(absent))}",
            where=str(path),
            remedy=f"{layout.name!r} has {', '.join(sorted(layout.header))}; choose another mapping",
        )
    return layout if not columns else Layout(layout.name, {**layout.columns, **columns}, layout.header, layout.expand)


def _recognised(header: frozenset[str], path: Path, *, fixed: bool) -> Layout:
    """The layout with the most columns that are all there; JSON lines of no known log are taken as our own events."""
    known = [layout for layout in LAYOUTS.values() if layout.header <= header]
    if known:
        return max(known, key=lambda layout: len(layout.header))
    if not fixed:
        return LAYOUTS["events"]
    raise UsageError(
        f"no known log has the columns {', '.join(sorted(header))}",
        where=str(path),
        remedy=f"name a mapping ({', '.join(LAYOUTS)}) or map columns: --column user_id=COLUMN …",
    )


def _object(line: bytes) -> Json:
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _BadRow(f"invalid_json: {error}") from None
    if not isinstance(value, dict):
        raise _BadRow("not_an_object: the line must be one JSON object")
    return value


def _encode(fields: Json) -> bytes:
    try:
        return msgspec.json.encode(fields)
    except UnicodeEncodeError:
        raise _BadRow("invalid_utf8: the row is not UTF-8 text") from None


def _milliseconds(seconds: Any) -> Any:
    """Seconds to ms; what is no number stays as it is, for the rule book to refuse."""
    try:
        return int(float(seconds) * 1000)
    except (ValueError, TypeError, OverflowError):
        return seconds
