"""Questions to answers: a user's history up to `at`, the weights of one version, one pass over all candidates.

A candidate stands at serving where a target stood in training: after every event earlier than its request time `at`,
blind to the other candidates. So the same weights give the same probability to both (decision 1).

What the weights make of a history is kept between requests (`kv_cache`). It changes no answer but through the window:
`history_length` events without a cache, up to a slack more with one; `sequence_length` in the answer says how many.
"""

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from streamgr.clock import Clock
from streamgr.config import Config
from streamgr.errors import ConfigError
from streamgr.events import History, user_key
from streamgr.model.cache import Cache
from streamgr.serve import wire
from streamgr.serve.kv_cache import Outcome, events
from streamgr.serve.model import LiveWeights, Served, item_keys
from streamgr.serve.retrieval import Items, nearest
from streamgr.telemetry import counter, histogram

MODEL_AGE = histogram("score_model_age_seconds", "At each answer: now - horizon of its weights (the SLI).")
SEQUENCE_AGE = histogram("sequence_age_seconds", "At each answer: how far the sequences are behind the events.")
CANDIDATES = counter("candidates", "Candidates scored (ranking), different ones a request.")
UNKNOWN = counter("unknown_items", "Candidates without a slot in the ID table, answered by the shared rows.")
TEXTLESS = counter("textless_items", "Live items left out of an answer: no event here has named them yet.")

SEEN_EVENTS = 2_048  # how far back `exclude_seen` looks


class Sequences(Protocol):
    """What is needed of `streamgr.sequence.follower.Follower`: reads beside the thread that steps it."""

    def history(self, user: str, at_ms: int, limit: int) -> History: ...

    def item_text(self, key: int) -> str | None: ...

    def newest_event_ms(self) -> int: ...

    def age_seconds(self) -> float: ...


class Ranker:
    """Answers; any number of threads may ask at once."""

    def __init__(self, config: Config, clock: Clock, weights: LiveWeights, sequences: Sequences) -> None:
        self._clock, self._weights, self._sequences = clock, weights, sequences
        self._actions = config.sequence.actions
        self._least = config.sequence.history_length
        slack = config.scorer.cache_slack if config.scorer.cache_bytes else 0.0
        self._most = int(self._least * (1 + slack))
        self._event_clock = config.scorer.clock == "event"
        self._task_weights = _task_weights(config)

    def rank(self, ask: wire.RankRequest) -> wire.Answer:
        """The candidates, best first. Raises `InvalidRequest` and `NoWeights`."""
        tasks = self._tasks(ask.tasks)
        at = self._at(ask.at)
        texts, user = list(dict.fromkeys(map(str, ask.candidates))), str(ask.user_id)
        history = self._sequences.history(user, at, self._most)
        with self._weights.lease() as served, torch.inference_mode():
            cache, length = self._been_through(served, user, at, history)
            vectors, unknown = served.vectors(item_keys(texts))
            logits = served.copy.recommender.score(cache, vectors)
            probabilities = torch.sigmoid(logits.double()).numpy()[:, [self._actions.index(task) for task in tasks]]
        CANDIDATES.inc(len(texts))
        UNKNOWN.inc(int(unknown.sum()))
        scores = probabilities @ np.array([self._task_weights[task] for task in tasks])
        order = sorted(range(len(texts)), key=lambda i: (-scores[i], texts[i]))[: ask.k]
        items = [
            wire.Item(texts[i], float(scores[i]), dict(zip(tasks, probabilities[i].tolist(), strict=True)))
            for i in order
        ]
        return self._answer(items, served, length)

    def retrieve(self, ask: wire.RetrieveRequest) -> wire.Answer:
        """The best of all live items. Raises `InvalidRequest` and `NoWeights`."""
        exclude_seen, user = ask.exclude_seen is not False, str(ask.user_id)
        at = self._at(ask.at)
        seen = self._sequences.history(user, at, max(self._most, SEEN_EVENTS) if exclude_seen else self._most)
        with self._weights.lease() as served, torch.inference_mode():
            cache, length = self._been_through(served, user, at, seen)
            query = served.copy.recommender.retrieval_query(cache)
            items = self._named(query, served, ask.k or 10, seen.items if exclude_seen else seen.items[:0])
        return self._answer(items, served, length)

    def _been_through(self, served: Served, user: str, at: int, history: History) -> tuple[Cache, int]:
        """What these weights make of a user's history at `at`, and of how many events; `history`: `_most`, or more."""
        entry = served.caches.get(user)
        length = entry.goes_on(history, self._least, self._most) if entry else None
        length = min(self._least, events(history)) if length is None else length
        # asked anew, not cut: what a window knows of its user's features depends on where it begins
        window = history if events(history) == length else self._sequences.history(user, at, length)
        recommender = served.copy.recommender
        tokens = recommender.tokens(window, at, user_key(user))
        n, start = len(tokens), entry.cache.reusable(tokens) if entry else 0
        outcome: Outcome = "miss"
        if entry is not None and 0 < n <= 2 * start:
            cache = recommender.extend(entry.cache, tokens, at, served.vectors(tokens.keys[start:])[0])
            outcome = "hit" if n - start <= 1 and n == len(entry.cache.tokens) else "extended"
        else:  # from about one half on, one pass over everything is cheaper than appending
            cache = recommender.prefill(tokens, at, served.vectors(tokens.keys)[0])
        served.caches.keep(user, window, cache, outcome)
        return cache, events(window)

    def _named(self, query: torch.Tensor, served: Served, k: int, seen: NDArray[np.uint64]) -> list[wire.Item]:
        """The best k that are not seen and whose text is known here; live items without one are counted."""
        catalogue = Items(served.copy.table.weight, served.copy.inverse_norms, served.rows, served.keys)
        asked = 2 * k
        while True:
            best = nearest(query[None], catalogue, asked, [seen])[0]
            items: list[wire.Item] = []
            textless = 0
            for i, score in zip(best.index, best.scores, strict=True):
                text = self._sequences.item_text(int(served.keys[i]))
                if text is None:
                    textless += 1
                elif len(items) < k:
                    items.append(wire.Item(text, float(score)))
                if len(items) == k:
                    break
            if len(items) == k or len(best.index) < asked:
                TEXTLESS.inc(textless)
                return items
            asked *= 8

    def _answer(self, items: list[wire.Item], served: Served, events: int) -> wire.Answer:
        age = served.age_seconds(self._clock.now_ms())
        MODEL_AGE.observe(age)
        SEQUENCE_AGE.observe(self._sequences.age_seconds())
        return wire.Answer(items, served.manifest.version, age, events, events == 0)

    def _tasks(self, asked: list[str] | None) -> tuple[str, ...]:
        for i, task in enumerate(asked or []):
            if task not in self._actions:
                raise wire.InvalidRequest(f"tasks[{i}]", f"unknown; the tasks are {', '.join(self._actions)}")
        return tuple(dict.fromkeys(asked)) if asked else self._actions

    def _at(self, asked: int | str | None) -> int:
        """ms; "now" sees everything that has happened, on the event clock too."""
        if asked is not None:
            return wire.at_ms(asked)
        return self._sequences.newest_event_ms() + 1 if self._event_clock else self._clock.now_ms()


def _task_weights(config: Config) -> dict[str, float]:
    """The weight of every task: 1 each where none is configured, 0 for the tasks that a configured list leaves out."""
    actions, given = config.sequence.actions, config.scorer.task_weights
    if wrong := sorted(given.keys() - set(actions)) or [k for k, w in given.items() if not math.isfinite(w)]:
        raise ConfigError(
            f"no such task, or not a finite weight: {', '.join(wrong)}",
            where="scorer.task_weights",
            remedy=f"name only `sequence.actions`: {', '.join(actions)}",
        )
    return {task: given.get(task, 0.0) if given else 1.0 for task in actions}
