"""The units of the model that each pipeline stage holds."""

from ds_linclip.config import Config
from ds_linclip.model.flops import blocks_flops
from ds_linclip.parallel.mesh import Axis

__all__ = ["stage_units"]


def stage_units(config: Config, pp: Axis) -> range:
    """Return the units of :class:`~ds_linclip.model.CLIP` that this rank's pipeline stage holds.

    Stages are consecutive blocks, balanced by estimated floating-point operations per pair. The
    embedding of a tower belongs to the stage of its first block, the head to that of its last.
    """
    bounds = _balanced(_block_costs(config), pp.size)
    units_of_block: list[range] = []
    first = 0
    for layers in (config.model.vision.layers, config.model.text.layers):
        for block in range(layers):
            start, stop = first + 1 + block, first + 2 + block
            units_of_block.append(range(start - (block == 0), stop + (block == layers - 1)))
        first += layers + 2
    blocks = units_of_block[bounds[pp.rank] : bounds[pp.rank + 1]]
    return range(blocks[0].start, blocks[-1].stop)


def _block_costs(config: Config) -> list[float]:
    """Return the floating-point operations of every block per pair, image tower first."""
    vision, text = config.model.vision, config.model.text
    num_image = vision.num_kept_tokens_at(config.image_size_at(0))
    return blocks_flops(vision, num_image) + blocks_flops(text, text.context_length)


def _balanced(costs: list[float], num_parts: int) -> list[int]:
    """Return the bounds of consecutive, non-empty parts that minimize the most expensive part.

    Dynamic programming over the number of parts.
    """
    num = len(costs)
    # best[n]: for the first n blocks, the cost of the most expensive part and the bounds.
    best: list[tuple[float, list[int]]] = [(sum(costs[:n]), [0, n]) for n in range(num + 1)]
    for parts in range(2, num_parts + 1):
        best = [
            min(
                (max(best[cut][0], sum(costs[cut:n])), [*best[cut][1], n])
                for cut in range(parts - 1, n)
            )
            if n >= parts
            else (float("inf"), [])
            for n in range(num + 1)
        ]
    return best[num][1]
