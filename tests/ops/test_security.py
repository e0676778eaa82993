"""Who may ask a scorer, over what, and what a connection may cost it: on the real server, over real sockets."""

import json
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from streamgr.cli import main
from streamgr.clock import ManualClock
from streamgr.config import Scorer, Telemetry, flatten, load
from streamgr.errors import ConfigError
from streamgr.kafka import topics
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.lab.feed import Ranker
from streamgr.serve import connection
from streamgr.serve.scorer import require_certificate
from streamgr.telemetry import Health, Probes
from tests.ops.certificates import Authority
from tests.serve.test_scorer import CLOCK, Running, configured, running

TOKEN = "a token of thirty-two characters"
ASK = b'{"user_id": "u", "candidates": ["a"]}'


@pytest.fixture
def serve(_mock: EmbeddedBroker, prefix: str, tmp_path: Path) -> Any:
    """A scorer with these settings on the mock broker, which has no weights."""

    @contextmanager
    def started(**keys: Any) -> Iterator[Running]:
        config = configured(_mock.bootstrap, prefix, tmp_path, **keys)
        topics.apply(config.kafka, topics.load_specs(topics.specs_path(), prefix))
        with running(config) as role:
            yield role

    return started


def asked(
    role: Running, path: str, *authorization: str, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """By hand: urllib would send a header once only."""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += (
        "".join(f"Authorization: {value}\r\n" for value in authorization) + f"Content-Length: {len(body or b'')}\r\n"
    )
    with socket.create_connection(("127.0.0.1", role.role.port), 10) as s:
        s.sendall(head.encode() + b"\r\n" + (body or b""))
        return answer(s)


def answer(s: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes until the end; (0, {}, b"") where nothing does."""
    data = b""
    while more := s.recv(65536):
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split(" ")[1]) if first else 0, headers, body


def whole(s: socket.socket) -> bytes:
    """One answer of `/livez` on a connection that stays open: head and body may come apart."""
    data = b""
    while not data.endswith(b"}"):
        more = s.recv(65536)
        if not more:
            break
        data += more
    return data


def ended(reason: str) -> float:
    return REGISTRY.get_sample_value("streamgr_http_connections_ended_total", {"reason": reason}) or 0.0


# --- the token ---


def test_everything_but_the_probes_wants_the_token(serve: Any) -> None:
    with serve(token=TOKEN) as role:
        assert asked(role, "/livez")[0] == 200
        assert asked(role, "/readyz")[0] == 503  # no weights: that it says so to anyone is what it is for
        for path, body in (
            ("/v1/rank", ASK), ("/v1/retrieve", b'{"user_id": "u"}'), ("/v1/users/u/sequence", None),
            ("/metrics", None), ("/docs", None), ("/openapi.json", None), ("/nothing", None),
            ("/livez/../metrics", None),
        ):  # fmt: skip
            status, headers, content = asked(role, path, body=body)
            assert (status, json.loads(content)) == (401, {"error": "unauthorized"}), path
            assert headers["www-authenticate"] == 'Bearer realm="streamgr"'
            assert asked(role, path, f"Bearer {TOKEN}", body=body)[0] in (200, 404, 503), path


@pytest.mark.parametrize(
    "given",
    [
        [""], ["Bearer"], ["Bearer "], [f"Bearer {TOKEN}x"], [f"Bearer {TOKEN[:-1]}"], [f"Basic {TOKEN}"], [TOKEN],
        [f"Bearer {TOKEN}", f"Bearer {TOKEN}x"], [f"Bearer {TOKEN}", f"Bearer {TOKEN}"], ["Bearer \xff"],
    ],
)  # fmt: skip
def test_what_is_not_the_token_is_refused(serve: Any, given: list[str]) -> None:
    with serve(token=TOKEN) as role:
        assert asked(role, "/v1/rank", *given, body=ASK)[0] == 401
        assert asked(role, "/v1/rank", f"bearer  {TOKEN}", body=ASK)[0] == 503  # a scheme has no case: no weights yet


def test_a_body_without_the_token_is_not_read(serve: Any) -> None:
    with serve(token=TOKEN) as role, socket.create_connection(("127.0.0.1", role.role.port), 10) as s:
        s.sendall(b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nConnection: close\r\n\r\n")
        assert answer(s)[0] == 401  # without one byte of it


def test_a_token_is_long_printable_and_masked(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\r\n")
    config, _ = load([], {"STREAMGR_SCORER__TOKEN_FILE": str(file)})
    assert config.scorer.token == TOKEN
    assert flatten(config)["scorer.token"] == "***"
    for bad in ("short", "x" * 15, "é" * 20, "a token with a\nline end"):
        with pytest.raises(ConfigError, match=r"`token` must be at least 16 printable") as caught:
            load([], {"STREAMGR_SCORER__TOKEN": bad})
        assert bad not in str(caught.value)


def test_our_own_clients_send_it(serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(token=TOKEN) as role:
        role.until("it follows", lambda: role.health.ready()[1].get("sequences") == "ok")
        url, file = f"http://127.0.0.1:{role.role.port}", tmp_path / "token"
        file.write_text(TOKEN + "\n")
        assert main(["sequences", "show", "u", "--url", url]) == 2
        assert "--token-file" in capsys.readouterr().err
        assert main(["sequences", "show", "u", "--url", url, "--token-file", str(tmp_path / "none")]) == 78
        assert main(["sequences", "show", "u", "--url", url, "--token-file", str(file)]) == 0
        assert json.loads(capsys.readouterr().out) == {"user_id": "u", "events": []}
        for token, source in (("", "refused"), (TOKEN, "no_weights")):
            ranker = Ranker(f"127.0.0.1:{role.role.port}", 5.0, CLOCK, token=token)
            assert ranker.ask("u", ["a"]).source == source
            ranker.close()


def test_documentation_can_be_left_out_and_there_is_nothing_else(serve: Any) -> None:
    with serve(docs=False) as role:
        for path in ("/docs", "/openapi.json", "/redoc", "/debug", "/"):
            assert asked(role, path)[0] == 404
        status, headers, _ = asked(role, "/livez")
        assert status == 200 and "server" not in headers  # what it runs on is nobody's business


# --- TLS ---


def test_over_tls_and_only_over_tls(serve: Any, tmp_path: Path) -> None:
    authority = Authority.made(tmp_path)
    certificate, key = authority.certify("scorer")
    with serve(tls_certificate=str(certificate), tls_key=str(key), token=TOKEN) as role:
        trusting = ssl.create_default_context(cafile=str(authority.ca))
        url = f"https://127.0.0.1:{role.role.port}/livez"
        with urllib.request.urlopen(url, timeout=10, context=trusting) as told:
            assert told.status == 200
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            urllib.request.urlopen(url, timeout=10, context=ssl.create_default_context())
        old = ssl.create_default_context(cafile=str(authority.ca))
        with pytest.warns(DeprecationWarning):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=10, context=old)
        with socket.create_connection(("127.0.0.1", role.role.port), 10) as s:
            s.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            with suppress(ConnectionResetError):
                assert answer(s)[0] == 0
        ranker = Ranker(f"127.0.0.1:{role.role.port}", 5.0, CLOCK, token=TOKEN, certificate=str(authority.ca))
        assert ranker.ask("u", ["a"]).source == "no_weights"
        ranker.close()


def test_a_certificate_that_cannot_be_used_is_named_before_anything_starts(tmp_path: Path) -> None:
    authority = Authority.made(tmp_path)
    (certificate, key), (_, other) = authority.certify("a"), authority.certify("b")
    require_certificate(Scorer(tls_certificate=str(certificate), tls_key=str(key)))
    for wrong in (tmp_path / "none.pem", other, certificate):
        with pytest.raises(ConfigError, match=r"scorer\.tls_certificate=.*remedy"):
            require_certificate(Scorer(tls_certificate=str(certificate), tls_key=str(wrong)))
    with pytest.raises(ConfigError, match="go together"):
        load([], {"STREAMGR_SCORER__TLS_CERTIFICATE": str(certificate)})


# --- what a connection may cost ---


def test_a_head_that_does_not_come_is_not_waited_for(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    before = ended("slow_head")
    with serve() as role:
        address = ("127.0.0.1", role.role.port)
        silent, dribbling = socket.create_connection(address, 10), socket.create_connection(address, 10)
        started = time.monotonic()
        with silent, dribbling:
            for byte in b"GET /livez HTTP/1.1\r\nX-Slow: ":
                try:
                    dribbling.sendall(bytes([byte]))
                except OSError:
                    break
                assert asked(role, "/livez")[0] == 200  # others are served meanwhile
                threading.Event().wait(0.1)
            else:
                raise AssertionError("its head took longer than it may, and it was listened to")
            with suppress(ConnectionResetError):
                assert silent.recv(1) == b""
        assert time.monotonic() - started < 5
    assert ended("slow_head") == before + 2


def test_an_answer_that_is_not_read_does_not_hold_its_connection(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "EXCHANGE_SECONDS", 0.5)
    with serve() as role, socket.create_connection(("127.0.0.1", role.role.port), 10) as s:
        s.sendall(b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        with suppress(ConnectionResetError):
            assert s.recv(1) == b""
    assert ended("slow_exchange") >= 1


def test_there_are_never_more_connections_than_allowed(serve: Any) -> None:
    before = ended("full")
    with serve(max_connections=3) as role:
        address = ("127.0.0.1", role.role.port)
        held = [socket.create_connection(address, 10) for _ in range(3)]
        for s in held:
            s.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert whole(s).startswith(b"HTTP/1.1 200")
        with socket.create_connection(address, 10) as fourth:
            status, headers, body = answer(fourth)
        assert (status, headers["retry-after"], json.loads(body)) == (503, "1", {"error": "overload"})
        held[0].sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")  # those inside are served on
        assert whole(held[0]).startswith(b"HTTP/1.1 200")
        held.pop().close()
        role.until("there is a place again", lambda: asked(role, "/livez")[0] == 200)
        for s in held:
            s.close()
    assert ended("full") > before


def test_a_head_has_a_size(serve: Any) -> None:
    with serve() as role, socket.create_connection(("127.0.0.1", role.role.port), 10) as s:
        with suppress(ConnectionResetError):
            s.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 100_000)
            assert answer(s)[0] == 400
        assert asked(role, "/livez")[0] == 200


def test_probes_outlive_clients_that_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probes, "SECONDS", 0.5)
    probes = Probes(Telemetry(port=0), Health("probed", ManualClock()))
    held = [socket.create_connection(("127.0.0.1", probes.port), 10) for _ in range(80)]
    try:
        end = time.monotonic() + 10
        while True:  # the silent ones are left after half a second
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{probes.port}/livez", timeout=5) as told:
                    assert told.status == 200
                break
            except (OSError, urllib.error.URLError):
                assert time.monotonic() < end
                threading.Event().wait(0.1)
        assert sum(thread.name.startswith("Thread") for thread in threading.enumerate()) <= 40
    finally:
        for s in held:
            s.close()
        probes.close()
