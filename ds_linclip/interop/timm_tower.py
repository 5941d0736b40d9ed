"""Image towers that open_clip takes from timm: the plain ViT without a class token of SigLIP."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
from open_clip.timm_model import TimmModel
from timm.layers import GELUTanh
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ds_linclip.config import ModelConfig, SoftmaxAttention, VisionTower
from ds_linclip.interop.key_mapping import check_shapes, open_clip_shapes

__all__ = ["timm_settings", "timm_tower"]

#: Settings of open_clip and the values that have no effect on features or that are required here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "timm_model_pretrained": (False, True),
    "timm_proj_bias": (False,),
    "timm_drop": (0,),
    "timm_drop_path": (0, None),
}
#: Activation -> modules of it.
_ACTIVATIONS: dict[str, tuple[type[nn.Module], ...]] = {
    "gelu": (nn.GELU,),
    "gelu_tanh": (GELUTanh,),
}
#: Width -> timm's word for it.
_SIZES = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}


def timm_tower(vision_cfg: Mapping[str, Any], embed_dim: Any) -> VisionTower:
    """Return the image tower of a ``vision_cfg`` with ``timm_model_name``, with softmax attention.

    The architecture is read from timm's own model, made without memory for its weights.

    Raises:
        ValueError: when timm has no such model, or it is not a plain ViT without a class token.
    """
    cfg = dict(vision_cfg)
    name, pool = cfg.pop("timm_model_name"), cfg.pop("timm_pool", "avg")
    proj, image_size = cfg.pop("timm_proj", "linear"), cfg.pop("image_size", None)
    # With other names timm may access the network.
    if not isinstance(name, str) or name not in timm.list_models("vit_*"):
        raise ValueError(f"timm_model_name ({name}) must be one of timm's ViTs")
    for key, allowed in _FIXED.items():
        if (value := cfg.pop(key, allowed[0])) not in allowed:
            raise ValueError(f"{key} ({value}) must be {allowed[0]}")
    if cfg:
        raise ValueError(f"timm_model_name ({name}) goes with no {', '.join(sorted(cfg))}")
    for key, value, allowed in (
        ("timm_pool", pool, ("map", "avg")),
        ("timm_proj", proj, ("linear", "none")),
    ):
        if value not in allowed:
            raise ValueError(f"{key} ({value}) must be {' or '.join(allowed)}")
    try:
        with torch.device("meta"):
            model = TimmModel(name, embed_dim, pool=pool, proj=proj)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"timm_model_name ({name}) cannot be made by timm: {error}") from error
    tower = _read(name, model.trunk, pool, proj)
    if image_size is not None and image_size not in (tower.image_size[0], [*tower.image_size]):
        raise ValueError(
            f"image_size ({image_size}) must be that of timm_model_name ({name}), "
            f"{tower.image_size[0]}"
        )
    config = ModelConfig(embed_dim=embed_dim, vision=tower)
    shapes = open_clip_shapes(config, with_bias=False)
    expected = {key: shape for key, shape in shapes.items() if key.startswith("visual.")}
    found = {f"visual.{key}": tuple(value.shape) for key, value in model.state_dict().items()}
    try:
        check_shapes(found, expected)
    except ValueError as error:
        raise ValueError(f"timm_model_name ({name}) must be a plain ViT: {error}") from error
    return tower


def timm_settings(tower: VisionTower, embed_dim: int) -> dict[str, Any] | None:
    """Return the ``vision_cfg`` with which open_clip makes a tower with softmax attention; None
    when timm has no such model."""
    (height, width), size = tower.image_size, _SIZES.get(tower.width)
    if tower.class_token or height != width or size is None:
        return None
    gap = "_gap" if tower.pool_type == "avg" else ""
    settings = {
        "image_size": height,
        "timm_model_name": f"vit_{size}_patch{tower.patch_size}_siglip{gap}_{height}",
        "timm_model_pretrained": False,
        "timm_pool": tower.pool_type,
        "timm_proj": tower.proj_type,
    }
    try:
        made = timm_tower(settings, embed_dim)
    except ValueError:
        return None
    same: dict[str, Any] = {
        "patch_dropout": tower.patch_dropout,
        "attention": tower.attention,
        "attention_by_layer": tower.attention_by_layer,
    }
    return settings if replace(made, **same) == tower else None


def _read(name: str, trunk: Any, pool: Any, proj: Any) -> VisionTower:
    if type(trunk) is not VisionTransformer or trunk.num_prefix_tokens:
        raise ValueError(
            f"timm_model_name ({name}) must be a plain ViT without class or register tokens"
        )
    block: Any = trunk.blocks[0]
    activation: Any = next(
        (name for name, each in _ACTIVATIONS.items() if _is(block.mlp.act, each)), ""
    )
    last_norm: Any = trunk.fc_norm if isinstance(trunk.norm, nn.Identity) else trunk.norm
    if type(block.attn) is not Attention or not activation or not _is(last_norm, (nn.LayerNorm,)):
        raise ValueError(
            f"timm_model_name ({name}) must have plain attention, LayerNorm and GELU, exact or by "
            "tanh"
        )
    width, scales = trunk.embed_dim, block.ls1
    return VisionTower(
        image_size=trunk.patch_embed.img_size,
        patch_size=trunk.patch_embed.patch_size[0],
        width=width,
        layers=len(trunk.blocks),
        head_width=width // block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / width,
        activation=activation,
        norm_eps=last_norm.eps,
        ls_init_value=None if isinstance(scales, nn.Identity) else scales.init_values,
        class_token=False,
        pool_type=pool,
        no_ln_pre=isinstance(trunk.norm_pre, nn.Identity),
        final_ln_after_pool=last_norm is trunk.fc_norm,
        proj_type=proj,
        attention=SoftmaxAttention(),
    )


def _is(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    return isinstance(module, classes) and getattr(module, "approximate", "none") == "none"
