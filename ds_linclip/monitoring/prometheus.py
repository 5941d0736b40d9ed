"""An HTTP endpoint that Prometheus scrapes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ds_linclip.checkpoint.directory import committed, step_of
from ds_linclip.config import Config
from ds_linclip.monitoring.scalars import SCALARS, Scalar, ScalarSink
from ds_linclip.process.phase import PhaseTracker

__all__ = ["prometheus_endpoint"]


@contextmanager
def prometheus_endpoint(config: Config, phases: PhaseTracker) -> Iterator[ScalarSink]:
    """Serve metrics on ``log.prometheus_port`` of all addresses of this host; yield its sink.

    A thread answers with the last scalars and with the phase of the run at that moment; training
    never waits for it.

    Raises:
        ValueError: when nothing can listen on the port.
    """
    port = config.log.prometheus_port
    assert port is not None
    collector, registry = _RunCollector(config, phases), CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise ValueError(
            f"log.prometheus_port ({port}) cannot be listened on: {error.strerror}; choose another"
        ) from error
    try:
        yield collector.update
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _RunCollector(Collector):
    """The metrics of a run, created at every scrape."""

    def __init__(self, config: Config, phases: PhaseTracker) -> None:
        self._config = config
        self._phases = phases
        self._values: Mapping[str, float] = {}

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Store new values in one assignment, as other threads read at any time."""
        self._values = {**self._values, **values}

    def collect(self) -> Iterator[Metric]:
        values = self._values
        yield from (family for scalar in SCALARS if (family := _family(scalar, values)).samples)
        place = self._phases.current
        info = GaugeMetricFamily("linclip_run_info", "which run this is", labels=["run"])
        info.add_metric([self._config.name], 1)
        phase = GaugeMetricFamily(
            *("linclip_phase_start_timestamp_seconds", "when the present phase began"),
            labels=["phase"],
        )
        phase.add_metric([place.phase], place.since)
        yield info
        yield phase
        yield GaugeMetricFamily("linclip_step", "the step that is being made", place.step)
        yield GaugeMetricFamily("linclip_planned_steps", "the last step", self._config.train.steps)
        yield from _checkpoint_metrics(self._config)


def _family(scalar: Scalar, values: Mapping[str, float]) -> Metric:
    kind = CounterMetricFamily if scalar.metric.endswith("_total") else GaugeMetricFamily
    family = kind(scalar.metric, scalar.meaning, labels=["cause"] if scalar.is_family else [])
    for tag, value in values.items():
        cause = scalar.cause(tag)
        if cause is not None:
            family.add_metric([cause] if scalar.is_family else [], value * scalar.factor)
    return family


def _checkpoint_metrics(config: Config) -> Iterator[Metric]:
    """Yield the step and the time of the newest committed checkpoint in the run folder."""
    try:
        path = committed(config.run_dir / "checkpoints")[-1]
        saved = path.stat().st_mtime
    except (IndexError, OSError, ValueError):  # there is none, or it is being removed
        return
    yield GaugeMetricFamily("linclip_checkpoint_step", "that of the newest one", step_of(path))
    yield GaugeMetricFamily(
        "linclip_checkpoint_timestamp_seconds", "when the newest one was saved", saved
    )
