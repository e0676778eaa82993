"""Questions to answers: a user's history up to `at`, the weights of one version, one pass over all candidates.

A candidate stands at serving where a target stood in training: after every event earlier than its request time `at`,
blind to the other candidates. So the same weights give the same probability to both (decision 1).
"""

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from streamgr.clock import Clock
from streamgr.config import Config
from streamgr.errors import ConfigError
from streamgr.events import PROFILE, History, user_key
from streamgr.serve import wire
from streamgr.serve.model import LiveWeights, Served, item_keys
from streamgr.serve.retrieval import best_first, similarities
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
        self._history_length = config.sequence.history_length
        self._event_clock = config.scorer.clock == "event"
        self._task_weights = _task_weights(config)

    def rank(self, ask: wire.RankRequest) -> wire.Answer:
        """The candidates, best first. Raises `InvalidRequest` and `NoWeights`."""
        tasks = self._tasks(ask.tasks)
        at = self._at(ask.at)
        texts = list(dict.fromkeys(map(str, ask.candidates)))
        history = self._sequences.history(str(ask.user_id), at, self._history_length)
        with self._weights.lease() as served, torch.inference_mode():
            recommender = served.copy.recommender
            tokens = recommender.tokens(history, at, user_key(str(ask.user_id)))
            vectors, unknown = served.vectors(np.concatenate([tokens.keys, item_keys(texts)]))
            n = len(tokens)
            logits = recommender.score(tokens, at, vectors[:n], vectors[n:])
            probabilities = torch.sigmoid(logits.double()).numpy()[:, [self._actions.index(task) for task in tasks]]
        CANDIDATES.inc(len(texts))
        UNKNOWN.inc(int(unknown[n:].sum()))
        scores = probabilities @ np.array([self._task_weights[task] for task in tasks])
        order = sorted(range(len(texts)), key=lambda i: (-scores[i], texts[i]))[: ask.k]
        items = [
            wire.Item(texts[i], float(scores[i]), dict(zip(tasks, probabilities[i].tolist(), strict=True)))
            for i in order
        ]
        return self._answer(items, served, _events(history))

    def retrieve(self, ask: wire.RetrieveRequest) -> wire.Answer:
        """The best of all live items. Raises `InvalidRequest` and `NoWeights`."""
        k = ask.k or 10
        exclude_seen = ask.exclude_seen is not False
        at = self._at(ask.at)
        user = str(ask.user_id)
        history = self._sequences.history(user, at, self._history_length)
        seen = self._sequences.history(user, at, SEEN_EVENTS).items if exclude_seen else history.items
        with self._weights.lease() as served, torch.inference_mode():
            recommender = served.copy.recommender
            tokens = recommender.tokens(history, at, user_key(str(ask.user_id)))
            vectors, _ = served.vectors(tokens.keys)
            query = recommender.retrieval_query(tokens, vectors)
            scores = similarities(query, served.copy.table.weight, served.copy.inverse_norms, served.rows)
            keys = served.keys
        if exclude_seen:
            unseen = ~np.isin(keys, seen)
            scores, keys = scores[unseen], keys[unseen]
        return self._answer(self._named(scores, keys, k), served, _events(history))

    def _named(self, scores: NDArray[np.float32], keys: NDArray[np.uint64], k: int) -> list[wire.Item]:
        """The best k whose text is known here; the others are counted."""
        items: list[wire.Item] = []
        for i in best_first(scores, keys, 2 * k):
            text = self._sequences.item_text(int(keys[i]))
            if text is None:
                TEXTLESS.inc()
                continue
            items.append(wire.Item(text, float(scores[i])))
            if len(items) == k:
                break
        return items

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


def _events(history: History) -> int:
    """How many of its rows are events."""
    return int((history.kinds != PROFILE).sum())
