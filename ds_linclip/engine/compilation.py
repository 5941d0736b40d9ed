"""What runs under torch.compile, and from CUDA graphs, in which layout."""

from dataclasses import dataclass
from typing import Any, Literal

from ds_linclip.config import Config, graph_break
from ds_linclip.loss.contrastive import num_tiles
from ds_linclip.parallel.mesh import Mesh

__all__ = ["Compilation", "plan_compilation"]

#: A graph of the loss lists the operations of all its tiles; beyond this many it is not compiled.
_MAX_TILES = 16


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """The parts of a step that are compiled.

    Attributes:
        model: "towers": all that :class:`~ds_linclip.model.CLIP` computes, as one graph forward and
            one backward; "blocks": each block on its own; "none".
        loss: Whether the contrastive loss is one graph.
        captured: Of "model" and "loss", those that run from CUDA graphs.
        text: All of it in words, for the log.
    """

    model: Literal["none", "blocks", "towers"] = "none"
    loss: bool = False
    captured: tuple[str, ...] = ()
    text: str = "nothing"

    def options(self, part: Literal["model", "loss"]) -> dict[str, Any]:
        """Return the arguments of torch.compile for a part that is one graph.

        What cannot be in the graph is an error, and so is a kernel that cannot be captured. Every
        shape is compiled for itself: shapes are few and stay for thousands of steps.
        """
        graphs = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
        captured = {"options": graphs} if part in self.captured else {}
        return {"fullgraph": True, "dynamic": False, **captured}


def plan_compilation(config: Config, mesh: Mesh) -> Compilation:
    """Return the largest part of a step that can be compiled as ``train.compile`` asks for.

    The towers are one graph unless :func:`~ds_linclip.config.graph_break` knows better; then each
    block is compiled. So is the loss while it has few tiles. CUDA graphs hold no communication
    between ranks: the loss is captured on a single rank only.

    Raises:
        ValueError: when ``train.cuda_graphs`` asks for what this layout or this device cannot do.
    """
    if config.train.compile == "none":
        return Compilation()
    if config.train.compile == "blocks":
        return Compilation(model="blocks", text="blocks")
    model: Literal["blocks", "towers"] = "towers"
    reasons = []
    if (why := graph_break(config)) is not None:
        model = "blocks"
        reasons.append(f"blocks, because {why}")
    pairs = config.train.global_batch_size // mesh.dp.size
    tiles = num_tiles(pairs, mesh.dp.size, config.loss.chunk_size)
    loss = tiles <= _MAX_TILES
    if not loss:
        reasons.append(f"no loss, because it has {tiles} tiles (at most {_MAX_TILES})")
    text = f"{model} and loss" if loss else model
    captured: tuple[str, ...] = ()
    if config.train.cuda_graphs:
        _check_cuda_graphs(config, mesh)
        captured = ("model", "loss") if loss and mesh.dp.size == 1 else ("model",)
        text += f"; CUDA graphs of {' and '.join(captured)}"
    if reasons:
        text += f" ({'; '.join(reasons)})"
    return Compilation(model=model, loss=loss, captured=captured, text=text)


def _check_cuda_graphs(config: Config, mesh: Mesh) -> None:
    """Check what the config alone does not say; the rest is checked with it."""
    if mesh.device.type != "cuda":
        raise ValueError(
            f"train.cuda_graphs (true) must have a CUDA device, not ({mesh.device.type}): take "
            "train.cuda_graphs=false"
        )
    num_micro_batches = config.num_micro_batches(mesh.dp.size)
    if num_micro_batches > 1:
        raise ValueError(
            f"train.micro_batch_size ({config.train.micro_batch_size}) must be a rank's whole part "
            f"of the batch ({config.train.global_batch_size // mesh.dp.size}) with "
            "train.cuda_graphs (true): a replay overwrites features and gradients of the "
            "micro-batch before; take train.micro_batch_size=null, or train.cuda_graphs=false"
        )
