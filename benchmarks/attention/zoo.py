"""The kinds of attention that measurements and studies compare, by the names they show."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from ds_linclip.config import ATTENTION_KINDS, Attention, SoftmaxAttention, build_section

__all__ = ["ZOO", "overrides_of", "settings_of"]

#: Name -> the values of ``model.vision.attention``, beside defaults. Softmax comes first.
ZOO: dict[str, Mapping[str, Any]] = {
    "softmax": {"kind": "softmax"},
    "Eq. 7": {"kind": "linear"},
    "Eq. 4": {"kind": "linear", "normalized": True},
    "quadratic": {"kind": "linear", "normalized": True, "feature_map": "quadratic"},
    "Eq. 4 + 3x3": {"kind": "linear", "normalized": True, "local": {"kind": "depthwise"}},
    "frequency": {"kind": "frequency"},
    "frequency, tokens": {"kind": "frequency", "axis": "tokens"},
}


def settings_of(name: str, *, causal: bool = False) -> Attention:
    """Return the settings of a name in :data:`ZOO`; softmax for a text tower where the kind cannot
    be causal."""
    values = ZOO[name]
    found: Attention = build_section(values, ATTENTION_KINDS[values["kind"]], "attention")
    if causal and (not found.may_be_causal or any(found.problems(causal=True))):
        return SoftmaxAttention()
    return found


def overrides_of(name: str) -> list[str]:
    """Return the overrides that give both towers the attention of a name in :data:`ZOO`."""
    towers = {"vision": settings_of(name), "text": settings_of(name, causal=True)}
    return [
        f"model.{tower}.attention={yaml.safe_dump(asdict(each), default_flow_style=True).strip()}"
        for tower, each in towers.items()
    ]
