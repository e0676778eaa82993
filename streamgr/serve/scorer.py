"""The scorer's life: three loops side by side, and the main thread that watches over them.

    follower    events into sequences, so that an event changes the next answer
    weights     versions in, verified, swapped between two requests
    http        questions to answers, in a pool of `scorer.threads`

Live while every loop turns; ready once the sequences have caught up for the first time and a version is served. Later
the broker may be away and the answers age: they say so, and stale answers beat none. A loop that fails for good ends
the role with its error. On stop: readiness off, the requests at work finish, then sequences and Kafka are closed.
"""

import logging
import socket
import ssl
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import uvicorn

from streamgr.clock import Clock, Deadline
from streamgr.config import Config
from streamgr.config import Scorer as Settings
from streamgr.errors import BrokerUnreachable, ConfigError
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.producer import Producer
from streamgr.sequence.follower import Follower
from streamgr.sequence.views import Part
from streamgr.serve import wire
from streamgr.serve.connection import Connection
from streamgr.serve.http import Desk, NotReady, create_app
from streamgr.serve.model import LiveWeights, NoWeights
from streamgr.serve.ranker import Ranker
from streamgr.serve.samples import Samples
from streamgr.service import Stop
from streamgr.telemetry import Health, Log
from streamgr.weights.subscriber import Subscriber

DRAIN_SECONDS = 10.0
SWITCH_SECONDS = 0.001  # a request takes the GIL back some hundred times, each time perhaps from the follower
TURN_SECONDS = 0.25  # how long one turn of a loop waits for something to do


class Scorer:
    """The role. `run` returns after a drained stop and raises what made it impossible to go on."""

    def __init__(self, config: Config, clock: Clock, log: Log, health: Health, stop: Stop) -> None:
        self._config, self._clock, self._log, self._health, self._stop = config, clock, log, health, stop
        health.hold("accepting", "starting")
        health.hold("sequences", "waiting for the broker")
        health.hold("weights", "no version yet")
        self.port = 0  # the one listened on, once running
        self._follower = Follower(config, clock, log, role="scorer", stop=stop)
        self._opened = threading.Event()
        self._weights = LiveWeights(config.sequence.actions, clock, log, config.scorer)
        self._ranker = Ranker(config, clock, self._weights, self._follower)
        self._samples: Samples | None = None
        self._turned: dict[str, float] = {}  # loop: when it last turned
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Serve until told to stop."""
        torch.set_num_threads(1)  # requests are small; parallelism is `scorer.threads`
        sys.setswitchinterval(SWITCH_SECONDS)
        require_certificate(self._config.scorer)
        listening = _listen(self._config)
        self.port = int(listening.getsockname()[1])
        if self._config.scorer.score_sample > 0:
            producer = Producer(self._config.kafka, client_id="streamgr-scorer", log=self._log)
            share = self._config.scorer.score_sample
            self._samples = Samples(producer, self._config.topic("scores"), share, self._clock, self._log)
        pool = ThreadPoolExecutor(self._config.scorer.threads, "score", initializer=partial(torch.set_num_threads, 1))
        server = self._server(pool)
        http = self._start("http", lambda: server.run(sockets=[listening]))
        loops = [self._start("follower", self._follow), self._start("weights", self._subscribe)]
        self._log.info("listening", host=self._config.scorer.host, port=self.port)
        self._watch()

        self._health.hold("accepting", "draining")
        deadline = Deadline(self._clock, DRAIN_SECONDS)
        server.should_exit = True
        for loop in (http, *loops):
            loop.join(deadline.remaining())
        pool.shutdown(wait=False, cancel_futures=True)
        if left := [loop.name for loop in (http, *loops) if loop.is_alive()]:
            self._log.warning("drain_incomplete", f"still at work after {DRAIN_SECONDS:.0f} s", loops=left)
        else:
            self._follower.close()  # only now: requests read it up to their last
        if self._samples:
            self._samples.close()
        listening.close()
        if self._failure:
            raise self._failure

    # --- the loops ---

    def _follow(self) -> None:
        self._follower.open()
        self._opened.set()
        while not self._stop:
            self._follower.step(TURN_SECONDS)
            self._turn("follower")

    def _subscribe(self) -> None:
        subscriber = Subscriber(self._config, self._clock, self._log, self._consumer)
        try:
            while not self._stop:
                stepped = self._weights.follow(subscriber, TURN_SECONDS)
                if self._weights.version is not None:
                    self._health.hold("weights")
                elif why_not := "the first version was refused: see the log" if stepped else subscriber.why_nothing:
                    self._health.hold("weights", why_not)
                self._turn("weights")
        finally:
            subscriber.close()

    def _watch(self) -> None:
        """The main thread: health from the loops' turns."""
        self._health.hold("accepting")
        behind = True
        while not self._stop.wait(TURN_SECONDS):
            if behind and self._opened.is_set():
                why_not = self._follower.why_not_ready()
                self._health.hold("sequences", why_not)
                behind = bool(why_not)
            now = self._clock.monotonic()
            if all(now - turned < Health.STALL_SECONDS for turned in list(self._turned.values())):
                self._health.turned()

    def _server(self, pool: ThreadPoolExecutor) -> uvicorn.Server:
        scorer = self._config.scorer
        app = create_app(
            rank=self._rank,
            retrieve=self._retrieve,
            sequence=self._sequence,
            desk=Desk(pool, scorer.threads, scorer.max_queue),
            health=self._health,
            clock=self._clock,
            log=self._log,
            token=scorer.token,
            documented=scorer.docs,
        )
        words = logging.getLogger("uvicorn.error")
        words.handlers, words.propagate = [_ToLog(self._log)], False
        settings = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=scorer.max_connections,
            timeout_graceful_shutdown=int(DRAIN_SECONDS) - 2,
            ssl_certfile=scorer.tls_certificate or None,
            ssl_keyfile=scorer.tls_key or None,
        )
        return _Server(settings, lambda: self._turn("http"))

    def _start(self, name: str, loop: Callable[[], None]) -> threading.Thread:
        """Run a loop in a thread of its own; its failure is the role's."""

        def guarded() -> None:
            try:
                loop()
            except BrokerUnreachable as error:
                if not self._stop:  # told to stop while the broker was away: that is no failure
                    self._failure = error
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                if not self._stop:
                    self._stop.set()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _turn(self, loop: str) -> None:
        self._turned[loop] = self._clock.monotonic()

    def _consumer(self) -> Consumer:
        return Consumer(self._config.kafka, client_id="streamgr-scorer", log=self._log, stop=self._stop)

    # --- questions, in the pool ---

    def _rank(self, ask: wire.RankRequest) -> wire.Answer:
        self._require_weights()
        self._require_open()
        return self._sampled(ask, self._ranker.rank(ask))

    def _retrieve(self, ask: wire.RetrieveRequest) -> wire.Answer:
        self._require_weights()
        self._require_open()
        return self._sampled(ask, self._ranker.retrieve(ask))

    def _sequence(self, user: str, part: wire.SequencePart) -> dict[str, Any]:
        self._require_open()
        return self._follower.sequence(user, Part(part.since, part.before, part.last))

    def _require_weights(self) -> None:
        """Asked first: before the first version the answer is `no_weights`, whatever else is not there yet."""
        if self._weights.version is None:
            raise NoWeights

    def _require_open(self) -> None:
        if not self._opened.is_set():
            raise NotReady

    def _sampled(self, ask: wire.RankRequest | wire.RetrieveRequest, answer: wire.Answer) -> wire.Answer:
        if self._samples:
            self._samples.offer(ask, answer)
        return answer


class _Server(uvicorn.Server):
    """uvicorn that says when its loop turns."""

    def __init__(self, config: uvicorn.Config, turned: Callable[[], None]) -> None:
        super().__init__(config)
        self._turned = turned

    async def on_tick(self, counter: int) -> bool:
        self._turned()
        return await super().on_tick(counter)


class _ToLog(logging.Handler):
    """uvicorn's own words, in our log's form."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        stack = traceback.format_exception(*record.exc_info) if record.exc_info else []
        self._log.warning("http_server", record.getMessage(), stack="".join(stack))


def require_certificate(settings: Settings) -> None:
    """Raise `ConfigError` unless certificate and key, where they are given, are there and belong together."""
    if not settings.tls_certificate:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.tls_certificate, settings.tls_key, password=lambda: ""
        )
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConfigError(
            f"cannot be used: {error}",
            where=f"scorer.tls_certificate={settings.tls_certificate}, scorer.tls_key={settings.tls_key}",
            remedy="give PEM files, readable by this user, of a certificate and its unencrypted key",
        ) from None


def _listen(config: Config) -> socket.socket:
    host, port = config.scorer.host, config.scorer.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol named, which `socket.create_server` does not: else asyncio leaves Nagle on, 40 ms an answer
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _unusable(host, port, error) from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(512)
        return listening
    except OSError as error:
        listening.close()
        raise _unusable(host, port, error) from None


def _unusable(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {host}:{port}: {error.strerror}",
        where="scorer.port",
        remedy="choose a free port (STREAMGR_SCORER__PORT), 0 for any",
    )
