"""Parameters and floating-point operations (FLOPs) of a model, computed from its config.

Only the matrix products that define the model count, with two operations per multiply-add. Norms,
activations and sums of values are left out, as is what an implementation does in addition:
recomputed activations, features computed twice for micro-batches, the quadratic part of causal
linear attention's chunks. Causal softmax counts all pairs of tokens.
"""

import math

from ds_linclip.config import (
    AttentionSettings,
    Config,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextTower,
    VisionTower,
)
from ds_linclip.model.attention import attention_class, own_shapes

__all__ = [
    "blocks_flops",
    "forward_flops",
    "num_parameters",
    "num_state_values",
    "step_flops",
    "training_flops",
]


def blocks_flops(tower: VisionTower | TextTower, num_tokens: int) -> list[float]:
    """Return the FLOPs of the forward pass of every block over one sequence.

    For N tokens of width w and a hidden layer of r w they are ``2 N w (4 w + 2 r w)`` in the
    projections and the MLP, and those of the kind of attention, which may project more. Softmax
    multiplies queries with N keys and weights as many values, ``4 N^2 w`` together; linear
    attention adds to and reads a state of F features per head, ``4 N F w``.
    """
    width, heads, causal = tower.width, tower.heads, tower.causal
    products = 2 * width**2 * (4 + 2 * tower.mlp_ratio)

    def per_token(each: AttentionSettings) -> float:
        kind = attention_class(each)
        own = heads * kind.flops(each, width // heads, num_tokens, causal=causal)
        projections = kind.projection_flops(each, width, heads, causal=causal)
        return products + projections + own

    return [num_tokens * per_token(each) for each in tower.attentions]


def forward_flops(model: ModelConfig, image_size: tuple[int, int]) -> float:
    """Return the FLOPs of the forward pass of both towers over one training pair, with an image of
    (height, width) pixels; dropped patches cost nothing."""
    return sum(map(sum, _forward_by_unit(model, image_size)))


def step_flops(config: Config, step: int) -> float:
    """Return the FLOPs of the step after ``step`` finished ones.

    The backward pass of trained layers costs as much as two forward passes; frozen ones have none.
    """
    init = config.init
    image, text = _forward_by_unit(config.model, config.image_size_at(step))
    image_from = len(image) - init.lock_image_unlocked_groups if init.lock_image else 0
    text_from = len(text) - init.lock_text_unlocked_layers if init.lock_text else 0
    per_pair = sum(image) + sum(text) + 2 * (sum(image[image_from:]) + sum(text[text_from:]))
    return config.train.global_batch_size * per_pair


def training_flops(config: Config) -> float:
    """Return the FLOPs of the whole run."""
    steps = config.train.steps
    starts = sorted({0, *(stage.from_step for stage in config.data.resolutions)})
    starts = [start for start in starts if start < steps]
    return sum(
        (stop - start) * step_flops(config, start)
        for start, stop in zip(starts, [*starts[1:], steps], strict=True)
    )


def num_parameters(model: ModelConfig, loss: LossConfig) -> int:
    """Return the number of parameters, including token embedding and logit scale."""
    vision, text = model.vision, model.text
    patches = vision.width * 3 * vision.patch_size**2
    # A class token or a bias, positions, the norms before and after the blocks, the projection.
    norms = 2 if vision.no_ln_pre else 4
    projection = model.embed_dim if vision.proj_type == "linear" else 0
    image = vision.width * (1 + vision.num_tokens + norms + projection)
    words = text.width * (text.vocab_size + text.context_length + 2 + model.embed_dim)
    words += model.embed_dim if text.proj_bias else 0
    blocks = _block_parameters(vision) + _block_parameters(text) + _pooling_parameters(vision)
    return patches + image + words + blocks + (2 if loss.kind == "sigmoid" else 1)


def num_state_values(optim: OptimConfig) -> int:
    """Return the fp32 numbers of training state per trained parameter: master weight, optimizer
    moments, running average."""
    moments = 1 if optim.kind == "lion" else 2
    return 1 + moments + (optim.ema_decay > 0)


def _forward_by_unit(
    model: ModelConfig, image_size: tuple[int, int]
) -> tuple[list[float], list[float]]:
    """Return the FLOPs over one pair, for the units of the image and of the text tower: embedding,
    blocks, projection. These are also the groups that can be frozen."""
    vision, text = model.vision, model.text
    num_patches = vision.num_kept_patches_at(image_size)
    num_tokens = vision.num_kept_tokens_at(image_size)
    patches = 2 * num_patches * 3 * vision.patch_size**2 * vision.width
    image_blocks = blocks_flops(vision, num_tokens)
    # Pooling is trained with the last block.
    image_blocks[-1] += _pooling_flops(vision, num_tokens)
    projection = model.embed_dim if vision.proj_type == "linear" else 0
    text_blocks = blocks_flops(text, text.context_length)
    return (
        [patches, *image_blocks, 2.0 * vision.width * projection],
        [0.0, *text_blocks, 2 * text.width * model.embed_dim],
    )


def _block_parameters(tower: VisionTower | TextTower) -> int:
    width = tower.width
    own = sum(math.prod(shape) for shapes in own_shapes(tower) for shape in shapes.values())
    scales = 0 if tower.ls_init_value is None else 2 * width
    plain = 4 * width * (width + 1) + _mlp_parameters(tower) + 4 * width
    return tower.layers * (plain + scales) + own


def _mlp_parameters(tower: VisionTower | TextTower) -> int:
    width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
    return 2 * width * hidden + hidden + width


def _pooling_parameters(tower: VisionTower) -> int:
    if tower.pool_type != "map":
        return 0
    width = tower.width  # the query, four projections, a norm, the MLP
    return width + 4 * width * (width + 1) + 2 * width + _mlp_parameters(tower)


def _pooling_flops(tower: VisionTower, num_tokens: int) -> float:
    """Return the FLOPs of attention pooling: keys and values of all tokens, two products with them
    for one query, whose projections and MLP are those of one token."""
    if tower.pool_type != "map":
        return 0
    keys = num_tokens * (4 * tower.width**2 + 4 * tower.width)
    return keys + 2 * tower.width**2 * (2 + 2 * tower.mlp_ratio)
