"""Self-attention: a module of this package for every kind, named as its ``kind`` in the config.

Such a module has one class, ``Attention``, a subclass of
:class:`~ds_linclip.model.attention.base.SelfAttention`.
"""

from importlib import import_module

from ds_linclip.config import AttentionSettings, TextTower, VisionTower
from ds_linclip.model.attention.base import SelfAttention
from ds_linclip.model.attention.patches import Patches

__all__ = ["Patches", "SelfAttention", "attention_class", "own_shapes"]


def attention_class(settings: AttentionSettings) -> type[SelfAttention]:
    """Return the class that computes the kind of attention of ``settings``."""
    module = import_module(f"{__name__}.{settings.kind}")
    found: type[SelfAttention] = module.Attention
    return found


def own_shapes(tower: VisionTower | TextTower) -> list[dict[str, tuple[int, ...]]]:
    """Return, for every layer, name and unsplit shape of the parameters that its attention has and
    softmax attention has not."""
    return [
        attention_class(each).own_shapes(each, tower.width, tower.heads, causal=tower.causal)
        for each in tower.attentions
    ]
