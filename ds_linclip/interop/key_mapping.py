"""Names, shapes and layout of parameters in open_clip's state dict.

The only mapping, shared by live models, checkpoints and imported weights.
"""

from collections.abc import Mapping, Sequence

import torch
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


def open_clip_key(name: str, config: ModelConfig) -> str:
    """Return open_clip's name of the parameter ``name`` of a :class:`~ds_linclip.model.CLIP`.

    An image tower without a class token has the names of timm, which open_clip takes such towers
    from.
    """
    if name == "text.proj":
        return "text_projection.weight" if config.text.proj_bias else "text_projection"
    if name == "text.proj_bias":
        return "text_projection.bias"
    if name.startswith("visual.") and not config.vision.class_token:
        return _timm_key(name, config.vision)
    key = name.removeprefix("text.").replace("blocks.", "transformer.resblocks.")
    return key.replace(".attn.qkv.", ".attn.in_proj_")


def to_open_clip_layout(name: str, full: Tensor, config: ModelConfig) -> Tensor:
    """Return the unsplit parameter ``name`` in open_clip's layout: q, k, v stacked; scalars [];
    projections [out, in] where they are linear layers."""
    if num_parts := _num_parts(name):
        parts = full.unflatten(0, (_heads(name, config), num_parts, -1))
        return parts.transpose(0, 1).flatten(0, 2)
    if _is_linear(name, config):
        return full.t().contiguous()
    leading = _num_leading(name, config)
    return full.reshape(()) if name in SCALARS else full[(None,) * leading]


def from_open_clip_layout(name: str, full: Tensor, config: ModelConfig) -> Tensor:
    """Invert :func:`to_open_clip_layout`: q, k, v of each head together; scalars [1]."""
    if num_parts := _num_parts(name):
        parts = full.unflatten(0, (num_parts, _heads(name, config), -1))
        return parts.transpose(0, 1).flatten(0, 2)
    if _is_linear(name, config):
        return full.t()
    leading = _num_leading(name, config)
    return full.reshape(1) if name in SCALARS else full[(0,) * leading]


def open_clip_shapes(config: ModelConfig, *, with_bias: bool) -> dict[str, tuple[int, ...]]:
    """Return every key of open_clip's state dict with its shape; ``with_bias`` with a
    ``logit_bias``, as with the sigmoid loss."""
    shapes = _image_shapes(config) | _text_shapes(config)
    shapes |= dict.fromkeys(SCALARS if with_bias else SCALARS[:1], (1,))
    return {
        open_clip_key(name, config): tuple(
            to_open_clip_layout(name, torch.empty(shape, device="meta"), config).shape
        )
        for name, shape in shapes.items()
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


#: Parts of our names of an image tower -> those of timm.
_TIMM_PARTS = {
    "conv1": "patch_embed.proj",
    "positional_embedding": "pos_embed",
    "ln_pre": "norm_pre",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "ls_1": "ls1",
    "ls_2": "ls2",
    "out_proj": "proj",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "pool": "attn_pool",
}


def _timm_key(name: str, tower: VisionTower) -> str:
    if name == "visual.proj":
        return "visual.head.proj.weight"
    last_norm = "fc_norm" if tower.final_ln_after_pool else "norm"
    renamed = _TIMM_PARTS | {"visual": "visual.trunk", "ln_post": last_norm}
    return ".".join(renamed.get(part, part) for part in name.split("."))


def _num_parts(name: str) -> int:
    """Return how many projections a parameter holds, head by head; 0: another parameter."""
    return 3 if ".attn.qkv." in name else 2 if ".pool.kv." in name else 0


def _is_linear(name: str, config: ModelConfig) -> bool:
    """Return whether a parameter [in, out] is the weight [out, in] of a linear layer there."""
    if name == "visual.proj":
        return not config.vision.class_token
    return name == "text.proj" and config.text.proj_bias


def _num_leading(name: str, config: ModelConfig) -> int:
    """Return how many dimensions of size 1 a parameter has there before its own."""
    if config.vision.class_token:
        return 0
    return {"visual.positional_embedding": 1, "visual.pool.latent": 2}.get(name, 0)


def _heads(name: str, config: ModelConfig) -> int:
    return config.vision.heads if name.startswith("visual.") else config.text.heads


def _image_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and unsplit shape of the parameters of the image tower."""
    tower, width = config.vision, config.vision.width
    on_patches = "class_embedding" if tower.class_token else "conv1.bias"
    shapes: dict[str, tuple[int, ...]] = {
        on_patches: (width,),
        "positional_embedding": (tower.num_tokens, width),
        "conv1.weight": (width, 3, tower.patch_size, tower.patch_size),
    }
    if tower.proj_type == "linear":
        shapes["proj"] = (width, config.embed_dim)
    if not tower.no_ln_pre:
        shapes |= _norm("ln_pre", width)
    shapes |= {**_blocks(tower), **_norm("ln_post", width)}
    if tower.pool_type == "map":
        shapes |= {
            "pool.latent": (width,),
            **_linear("pool.q", width, width),
            **_linear("pool.kv", width, 2 * width),
            **_linear("pool.proj", width, width),
            **_norm("pool.norm", width),
            **_mlp("pool.mlp", tower),
        }
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def _text_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and unsplit shape of the parameters of the text tower."""
    tower = config.text
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (tower.vocab_size, tower.width),
        "positional_embedding": (tower.context_length, tower.width),
        "proj": (tower.width, config.embed_dim),
    }
    if tower.proj_bias:
        shapes["proj_bias"] = (config.embed_dim,)
    shapes |= {**_blocks(tower), **_norm("ln_final", tower.width)}
    return {f"text.{name}": shape for name, shape in shapes.items()}


def _blocks(tower: VisionTower | TextTower) -> Mapping[str, tuple[int, ...]]:
    width, has_scales = tower.width, tower.ls_init_value is not None
    block: dict[str, tuple[int, ...]] = {
        **_norm("ln_1", width),
        **_linear("attn.qkv", width, 3 * width),
        **_linear("attn.out_proj", width, width),
        **({"ls_1.gamma": (width,)} if has_scales else {}),
        **_norm("ln_2", width),
        **_mlp("mlp", tower),
        **({"ls_2.gamma": (width,)} if has_scales else {}),
    }
    return {
        f"blocks.{index}.{name}": shape
        for index, own in enumerate(own_shapes(tower))
        for name, shape in {**block, **{f"attn.{k}": v for k, v in own.items()}}.items()
    }


def _mlp(name: str, tower: VisionTower | TextTower) -> Mapping[str, tuple[int, ...]]:
    width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
    return {**_linear(f"{name}.c_fc", width, hidden), **_linear(f"{name}.c_proj", hidden, width)}


def _norm(name: str, width: int) -> Mapping[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> Mapping[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
