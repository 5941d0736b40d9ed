"""Checks of the public functions' arguments, casts under autocast, and the choice of backend."""

import reprlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from linclip_kernels.linear_attention import torch_backend
from linclip_kernels.linear_attention.quadratic_map import num_quadratic_features
from linclip_kernels.linear_attention.variant import Variant

__all__ = [
    "Backend",
    "FeatureMap",
    "as_boundaries",
    "cast_for_autocast",
    "check_choice",
    "check_packed",
    "check_state",
    "check_tensors",
    "check_variant",
    "implementation",
    "num_sequences",
    "state_dtype",
    "takes_triton",
    "without_autocast",
]

FeatureMap = Literal["affine", "quadratic", "relu", "softplus", "identity"]
Backend = Literal["auto", "torch", "triton"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: The state counts keys in float32.
MAX_TOKENS = 2**24


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the state for queries or keys ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast all tensors to autocast's dtype where it is on, as torch's own attention does."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in DTYPES[1:] else x for x in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, in which an operator chooses its dtypes itself."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # meta has no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_choice(name: str, value: str, choices: Any) -> None:
    """Check that an argument is one of the values of a Literal type."""
    known = choices.__args__  # typing.get_args takes six calls, as many as other checks together
    if value not in known:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(known)}")


def check_variant(variant: Variant) -> None:
    """Check that the formula is one of those that the operator has."""
    check_choice("feature_map", variant.feature_map, FeatureMap)
    if variant.centered and variant.feature_map != "affine":
        raise ValueError(f"feature_map ({variant.feature_map!r}) must be 'affine' when centered")


def check_tensors(*, may_be_empty: bool = False, **tensors: Tensor) -> None:
    """Check that q, k, v, or some of them, are [B, N, H, D] with the same B, N, H, dtype, device.

    Args:
        may_be_empty: Whether N can be 0.
        tensors: The tensors, by the names that messages use.
    """
    first, x = next(iter(tensors.items()))
    for name, y in tensors.items():
        if not isinstance(y, Tensor):
            raise ValueError(f"{name} ({type(y).__name__}) must be a torch.Tensor")
        if y.dim() != 4 or 0 in (*y.shape[:1], *y.shape[2 if may_be_empty else 1 :]):
            axes = "axis but N" if may_be_empty else "axis"
            shape = tuple(y.shape)
            raise ValueError(f"{name}.shape {shape} must be [B, N, H, D] with no empty {axes}")
        if y.dtype not in DTYPES:
            raise ValueError(f"{name}.dtype ({y.dtype}) must be a floating type of 16 to 64 bits")
        if y.dtype != x.dtype:
            raise ValueError(f"{name}.dtype ({y.dtype}) must equal {first}.dtype ({x.dtype})")
        if y.device != x.device:
            raise ValueError(f"{name}.device ({y.device}) must equal {first}.device ({x.device})")
    for name, y in tensors.items():
        if name == "k" and y.shape != x.shape:
            raise ValueError(f"k.shape {tuple(y.shape)} must equal {first}.shape {tuple(x.shape)}")
        if y.shape[:3] != x.shape[:3]:
            rule = f"must start with {first}'s [B, N, H] {tuple(x.shape[:3])}"
            raise ValueError(f"{name}.shape {tuple(y.shape)} {rule}")
    if x.shape[1] > MAX_TOKENS:
        raise ValueError(f"{first}.shape[1] ({x.shape[1]}) must be at most {MAX_TOKENS} tokens")


def check_packed(qkv: Tensor) -> None:
    """Check that q, k and v are packed as [B, N, H, 3, D]."""
    if not isinstance(qkv, Tensor):
        raise ValueError(f"qkv ({type(qkv).__name__}) must be a torch.Tensor")
    if qkv.dim() != 5 or qkv.shape[3] != 3 or 0 in qkv.shape:
        raise ValueError(f"qkv.shape {tuple(qkv.shape)} must be [B, N, H, 3, D], no axis empty")
    check_tensors(qkv=qkv.select(3, 0))


def num_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences in q [B, N, H, D]."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def as_boundaries(cu_seqlens: Tensor | Sequence[int] | None, q: Tensor) -> Tensor | None:
    """Return the boundaries of sequences as a tensor, after a check of everything but values."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor):
        try:
            cu_seqlens = torch.tensor(cu_seqlens, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"cu_seqlens ({reprlib.repr(cu_seqlens)}) must be integers") from error
    dtype, device = cu_seqlens.dtype, cu_seqlens.device
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens.shape {tuple(cu_seqlens.shape)} must be [S + 1], S >= 1")
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"cu_seqlens.dtype ({dtype}) must be an integer type")
    if device.type != "cpu" and device != q.device:
        raise ValueError(f"cu_seqlens.device ({device}) must be cpu or q.device ({q.device})")
    if q.shape[0] != 1:
        raise ValueError(f"q.shape[0] ({q.shape[0]}) must be 1 when cu_seqlens is given")
    return cu_seqlens


def check_state(
    name: str,
    state: Tensor,
    q: Tensor,
    feature_map: str,
    *,
    num_sequences: int,
    value_dim: int | None = None,
) -> None:
    """Check that a state is [S, H, F + 1, Dv + 1] with the H, dtype and device of q.

    Args:
        name: The name of the state in messages.
        state: The state.
        q: [B, N, H, D].
        feature_map: The map that gives F from D.
        num_sequences: S.
        value_dim: Dv; None: any.
    """
    key_dim = q.shape[3]
    num_features = num_quadratic_features(key_dim) if feature_map == "quadratic" else key_dim
    rows = num_sequences, q.shape[2], num_features + 1
    columns = "Dv + 1" if value_dim is None else value_dim + 1
    fits = state.dim() == 4 and state.shape[:3] == rows and state.shape[3] > 1
    if not fits or value_dim not in (None, state.shape[3] - 1):
        wanted = ", ".join(map(str, (*rows, columns)))
        raise ValueError(f"{name}.shape {tuple(state.shape)} must be ({wanted})")
    if state.dtype != state_dtype(q):
        raise ValueError(f"{name}.dtype ({state.dtype}) must be {state_dtype(q)}")
    if state.device != q.device:
        raise ValueError(f"{name}.device ({state.device}) must equal q.device ({q.device})")


def takes_triton(backend: str, x: Tensor, dims: dict[str, int]) -> bool:
    """Return whether to use Triton, after a check that its kernels support the tensors.

    Args:
        backend: "auto", "torch" or "triton".
        x: Any of the tensors, which are equal in dtype and device.
        dims: Widths of keys and values, by the names that messages use.
    """
    check_choice("backend", backend, Backend)
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return False
    for name in dims:
        if not 16 <= dims[name] <= 256:
            rule = "must be in 16..256 for the Triton kernels; use backend='torch'"
            raise ValueError(f"{name} ({dims[name]}) {rule}")
    if x.dtype == torch.float64:
        raise ValueError("dtype (torch.float64) must not be float64 for the Triton kernels")
    if x.device.type not in ("cuda", "meta") and not _interprets_kernels():
        raise ValueError(
            f"backend ('triton') must have CUDA tensors, not {x.device.type}; "
            "TRITON_INTERPRET=1 runs the kernels on the CPU"
        )
    return True


@torch.compiler.assume_constant_result
def _interprets_kernels() -> bool:
    import triton

    return triton.knobs.runtime.interpret


@cache
def implementation(use_triton: bool) -> Any:
    """Return the module that computes: torch_backend, or triton_backend.backend."""
    if not use_triton:
        return torch_backend
    # Imported here: compiling decorators, and TRITON_INTERPRET, act at import.
    from linclip_kernels.linear_attention.triton_backend import backend

    return backend
