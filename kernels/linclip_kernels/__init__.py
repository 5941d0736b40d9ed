"""Linear attention with the affine kernel 1 + q.k: one function, several ways to compute it."""

from typing import Literal

import torch
from torch import Tensor

from linclip_kernels.linear_attention.eager import Form, linear_attention_eager
from linclip_kernels.linear_attention.reference import linear_attention_reference

__all__ = ["linear_attention", "linear_attention_reference"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    normalized: bool = False,
    qk_norm: bool = True,
    score_scale: float = 0.5,
    length_exponent: float = 0.0,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> Tensor:
    """Attend with scores 1 + q.k in time and memory linear in the number of tokens.

    With n keys (n = N, or n = i for row i when causal), q and k of unit length:
    normalized (Eq. 4): o_i = sum_n (1 + q_i.k_n) v_n / sum_n (1 + q_i.k_n);
    otherwise (Eq. 7): o_i = score_scale * n^-length_exponent * sum_n (1 + q_i.k_n) v_n.

    Args:
        q, k: [B, N, H, D], float32, bfloat16, float16 or (torch only) float64; any strides, so that
            views of a packed [B, N, H, 3, D] are read in place.
        v: [B, N, H, Dv], dtype and device of q.
        causal: Row i sees keys 1 to i.
        normalized: Divide by the sum of scores, held above 1e-6 per key. Where it is held no
            gradient passes through it. A row with one key returns that key's value.
        qk_norm: Scale the rows of q and k by (|x|^2 + 1e-6)^-1/2. Without it the caller keeps
            |q.k| <= 1.
        score_scale: Factor of the unnormalised form.
        length_exponent: Power of 1/n in the unnormalised form.
        backend: "triton", "torch", or "auto": Triton for CUDA tensors, torch otherwise.

    Returns:
        o [B, N, H, Dv], contiguous, in the dtype of v. It can be differentiated once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, N = 0, or a backend that cannot take
            these tensors.

    Source: arXiv 2604.10064, Eq. 4 and Eq. 7.
    """
    _check_tensors(q, k, v)
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend ({backend!r}) must be 'auto', 'torch' or 'triton'")
    # With one key both orders are the same, and the causal one knows the limit of its first row.
    causal = causal or q.shape[1] == 1
    form = Form(causal, normalized, qk_norm, score_scale, length_exponent)
    if backend == "torch" or (backend == "auto" and q.device.type != "cuda"):
        return linear_attention_eager(q, k, v, form)
    _check_triton_tensors(q, v)
    # Imported here: compiling decorators, and TRITON_INTERPRET, act at import.
    from linclip_kernels.linear_attention.fused import linear_attention_triton

    return linear_attention_triton(q, k, v, form)


def _check_triton_tensors(q: Tensor, v: Tensor) -> None:
    import triton

    for name, dim in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if not 16 <= dim <= 256:
            rule = "must be in 16..256 for the Triton kernels; use backend='torch'"
            raise ValueError(f"{name}.shape[-1] ({dim}) {rule}")
    if q.dtype == torch.float64:
        raise ValueError(f"q.dtype ({q.dtype}) must not be float64 for the Triton kernels")
    if q.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"backend ('triton') must have CUDA tensors, not {q.device.type}; "
            "TRITON_INTERPRET=1 runs the kernels on the CPU"
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(
                f"{name}.shape {tuple(x.shape)} must be [B, N, H, D] with no empty axis"
            )
        if x.dtype not in dtypes:
            raise ValueError(f"{name}.dtype ({x.dtype}) must be a floating type of 16 to 64 bits")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}.dtype ({x.dtype}) must equal q.dtype ({q.dtype})")
        if x.device != q.device:
            raise ValueError(f"{name}.device ({x.device}) must equal q.device ({q.device})")
    if k.shape != q.shape:
        raise ValueError(f"k.shape {tuple(k.shape)} must equal q.shape {tuple(q.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"v.shape {tuple(v.shape)} must start with q's [B, N, H] {tuple(q.shape[:3])}"
        )
