"""A text endpoint for Prometheus to read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ds_linclip.checkpoint.directory import committed, step_of
from ds_linclip.config import Config
from ds_linclip.monitoring.scalars import SCALARS, Listener, Scalar
from ds_linclip.process.phase import Progress

__all__ = ["prometheus_endpoint"]


@contextmanager
def prometheus_endpoint(config: Config, phases: Progress) -> Iterator[Listener]:
    """Answer on ``log.prometheus_port`` of every address of this host; gives its listener.

    A thread answers, with what it was told last and where the run is at that moment: nothing in the
    training waits for it.

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
        yield collector.hear
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _RunCollector(Collector):
    """The metrics of a run, made when they are asked for."""

    def __init__(self, config: Config, phases: Progress) -> None:
        self._config = config
        self._phases = phases
        self._values: Mapping[str, float] = {}

    def hear(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the newest values by their tags: one assignment, other threads read at any time."""
        self._values = {**self._values, **values}

    def collect(self) -> Iterator[Metric]:
        values = self._values
        yield from (family for scalar in SCALARS if (family := _family(scalar, values)).samples)
        place = self._phases.place
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
        yield from _of_last_checkpoint(self._config)


def _family(scalar: Scalar, values: Mapping[str, float]) -> Metric:
    kind = CounterMetricFamily if scalar.metric.endswith("_total") else GaugeMetricFamily
    family = kind(scalar.metric, scalar.meaning, labels=["cause"] if scalar.is_family else [])
    for tag, value in values.items():
        cause = scalar.cause(tag)
        if cause is not None:
            family.add_metric([cause] if scalar.is_family else [], value * scalar.factor)
    return family


def _of_last_checkpoint(config: Config) -> Iterator[Metric]:
    """Looked up in the run folder, where it stands once it is committed."""
    try:
        path = committed(config.run_dir / "checkpoints")[-1]
        saved = path.stat().st_mtime
    except (IndexError, OSError, ValueError):  # none yet, or just being removed
        return
    yield GaugeMetricFamily("linclip_checkpoint_step", "that of the newest one", step_of(path))
    yield GaugeMetricFamily(
        "linclip_checkpoint_timestamp_seconds", "when the newest one was saved", saved
    )
