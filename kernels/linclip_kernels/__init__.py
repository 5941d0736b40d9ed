"""Linear attention: the operator, its two halves, and the definition they are tested against."""

from linclip_kernels.linear_attention.op import linear_attention, linear_attention_packed
from linclip_kernels.linear_attention.reference import linear_attention_reference
from linclip_kernels.linear_attention.state import (
    linear_attention_from_state,
    linear_attention_state,
)

__all__ = [
    "linear_attention",
    "linear_attention_from_state",
    "linear_attention_packed",
    "linear_attention_reference",
    "linear_attention_state",
]
