"""The one place where ``deepspeed.initialize`` gets a model: with a pipeline or without."""

from torch import optim

from ds_linclip.config import Config
from ds_linclip.engine.engine import Engine, PlainEngine
from ds_linclip.engine.pipeline import PipelineEngine
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh

__all__ = ["initialize_engine"]


def initialize_engine(
    model: CLIP, optimizer: optim.Optimizer, config: Config, mesh: Mesh
) -> Engine:
    """Hand model and optimizer to ``deepspeed.initialize``.

    Args:
        model: The whole model, or with pipeline parallelism this rank's stage of it.
        optimizer, config, mesh: Of the run.

    Raises:
        ValueError: as :func:`deepspeed_config`.
    """
    kind = PipelineEngine if mesh.pp.size > 1 else PlainEngine
    return kind(model, optimizer, config, mesh)
