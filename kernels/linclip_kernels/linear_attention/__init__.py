"""Variants of linear attention; use :func:`linclip_kernels.linear_attention`."""
