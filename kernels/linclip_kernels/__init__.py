"""Linear attention: one function, several ways to compute it."""

from linclip_kernels.linear_attention.operator import linear_attention
from linclip_kernels.linear_attention.reference import linear_attention_reference

__all__ = ["linear_attention", "linear_attention_reference"]
