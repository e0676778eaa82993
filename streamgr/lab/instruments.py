"""Reading a running system: the roles' metrics and the comparison, put together into one set of figures."""

from dataclasses import replace

from streamgr import scrape
from streamgr.clock import Clock
from streamgr.lab import report
from streamgr.lab.feed import SOURCES
from streamgr.lab.observer import Observer
from streamgr.lab.report import Figures, Quantiles
from streamgr.lab.stage import Stage

RATE_SECONDS = 5.0  # over which events per second are shown


class Instruments:
    """Keeps the latest figures; `read` renews them."""

    def __init__(self, stage: Stage, clock: Clock, observer: Observer, *, simulated: bool) -> None:
        self._stage, self._clock, self._observer, self._simulated = stage, clock, observer, simulated
        self._history: list[tuple[float, int]] = []
        self.figures = Figures(slots=stage.config.table.slots)

    def read(self, seconds: float, *, lately: bool) -> Figures:
        """The figures `seconds` after the first event; `lately`: quality as it is now, else since the freeze.

        A process that does not answer at the moment leaves its figures as they were.
        """
        f = replace(self.figures, seconds=seconds)
        f = self._sequencer(f)
        f = self._trainer(f)
        f = self._scorer(f)
        if self._simulated and (feed := scrape.metrics(self._stage.ports["feed"])):
            f = replace(f, rankings={s: feed.count("feed_rankings_total", source=s) for s in SOURCES})
        self.figures = self._quality(f, lately=lately)
        return self.figures

    def _sequencer(self, f: Figures) -> Figures:
        if not (metrics := scrape.metrics(self._stage.ports["sequencer"])):
            return f
        config = self._stage.config
        events = scrape.events(metrics)
        now = self._clock.monotonic()
        self._history = [(t, n) for t, n in self._history if now - t < RATE_SECONDS] + [(now, events)]
        (t0, n0), (t1, n1) = self._history[0], self._history[-1]
        behind = metrics.total("consumer_lag_records", topic=config.topic("events"))
        return replace(
            f,
            events=events,
            dead_letters=metrics.count("deadletters_total"),
            rate=(n1 - n0) / (t1 - t0) if t1 > t0 else None,
            lag={**f.lag, "sequencer": behind},
        )

    def _trainer(self, f: Figures) -> Figures:
        if not (metrics := scrape.metrics(self._stage.ports["trainer"])):
            return f
        behind = metrics.total("consumer_lag_records", topic=self._stage.config.topic("examples"))
        return replace(
            f,
            used=metrics.count("table_used_slots"),
            admissions=metrics.count("table_admissions_total"),
            evictions=metrics.count("table_evictions_total"),
            lag={**f.lag, "trainer": behind},
        )

    def _scorer(self, f: Figures) -> Figures:
        if not (metrics := scrape.metrics(self._stage.ports["scorer"])):
            return f
        horizon = metrics.total("model_horizon_timestamp_seconds", role="scorer")
        return replace(
            f,
            weights_version=metrics.count("weights_version", role="scorer"),
            weights_age=self._clock.now_ms() / 1000 - horizon if horizon else None,
            served=metrics.count("event_to_serving_seconds_count"),
            event_to_serving=_quantiles(metrics, "event_to_serving_seconds", 50, 95, 99),
            label_to_serving=_quantiles(metrics, "label_to_serving_seconds", 50, 95, 99),
            model_age=_quantiles(metrics, "score_model_age_seconds", 50, 99),
        )

    def _quality(self, f: Figures, *, lately: bool) -> Figures:
        comparison = self._observer.comparison
        tally = comparison.now if lately else comparison.total
        judged = lately or comparison.frozen_version is not None
        return replace(
            f,
            targets_learned=comparison.learned,
            normalized_entropy={m: tally.normalized_entropy(m) for m in report.LABELS if judged},
            hit_rate={m: tally.hit_rate(m) for m in report.LABELS if judged},
            ranked=round(tally.targets) if judged else 0,
            retrieved=round(tally.retrievals) if judged else 0,
            frozen_version=comparison.frozen_version,
            learned_at_freeze=comparison.learned_at_freeze,
            left_out=comparison.left_out,
        )


def _quantiles(metrics: scrape.Metrics, name: str, *percents: int) -> Quantiles:
    return {f"p{percent}": metrics.quantile(name, percent / 100) for percent in percents}
