"""The receivers of a run's scalars beside DeepSpeed's monitor."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ds_linclip.config import Config
from ds_linclip.monitoring.prometheus import prometheus_endpoint
from ds_linclip.monitoring.scalars import ScalarSink
from ds_linclip.monitoring.trackers import trackio_run, wandb_run
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.phase import PhaseTracker

__all__ = ["open_sinks"]


@contextmanager
def open_sinks(config: Config, mesh: Mesh, phases: PhaseTracker) -> Iterator[Sequence[ScalarSink]]:
    """Yield the receivers that ``log`` configures, on rank 0; none on the other ranks.

    Raises:
        AgreedError: on all ranks together, when one of them cannot be opened.
    """
    with ExitStack() as opened:

        def on_rank_zero() -> list[ScalarSink]:
            if mesh.rank > 0:
                return []
            sinks = []
            if config.log.prometheus_port is not None:
                sinks.append(opened.enter_context(prometheus_endpoint(config, phases)))
            if config.log.wandb is not None:
                sinks.append(opened.enter_context(wandb_run(config)))
            if config.log.trackio is not None:
                sinks.append(opened.enter_context(trackio_run(config)))
            return sinks

        yield mesh.agree(on_rank_zero)
