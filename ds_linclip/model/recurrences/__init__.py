"""Linear attentions whose state forgets and overwrites: pure functions over [B, N, H, D]."""

from ds_linclip.model.recurrences.gated_delta_rule import gated_delta_rule, gated_delta_rule_flops
from ds_linclip.model.recurrences.rwkv7 import dplr, dplr_flops

__all__ = ["dplr", "dplr_flops", "gated_delta_rule", "gated_delta_rule_flops"]
