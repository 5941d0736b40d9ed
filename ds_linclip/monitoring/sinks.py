"""Who hears of a run's scalars beside DeepSpeed's monitor, as ``log`` asks for it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ds_linclip.config import Config
from ds_linclip.monitoring.prometheus import prometheus_endpoint
from ds_linclip.monitoring.scalars import Listener
from ds_linclip.monitoring.trackers import trackio_run, wandb_run
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.phase import Progress

__all__ = ["open_listeners"]


@contextmanager
def open_listeners(config: Config, mesh: Mesh, phases: Progress) -> Iterator[Sequence[Listener]]:
    """On rank 0 what ``log`` asks for, until the context ends; on the other ranks nothing.

    Raises:
        AgreedError: on all ranks together, when one of them cannot be had.
    """
    with ExitStack() as opened:

        def on_rank_zero() -> list[Listener]:
            if mesh.rank > 0:
                return []
            listeners: list[Listener] = []
            if config.log.prometheus_port is not None:
                listeners.append(opened.enter_context(prometheus_endpoint(config, phases)))
            if config.log.wandb is not None:
                listeners.append(opened.enter_context(wandb_run(config)))
            if config.log.trackio is not None:
                listeners.append(opened.enter_context(trackio_run(config)))
            return listeners

        yield mesh.agree(on_rank_zero)
