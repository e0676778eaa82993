"""The live page: its server by plain HTTP, and what people see of it in a headless Chromium."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamgr.clock import ManualClock, SystemClock
from streamgr.errors import ConfigError
from streamgr.monitor import board as boards
from streamgr.monitor import figures, readings
from streamgr.monitor import page as pages
from streamgr.monitor.board import Board
from streamgr.monitor.page import Page, assemble
from tests.monitor import kit
from tests.monitor.browser import Tab, chromium
from tests.system import wait_for

CLOCK = SystemClock()


class Site:
    """A page over a board that goes on living, as long as it is told to."""

    def __init__(self, board: Board) -> None:
        self.board, self.away, self.stopped = board, set[str](), False
        self._beats = 0
        self.page = Page("127.0.0.1", 0, CLOCK, self._snapshot)
        self.url = f"http://127.0.0.1:{self.page.port}"

    def _snapshot(self) -> dict[str, Any]:
        now, self._beats = CLOCK.now_ms(), self._beats + 1
        if "broker" not in self.away:
            self.board.heard(now)
        if not self.stopped:
            told = {"sequencer": kit.sequencer(5_000 + 100 * self._beats), "trainer": kit.trainer()}
            n = 200 + 10 * self._beats
            ages = {1.0: n // 2, 60.0: n, 120.0: n, float("inf"): n}
            told["scorer"] = kit.scorer(now - 1_500, version=50 + self._beats, ages=ages)
            for role, metrics in told.items():
                if role in self.away:
                    self.board.silent(role, "Connection refused", now)
                else:
                    self.board.answered(role, metrics, "", now)
        self.board.tick(now)
        return self.board.snapshot(now)


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site(kit.lived(CLOCK.now_ms()))
    made.page.start()
    yield made
    made.page.close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def get(url: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


# --- the server


def test_it_serves_one_file_that_asks_nobody_else_for_anything(site: Site) -> None:
    status, headers, body = get(site.url + "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"src=" not in body and b"/*script*/" not in body and b"@import" not in body
    assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]


def test_the_snapshot_is_json(site: Site) -> None:
    status, headers, body = get(site.url + "/api/state")
    assert status == 200 and headers["Content-Type"] == "application/json"
    state = json.loads(body)
    assert state["freshness"]["status"] == "fresh"
    assert "user" not in body.decode(), "no ids of users on the page"


def test_livez_and_what_there_is_not(site: Site) -> None:
    assert get(site.url + "/livez")[0] == 200
    assert get(site.url + "/debug")[0] == 404


def test_livez_fails_when_no_snapshot_is_made() -> None:
    clock, made = ManualClock(kit.T0), []

    def snapshot() -> dict[str, Any]:
        made.append(1)
        return {"n": 1 // (2 - len(made))}  # the second one is a bug

    broken = Page("127.0.0.1", 0, clock, snapshot)
    broken.start()
    try:
        assert get(f"http://127.0.0.1:{broken.port}/livez")[0] == 200
        wait_for("the failure", lambda: broken.failure, 5)
        assert isinstance(broken.failure, ZeroDivisionError)
        clock.advance(11)
        assert get(f"http://127.0.0.1:{broken.port}/livez")[0] == 503
    finally:
        broken.close()


def test_a_taken_port_is_named(site: Site) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.port"):
        Page("127.0.0.1", site.page.port, CLOCK, dict)


def test_live_news_come_by_themselves_and_watchers_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_WATCHERS", 1)
    connection = http.client.HTTPConnection("127.0.0.1", site.page.port, timeout=5)
    connection.request("GET", "/api/live")
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"
    seen = []
    while len(seen) < 2:
        if (line := answer.readline()).startswith(b"data: "):
            seen.append(json.loads(line[6:])["now_ms"])
    assert seen[1] > seen[0]
    assert get(site.url + "/api/live")[0] == 503, "the second watcher polls"
    connection.close()
    answer.close()
    wait_for("the first to be let go", lambda: site.page._watchers == 0, 10)


# --- what people see


def test_it_shows_the_state(site: Site, tab: Tab) -> None:
    tab.go(site.url)
    wait_for("the numbers", lambda: tab.text("#age") == "1.5s", 10)
    assert tab.text("#status") == "fresh"
    assert tab.text("#share") == "100%"
    assert tab.text("#version").startswith("v5")
    assert [n.split("p50")[0].strip() for n in tab.text("#hops").split("\n")]
    assert "event to sequence" in tab.text("#hops") and "none lately" in tab.text("#hops")
    assert "bad_time" in tab.text("#reasons") and "<script>" not in tab.text("#reasons")
    assert tab.js("document.querySelectorAll('.versions i').length") == 50
    assert tab.js("document.querySelectorAll('.versions i.snapshot').length") == 5
    assert tab.js("document.querySelectorAll('#age-line path.stroke').length") == 1
    assert "v30–31" in tab.text("#online")
    assert tab.text("#vocabulary").startswith("admitted120")
    assert "by the weights, after2.4 s" in tab.text("#canary") and "none lost" in tab.text("#canary-lost")
    assert tab.js("document.getElementById('away').hidden") is True
    assert tab.errors == []


def test_news_arrive_without_a_reload(site: Site, tab: Tab) -> None:
    tab.go(site.url)
    wait_for("the first version", lambda: tab.text("#version") != "–", 10)
    first = tab.text("#version")
    wait_for("a later one", lambda: tab.text("#version") not in (first, "–"), 5)
    assert site.page._watchers >= 1, "by server-sent events"


def test_without_events_it_polls(site: Site, tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_WATCHERS", 0)
    tab.go(site.url)
    wait_for("the first version", lambda: tab.text("#version") != "–", 10)
    first = tab.text("#version")
    wait_for("a later one", lambda: tab.text("#version") not in (first, "–"), 8)
    assert site.page._watchers == 0
    tab.errors.clear()  # the console names the refusal


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(site: Site, tab: Tab, dark: bool, tmp_path: Path) -> None:
    site.board.restore("quality", "123456789/click/0", CLOCK.now_ms(), [900, 300, 280.0, 500.0, [[0, 600, 300]]])
    tab.go(site.url, width=375, height=760, dark=dark)
    wait_for("the numbers", lambda: tab.text("#age") == "1.5s", 10)
    assert tab.js("document.documentElement.scrollWidth") <= 375, "it scrolls sideways"
    wide = "e.getBoundingClientRect().right > 376 && !e.closest('.scroll')"
    assert tab.js(f"[...document.querySelectorAll('body *')].filter(e => {wide}).length") == 0
    assert tab.js("getComputedStyle(document.querySelector('main')).gridTemplateColumns.split(' ').length") == 1


def test_dark_mode_is_dark_and_readable(site: Site, tab: Tab) -> None:
    seen = {}
    for dark in (False, True):
        tab.go(site.url, dark=dark)
        wait_for("the numbers", lambda: tab.text("#age") == "1.5s", 10)
        seen[dark] = tab.js(CONTRAST)
    assert seen[True]["ground"] < 0.05 < 0.8 < seen[False]["ground"]
    for dark, found in seen.items():
        assert min(found["ratios"].values()) >= 4.5, f"hard to read, dark={dark}: {found['ratios']}"


def test_a_role_that_is_away_is_named_and_its_figures_are_grey(
    site: Site, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boards, "AWAY_SECONDS", 2.0)
    monkeypatch.setattr(readings, "AWAY_SECONDS", 2.0)
    monkeypatch.setattr(figures, "AWAY_SECONDS", 2.0)
    tab.go(site.url)
    wait_for("the numbers", lambda: tab.text("#age") == "1.5s", 10)
    site.away.add("trainer")
    wait_for("the banner", lambda: "trainer: no answer for" in tab.text("#away"), 12)
    assert tab.js("document.getElementById('away').hidden") is False
    assert "(Connection refused)" in tab.text("#sources")
    wait_for("grey", lambda: tab.js("document.querySelector('[data-group=vocabulary]').classList.contains('old')"), 3)
    assert "as of" in tab.text("[data-group=vocabulary]")
    assert tab.text("#status") == "fresh", "the scorer answers"
    site.away |= {"scorer", "broker"}
    wait_for("not known", lambda: tab.text("#status") == "freshness not known", 12)
    wait_for("grey", lambda: "as of" in tab.text("[data-group=letters]"), 3)
    site.away.clear()
    wait_for("all well again", lambda: tab.js("document.getElementById('away').hidden"), 5)
    assert tab.text("#status") == "fresh"
    assert "as of" not in tab.text("[data-group=vocabulary]")


def test_a_monitor_that_is_gone_is_said_and_nothing_looks_fresh(tab: Tab) -> None:
    made = Site(kit.lived(CLOCK.now_ms()))
    made.page.start()
    tab.go(made.url)
    wait_for("the numbers", lambda: tab.text("#age") == "1.5s", 10)
    made.page.close()
    wait_for("the banner", lambda: "no news from the monitor for" in tab.text("#away"), 12)
    assert tab.text("#status") == "freshness not known"
    wait_for("grey", lambda: tab.js("document.querySelectorAll('#hero .old').length") == 4, 6)
    tab.errors.clear()


def test_the_page_is_put_together_once_and_whole() -> None:
    html, policy = assemble()
    assert html.count(b"<style>") == html.count(b"<script>") == 1
    assert policy.count("'sha256-") == 2


CONTRAST = """(() => {
  const channel = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const light = (css) => {
    const [r, g, b] = css.match(/[0-9.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const ratios = {};
  const looked = ["#age", "#age-note", "#status", "h2", "small", "#vocabulary dt", "#vocabulary dd", "#canary td",
    "footer a", "#sources .quiet", "#online td", "#online th"];
  for (const css of looked) {
    const e = document.querySelector(css), a = light(getComputedStyle(e).color), b = light(behind(e));
    ratios[css] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return { ground: light(getComputedStyle(document.body).backgroundColor), ratios };
})()"""
