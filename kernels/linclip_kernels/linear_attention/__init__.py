"""The forms of linear attention; use :func:`linclip_kernels.linear_attention`."""
