"""Names, shapes and layout of parameters in open_clip's state dict.

The only mapping, shared by live models, checkpoints and imported weights.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ds_linclip.config import ModelConfig, TextTower, VisionTower
from ds_linclip.model.attention import own_shapes

__all__ = [
    "SCALARS",
    "check_shapes",
    "from_open_clip_layout",
    "open_clip_key",
    "open_clip_shapes",
    "to_open_clip_layout",
]

#: Parameters that are scalars in open_clip and have shape [1] here, under the same names.
SCALARS = ("logit_scale", "logit_bias")


def open_clip_key(name: str) -> str:
    """Return open_clip's name of the parameter ``name`` of a :class:`~ds_linclip.model.CLIP`."""
    key = name.removeprefix("text.").replace("blocks.", "transformer.resblocks.")
    key = key.replace(".attn.qkv.", ".attn.in_proj_")
    return "text_projection" if name == "text.proj" else key


def to_open_clip_layout(name: str, full: Tensor, config: ModelConfig) -> Tensor:
    """Return the unsplit parameter ``name`` in open_clip's layout: q, k, v stacked; scalars []."""
    if ".attn.qkv." in name:
        return full.unflatten(0, (_heads(name, config), 3, -1)).transpose(0, 1).flatten(0, 2)
    return full.reshape(()) if name in SCALARS else full


def from_open_clip_layout(name: str, full: Tensor, config: ModelConfig) -> Tensor:
    """Invert :func:`to_open_clip_layout`: q, k, v of each head together; scalars [1]."""
    if ".attn.qkv." in name:
        return full.unflatten(0, (3, _heads(name, config), -1)).transpose(0, 1).flatten(0, 2)
    return full.reshape(1) if name in SCALARS else full


def open_clip_shapes(config: ModelConfig, *, with_bias: bool) -> dict[str, tuple[int, ...]]:
    """Return every key of open_clip's state dict with its shape; ``with_bias`` with a
    ``logit_bias``, as with the sigmoid loss."""
    vision, text = config.vision, config.text
    return {
        "visual.class_embedding": (vision.width,),
        "visual.positional_embedding": (vision.num_tokens, vision.width),
        "visual.conv1.weight": (vision.width, 3, vision.patch_size, vision.patch_size),
        "visual.proj": (vision.width, config.embed_dim),
        **_norm("visual.ln_pre", vision.width),
        **_blocks("visual.transformer.resblocks", vision),
        **_norm("visual.ln_post", vision.width),
        "token_embedding.weight": (text.vocab_size, text.width),
        "positional_embedding": (text.context_length, text.width),
        "text_projection": (text.width, config.embed_dim),
        **_blocks("transformer.resblocks", text),
        **_norm("ln_final", text.width),
        **dict.fromkeys(SCALARS if with_bias else SCALARS[:1], ()),
    }


def check_shapes(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Check that a state dict has the keys and shapes that :func:`open_clip_shapes` gives.

    Raises:
        ValueError: naming the unexpected, missing and mis-shaped keys, the first of each kind.
    """
    shapes = [
        f"{key} of shape {tuple(found[key])}, not {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != tuple(shape)
    ]
    problems = [
        f"it {verb} {_first(keys)}"
        for verb, keys in (
            ("has unexpected", [key for key in found if key not in expected]),
            ("misses", [key for key in expected if key not in found]),
            ("has", shapes),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"open_clip state dict ({len(found)} tensors) must fit the model: {'; '.join(problems)}"
        )


def _first(names: Sequence[str]) -> str:
    """Return the first three names, cut where they are very long, and the number of others."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{name:.120}" for name in names[:3]) + rest


def _heads(name: str, config: ModelConfig) -> int:
    return config.vision.heads if name.startswith("visual.") else config.text.heads


def _blocks(prefix: str, tower: VisionTower | TextTower) -> Mapping[str, tuple[int, ...]]:
    width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
    block: dict[str, tuple[int, ...]] = {
        **_norm("ln_1", width),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        **_linear("attn.out_proj", width, width),
        **_norm("ln_2", width),
        **_linear("mlp.c_fc", width, hidden),
        **_linear("mlp.c_proj", hidden, width),
    }
    return {
        f"{prefix}.{index}.{name}": shape
        for index, own in enumerate(own_shapes(tower))
        for name, shape in {**block, **{f"attn.{k}": v for k, v in own.items()}}.items()
    }


def _norm(name: str, width: int) -> Mapping[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> Mapping[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
