"""The kinds of attention that measurements and studies compare, by the names they show."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from ds_linclip.config import ATTENTION_KINDS, Attention, SoftmaxAttention, build_section

__all__ = ["SLOW", "ZOO", "overrides_of", "settings_of"]


#: Name -> the values of ``model.vision.attention``, beside defaults. Softmax comes first.
ZOO: dict[str, Mapping[str, Any]] = {
    "softmax": {"kind": "softmax"},
    "window": {"kind": "window"},
    "eq7": {"kind": "linear"},
    "eq4": {"kind": "linear", "normalized": True},
    "eq4-local": {"kind": "linear", "normalized": True, "local": {"kind": "depthwise"}},
    "quadratic": {"kind": "linear", "normalized": True, "feature_map": "quadratic"},
    "fast-max": {"kind": "fast", "qk_norm": "max"},
    "qt": {"kind": "qt"},
    "qt-full": {"kind": "qt", "form": "full"},
    "inline": {"kind": "inline"},
    "inline-local": {"kind": "inline", "local": {"kind": "predicted"}},
    "luna": {"kind": "luna"},
    "hedgehog": {"kind": "hedgehog"},
    "focused": {"kind": "focused", "local": {"kind": "depthwise", "size": 5}},
    "polaformer": {"kind": "polaformer", "local": {"kind": "depthwise", "size": 5}},
    "mila": {"kind": "mila", "local": {"kind": "depthwise"}},
    "gated-delta": {"kind": "gated_delta"},
    "frequency": {"kind": "frequency"},
    "frequency-tokens": {"kind": "frequency", "axis": "tokens"},
}

#: Names whose features are many products of entries: many times as slow as the others on a CPU.
SLOW = ("quadratic", "qt-full")


def settings_of(name: str, *, causal: bool = False) -> Attention:
    """Return the settings of a name in :data:`ZOO`; softmax for a text tower where they cannot be
    causal."""
    values = ZOO[name]
    found: Attention = build_section(values, ATTENTION_KINDS[values["kind"]], "attention")
    return SoftmaxAttention() if causal and any(found.problems(causal=True)) else found


def overrides_of(name: str) -> list[str]:
    """Return the overrides that give both towers the attention of a name in :data:`ZOO`."""
    towers = {"vision": settings_of(name), "text": settings_of(name, causal=True)}
    return [
        f"model.{tower}.attention={yaml.safe_dump(asdict(each), default_flow_style=True).strip()}"
        for tower, each in towers.items()
    ]
