"""Implementations of attention that the benchmark compares, and their inputs."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_linclip.provenance import package_version
from linclip_eval.runtime.measure import Inputs
from linclip_kernels import linear_attention

__all__ = ["FORMS", "HEAD_DIM", "WORKS", "Implementation", "Operators", "batch_and_heads"]

WORKS = ("forward", "forward+backward")
HEAD_DIM, NUM_HEADS = 64, 16
#: (up to this many tokens, B * H): enough work at every length.
STREAMS = {
    "cuda": ((197, 4096), (577, 1024), (4096, 256), (16_384, 64), (float("inf"), 16)),
    "cpu": ((77, 64), (197, 32), (577, 16), (1025, 8), (4096, 4), (16_384, 2), (float("inf"), 1)),
}
FORMS: dict[str, dict[str, Any]] = {
    "linclip Eq. 7": {"causal": False, "normalized": False},
    "linclip Eq. 4": {"causal": False, "normalized": True},
    "linclip Eq. 7, causal": {"causal": True, "normalized": False},
    "linclip Eq. 4, quadratic": {"causal": False, "normalized": True, "feature_map": "quadratic"},
    "linclip Eq. 4, causal": {"causal": True, "normalized": True},
}


@dataclass(frozen=True)
class Implementation:
    """A function of q, k, v [B, N, H, D] from one of the families "linclip", "sdpa", "other"."""

    name: str
    family: str
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    causal: bool = False
    backend: SDPBackend | None = None

    @classmethod
    def available(cls, device: str) -> list["Implementation"]:
        """Return all implementations that run on a device, "cuda" or "cpu"."""
        found = [
            cls(name, "linclip", partial(linear_attention, **form), form["causal"])
            for name, form in FORMS.items()
        ]
        backends = {"flash": SDPBackend.FLASH_ATTENTION}
        if device == "cuda":
            backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
        for causal, (name, backend) in product((False, True), backends.items()):
            label = f"SDPA {name}, causal" if causal else f"SDPA {name}"
            found.append(cls(label, "sdpa", partial(_sdpa, causal=causal), causal, backend))
        found.append(cls("plain torch Eq. 7", "other", _plain_linear_attention))
        if device == "cuda" and package_version("flash-linear-attention"):
            found.append(cls("fla chunk_linear_attn, causal", "other", _fla, causal=True))
        return found

    def __call__(self, *inputs: Tensor) -> Tensor:
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            return self.function(*inputs)


class Operators:
    """Workload of :func:`linclip_eval.runtime.measure.measure`: causal or bidirectional operators.

    Inputs are random packed views of [B, N, H, 3, D], as in the model. Of all implementations, the
    causal ones are measured, or the others.
    """

    def __init__(
        self,
        implementations: Sequence[Implementation],
        device: str,
        dtype: torch.dtype,
        *,
        causal: bool,
    ) -> None:
        self.what = "causal" if causal else "bidirectional"
        self.device = torch.device(device)
        self.directions: Sequence[str] = WORKS
        self._dtype = dtype
        self._implementations = {one.name: one for one in implementations if one.causal == causal}
        self.growth: Mapping[str, int] = {
            name: 2 if one.family == "sdpa" else 1 for name, one in self._implementations.items()
        }

    def num_sequences(self, num_tokens: int) -> int:
        """Return B * H."""
        return math.prod(batch_and_heads(self.device.type, num_tokens))

    def inputs(self, num_tokens: int) -> Inputs:
        """Return q, k, v and an output gradient, [B, N, H, D] each."""
        batch, heads = batch_and_heads(self.device.type, num_tokens)
        packed = self._random(batch, num_tokens, heads, 3, HEAD_DIM)
        inputs = tuple(x.requires_grad_() for x in packed.unbind(3))
        return inputs, self._random(batch, num_tokens, heads, HEAD_DIM)

    def call(self, attention: str, direction: str, inputs: Inputs) -> Callable[[], object]:
        """Return a forward, or a forward and backward, of one implementation."""
        function, (tensors, grad) = self._implementations[attention], inputs

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        def forward_and_backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*tensors), tensors, grad)

        return forward if direction == "forward" else forward_and_backward

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self._dtype)


def batch_and_heads(device: str, num_tokens: int) -> tuple[int, int]:
    """Return B and H of the inputs of this length."""
    streams = next(streams for limit, streams in STREAMS[device] if num_tokens <= limit)
    heads = min(NUM_HEADS, streams)
    return streams // heads, heads


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _plain_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute Eq. 7 as one writes it down, left to autograd."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    out = 0.5 * (v.sum(-2, keepdim=True) + q @ (k.mT @ v))
    return out.transpose(1, 2)


def _fla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute less than ours: no q/k norm, and no 1 + in its scores."""
    chunked = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    out: Tensor = chunked(q, k, v, scale=0.5, normalize=False)[0]
    return out
