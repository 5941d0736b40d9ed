"""Parameters and floating-point operations (FLOPs) of a model, computed from its config.

Only the matrix products that define the model count, with two operations per multiply-add. Norms,
activations and sums of values are left out, as is what an implementation does in addition:
recomputed activations, features computed twice for micro-batches, the quadratic part of causal
linear attention's chunks. Causal softmax counts all pairs of tokens.
"""

from ds_linclip.config import (
    Config,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextTower,
    VisionTower,
)

__all__ = [
    "block_flops",
    "forward_flops",
    "num_features",
    "num_parameters",
    "num_state_values",
    "step_flops",
    "training_flops",
]


def block_flops(tower: VisionTower | TextTower, num_tokens: int) -> float:
    """Return the FLOPs of the forward pass of one block over one sequence.

    For N tokens of width w and a hidden layer of r w: ``2 N w (4 w + 2 r w)`` in the projections
    and the MLP, and ``4 N w K`` in the attention. Softmax multiplies queries with K = N keys and
    weights as many values; linear attention adds to and reads a state of K features per head: the
    head's width, or with the quadratic map also its pairs.
    """
    width = tower.width
    keys = num_tokens if tower.attention.kind == "softmax" else num_features(tower)
    return 2 * num_tokens * width * (width * (4 + 2 * tower.mlp_ratio) + 2 * keys)


def num_features(tower: VisionTower | TextTower) -> int:
    """Return the number of features of a key in linear attention: the head's width, and with the
    quadratic map also all pairs."""
    size = tower.width // tower.heads
    return size + size * (size // 2 + 1) if tower.attention.feature_map == "quadratic" else size


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
    # The class token, positions, the norms before and after the blocks, the projection.
    image = vision.width * (1 + vision.num_tokens + 4 + model.embed_dim)
    words = text.width * (text.vocab_size + text.context_length + 2 + model.embed_dim)
    blocks = vision.layers * _block_parameters(vision) + text.layers * _block_parameters(text)
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
    patches = 2 * num_patches * 3 * vision.patch_size**2 * vision.width
    image_blocks = [block_flops(vision, 1 + num_patches)] * vision.layers
    text_blocks = [block_flops(text, text.context_length)] * text.layers
    return (
        [patches, *image_blocks, 2 * vision.width * model.embed_dim],
        [0.0, *text_blocks, 2 * text.width * model.embed_dim],
    )


def _block_parameters(tower: VisionTower | TextTower) -> int:
    width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
    attention = 4 * width * (width + 1)
    mlp = 2 * width * hidden + hidden + width
    has_gain = tower.attention.kind == "linear" and tower.attention.head_norm
    return attention + mlp + (4 + has_gain) * width
