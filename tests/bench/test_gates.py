"""The two gates run from end to end, go on where they were interrupted, and say what they found."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bench import ablations, offline, streaming
from tests.bench.kit import Json
from tests.bench.runs import Runs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_that_has_ended_is_not_run_again(tmp_path: Path) -> None:
    done: list[Json] = []
    interrupted: list[Json] = []

    def run(what: Json) -> Json:
        if what["seed"] == 2 and not interrupted:
            interrupted.append(what)
            raise KeyboardInterrupt
        done.append(what)
        return {"found": what["seed"] * 10}

    runs, wanted = Runs(tmp_path / "reports" / "x.jsonl"), [{"model": "m", "seed": seed} for seed in (0, 1, 2)]
    with pytest.raises(KeyboardInterrupt):
        runs.all(wanted, run)
    with (tmp_path / "reports" / "x.jsonl").open("a") as file:
        file.write('{"of": ["model"')  # cut off by a crash
    found = runs.all(wanted[1:], run)
    assert [line["found"] for line in found] == [10, 20] and [what["seed"] for what in done] == [0, 1, 2]
    assert [line["found"] for line in runs.all(wanted, run)] == [0, 10, 20] and len(done) == 3


def test_the_offline_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    (tmp_path / "ml-100k").mkdir()
    with gzip.open(tmp_path / "ml-100k" / "events.csv.gz", "wt") as file:
        file.write("ts_ms,user,item,rating\n")
        for user in range(40):
            for time, item in enumerate(np.cumsum(rng.integers(1, 3, 12)) + user):
                file.write(f"{time * 1000},{user},{item % 60},4\n")
    monkeypatch.setattr(sys, "argv", ["offline", "--data", str(tmp_path), "--quick", "--epochs", "2"])
    offline.main()
    told = json.loads(Path("reports/bench-quick-offline.json").read_text())["results"]["ml-100k"]
    assert {*told} == {"popularity", "sasrec", "hstu", "hstu, order only"}
    assert all(0 <= figures["hr_10"][0] <= figures["hr_50"][0] <= 1 for figures in told.values())
    written = Path("reports/quick-offline.jsonl").read_text()
    offline.main()
    assert Path("reports/quick-offline.jsonl").read_text() == written
    assert "hstu, order only" in capsys.readouterr().err


def test_the_streaming_gate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["streaming", "--quick", "--records", "120"])
    streaming.main()
    told = json.loads(Path("reports/bench-streaming.json").read_text())
    assert {*told["models"]} == {*streaming.MODELS}
    best = told["oracle"]["hr@10"]["mean"]
    assert all(0 < figures["late"]["hr@10"]["mean"] < best + 0.05 for figures in told["models"].values())
    assert Path("reports/bench-streaming.svg").read_text().count("<polyline") == 2 * (1 + len(streaming.MODELS))
    assert "oracle" in capsys.readouterr().err
    monkeypatch.setattr(
        sys, "argv", ["streaming", "--quick", "--records", "60", "--models", "sasrec", "--study", "rates"]
    )
    streaming.main()
    assert len(json.loads(Path("reports/bench-streaming-rates.json").read_text())["models"]) == len(streaming.GRID)


def test_the_ablations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["ablations", "--streams", "simulator", "--seeds", "1", "--seconds", "4", "--history", "32", "--dim", "8"]
    argv += ["--batch-tokens", "512"]
    monkeypatch.setattr(sys, "argv", argv)
    ablations.main()
    told = json.loads(Path("reports/bench-ablations.json").read_text())["streams"]["simulator"]
    assert {*told} == {*ablations.VARIANTS}
    assert "hr@10" not in told["ranking alone"] and "ne" not in told["retrieval alone"]
    assert told["both"]["length"] == told["both"]["speed"] == 1 < told["user token"]["length"]
    assert told["summed"]["length"] < 1
    assert "user token" in capsys.readouterr().err
