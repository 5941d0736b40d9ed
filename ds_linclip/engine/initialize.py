"""The choice between the engines with and without a pipeline."""

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
    """Create the engine that trains ``model``, the whole or, with pipeline parallelism, this rank's
    stage of it; a collective of all ranks.

    Raises:
        ValueError: for the reasons of :func:`~ds_linclip.engine.deepspeed_config.deepspeed_config`.
    """
    kind = PipelineEngine if mesh.pp.size > 1 else PlainEngine
    return kind(model, optimizer, config, mesh)
