"""Linear attentions whose state forgets and overwrites: pure functions over [B, N, H, D]."""

from ds_linclip.model.recurrences.gated_delta_rule import gated_delta_rule
from ds_linclip.model.recurrences.rwkv7 import dplr

__all__ = ["dplr", "gated_delta_rule"]
