"""Logs as events: the ready-made mappings, own columns, and what a bad row says."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from streamgr.errors import DataError, UsageError
from streamgr.events import FIRST_ACTION, IMPRESSION, Event, Heartbeat
from streamgr.lab.datasets import Dataset, Row


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, mapping: str = "", **options: Any) -> list[Row]:
    return list(Dataset(path, mapping, **options).rows())


def published(row: Row) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(row.value)
    return value


def test_deskdrop_by_its_header(tmp_path: Path) -> None:
    log = "ts_ms,user,item,event,session,country,region\n"
    log += "1457963676000,-38,80,click,-8,BR,SP\n1457964607000,69,80,bookmark,1,,\n"
    dataset = Dataset(write(tmp_path / "events.csv.gz", log))
    first, second = dataset.rows()
    assert dataset.layout.name == "deskdrop"
    assert published(first) == {
        "type": "click", "event_id": "deskdrop-1", "user_id": "-38", "item_id": "80", "event_time": 1457963676000,
        "features": {"country": "BR", "region": "SP"},
    }  # fmt: skip
    assert (first.key, second.key) == (b"-38", b"69")
    assert "features" not in published(second)
    assert dataset.kinds == ["click", "bookmark"]
    assert dataset.read_bytes == dataset.size_bytes


def test_an_ebnerd_click_is_also_the_impression_it_answers(tmp_path: Path) -> None:
    log = "ts_ms,user,item,event,imp,pos,session\n"
    log += "1677138340000,1,5,click,9773,0,2\n1677138340000,1,6,impression,9773,1,2\n"
    rows = [r.event for r in read(write(tmp_path / "x.csv", log))]
    same: dict[str, Any] = {"user": "1", "time": 1677138340000, "request": "9773"}
    assert rows == [
        Event(IMPRESSION, item="5", event_id="ebnerd-1-impression", position=0, **same),
        Event(FIRST_ACTION, item="5", event_id="ebnerd-1", position=0, **same),
        Event(IMPRESSION, item="6", event_id="ebnerd-2", position=1, **same),
    ]


def test_globo_and_movielens(tmp_path: Path) -> None:
    globo = "ts_ms,user,item,session,session_size,env,device,os,country,region,referrer\n1,62,2,3,2,4,1,17,1,21,1\n"
    (row,) = read(write(tmp_path / "g.csv", globo))
    assert published(row)["type"] == "click"
    assert published(row)["features"] == {
        "env": "4", "device": "1", "os": "17", "country": "1", "region": "21", "referrer": "1"
    }  # fmt: skip
    movielens = "ts_ms,user,item,rating\n1,2,3,3.5\n1,2,4,4\n"
    dataset = Dataset(write(tmp_path / "m.csv", movielens))
    assert [published(r)["type"] for r in dataset.rows()] == ["click", "like"]
    with pytest.raises(DataError, match=r"m\.csv:2: wrong_type: `rating` must be a number, not 'good'"):
        read(write(tmp_path / "m.csv", "ts_ms,user,item,rating\n1,2,3,good\n"))


def test_our_own_lines_go_out_as_they_are_and_get_an_id_where_they_have_none(tmp_path: Path) -> None:
    full = b'{"type": "click",  "event_id": "e", "user_id": 7, "item_id": "i", "more": [1],'
    full += b' "event_time": "2023-11-14T22:13:20Z"}'
    rows = read(
        write(
            tmp_path / "my.log.jsonl",
            full + b'\n\n{"type":"profile","user_id":7,"event_time":5}\n{"type":"heartbeat","event_time":6}\n',
        )
    )
    assert rows[0].value == full
    assert (rows[0].key, rows[0].event.time) == (b"7", 1_700_000_000_000)
    assert published(rows[1])["event_id"] == "my.log-2"
    assert (rows[2].key, rows[2].event) == (None, Heartbeat(6))


def test_own_columns_constants_seconds_and_features(tmp_path: Path) -> None:
    log = write(tmp_path / "shop.tsv", "who\twhat\twhen\tplace\nann\tshoe\t1700000000.25\tde\n")
    columns = {
        "user_id": "who", "item_id": "what", "event_time_s": "when", "type": "=like", "features.country": "place"
    }  # fmt: skip
    (row,) = read(log, columns=columns)
    assert published(row) == {
        "type": "like", "event_id": "shop-1", "user_id": "ann", "item_id": "shoe", "event_time": 1700000000250,
        "features": {"country": "de"},
    }  # fmt: skip
    lines = write(tmp_path / "shop.jsonl", '{"who": 5, "what": 6, "when": 7, "type": "click"}\n')
    (row,) = read(lines, columns={"user_id": "who", "item_id": "what", "event_time": "when"})
    assert (published(row)["user_id"], row.key, row.event.time) == (5, b"5", 7)


def test_the_first_of_our_own_lines_need_not_be_a_full_event(tmp_path: Path) -> None:
    good = '{"type":"click","user_id":"u","item_id":"i","event_time":5}\n'
    (beat, click) = read(write(tmp_path / "log.jsonl", '{"type":"heartbeat","event_time":4}\n' + good))
    assert (beat.event, click.key) == (Heartbeat(4), b"u")
    for first in ('{"user_id":"u"}\n', "{\n"):
        dataset = Dataset(write(tmp_path / "log.jsonl", first + good), skip_bad_rows=True)
        assert [row.number for row in dataset.rows()] == [2]


def test_a_column_of_a_ready_made_mapping_can_be_replaced(tmp_path: Path) -> None:
    log = write(tmp_path / "x.csv", "ts_ms,person,item,rating\n1,2,3,5\n")
    (row,) = read(log, "movielens", columns={"user_id": "person"})
    assert published(row)["type"] == "like"


HEADER = "type,event_id,user_id,item_id,event_time\n"
BAD_ROWS = [
    ("click,e,u,i,soon", "bad_time", "event_time"),
    ("click,e,u,,5", "missing_field", "item_id"),
    ("click,e,u,i,-5", "out_of_range", "event_time"),
    ("click,e," + "x" * 257 + ",i,5", "out_of_range", "user_id"),
    ("click,e,u,i", "invalid_csv", "4 cells under a header of 5"),
    ('click,e,u,"i"x,5', "invalid_csv", "expected after"),
    (b"click,e,u,\xff,5", "invalid_utf8", "UTF-8"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_ROWS)
def test_a_bad_row_names_its_line_field_and_remedy_or_is_counted(
    tmp_path: Path, line: str | bytes, reason: str, detail: str
) -> None:
    good = "click,g,u,i,5\n"
    raw = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "log.csv", (HEADER + good).encode() + raw + b"\n" + good.encode())
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: {reason}: ")
    assert detail in caught.value.what
    assert "--skip-bad-rows" in caught.value.remedy
    dataset = Dataset(path, skip_bad_rows=True)
    assert [r.number for r in dataset.rows()] == [1, 3]
    assert dataset.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"{", "invalid_json"), (b"[1]", "not_an_object"), (b'{"type":"click"}', "missing_field"),
     (b'{"x":"' + b"y" * 1_200_000 + b'"}', "too_large"), (b'{"x":"\xff"}', "invalid_json"),
     (b'{"type":1,"event_id":"e"}', "wrong_type")],
)  # fmt: skip
def test_a_bad_line_is_counted_and_the_rest_read(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"type":"click","user_id":"u","item_id":"i","event_time":5}\n'
    dataset = Dataset(write(tmp_path / "log.jsonl.gz", good + line + b"\n" + good), skip_bad_rows=True)
    assert [r.event.event_id for r in dataset.rows() if isinstance(r.event, Event)] == ["log-1", "log-3"]
    assert dataset.skipped == {reason: 1}


def test_more_kinds_than_there_can_be_are_refused(tmp_path: Path) -> None:
    lines = "".join(f"k{n},e{n},u,i,5\n" for n in range(31))
    with pytest.raises(DataError, match="unknown_type: 'k30'"):
        read(write(tmp_path / "log.csv", HEADER + lines))


def test_what_cannot_be_read_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Dataset(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="empty"):
        Dataset(write(tmp_path / "empty.csv.gz", "\n"))
    unknown = write(tmp_path / "x.csv", "a,b\n1,2\n")
    with pytest.raises(UsageError, match="--column user_id=COLUMN"):
        Dataset(unknown)
    with pytest.raises(UsageError, match="no column 'c'"):
        Dataset(unknown, columns={"user_id": "c"})
    with pytest.raises(UsageError, match="'usr' is no field"):
        Dataset(unknown, columns={"usr": "a"})
    with pytest.raises(UsageError, match="unknown mapping 'x'"):
        Dataset(unknown, "x")
    with pytest.raises(DataError, match="no column event, item, ts_ms, user; remedy"):
        Dataset(unknown, "ebnerd", columns={"request_id": "a", "position": "b"})
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress((HEADER + "click,e,u,i,5\n" * 1000).encode())[:-20])
    with pytest.raises(DataError, match="breaks off"):
        read(cut)
