"""A headless Chromium, driven over its own debugging protocol: real time, phone widths and dark mode as it has them.

No driver is installed for it: the protocol is JSON over a WebSocket, which aiohttp (Faust brings it) speaks.
"""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.system import wait_for

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Tab:
    """One page. Every call is answered before it returns."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)
        self.errors: list[str] = []  # what the page's console and its exceptions said
        self._session, self._socket = self._loop.run_until_complete(self._open(url))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    async def _open(self, url: str) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
        session = aiohttp.ClientSession()
        return session, await session.ws_connect(url, max_msg_size=0)

    def close(self) -> None:
        async def close() -> None:
            await self._socket.close()
            await self._session.close()

        self._loop.run_until_complete(close())
        self._loop.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, params), 20))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            said = json.loads((await self._socket.receive()).data)
            if said.get("id") == number:
                assert "error" not in said, said
                result: dict[str, Any] = said["result"]
                return result
            if said.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(said["params"]["exceptionDetails"])[:600])
            elif said.get("method") == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.errors.append(json.dumps(said["params"]["entry"])[:600])

    def go(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call(
            "Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}]
        )
        self.call("Page.navigate", url=url)
        wait_for("the page", lambda: self.js("document.readyState === 'complete'"), 10)

    def js(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({json.dumps(selector)}).textContent")).replace("\u00a0", " ")

    def shot(self, path: Path) -> None:
        """The whole page, as long as it is."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def chromium(directory: Path) -> Iterator[Tab]:
    """A browser with one empty tab; skips the test where none is installed."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip("no Chromium: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    flags += ["--remote-debugging-port=0", f"--user-data-dir={directory}", "--remote-allow-origins=*", "about:blank"]
    log = (directory / "chromium.log").open("wb")
    process = subprocess.Popen([binary, *flags], stdout=log, stderr=subprocess.STDOUT)
    try:
        port_file = directory / "DevToolsActivePort"
        wait_for("Chromium", lambda: port_file.exists() and port_file.read_text().count("\n") >= 1, 30)
        tab = Tab(_target(int(port_file.read_text().split()[0])))
        try:
            yield tab
        finally:
            tab.close()
    finally:
        process.terminate()
        process.wait(10)
        log.close()


def _target(port: int) -> str:
    """The debugging address of the one tab."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
        pages = [page for page in json.load(answer) if page["type"] == "page"]
    return str(pages[0]["webSocketDebuggerUrl"])
