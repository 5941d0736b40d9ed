"""Gated DeltaNet: a state that decays, and where a key overwrites its value (arXiv 2412.06464,
Eq. 10). Images are scanned in both directions, as arXiv 2405.18425 does with gated linear
attention.
"""

import math
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.model.attention.base import SelfAttention
from ds_linclip.model.attention.parameters import OwnParameter, uniform
from ds_linclip.model.attention.patches import Patches
from ds_linclip.model.attention.rows import unit, wide_dtype, widened
from ds_linclip.model.recurrences import gated_delta_rule
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.tensor_parallel import sum_gradients_of_heads

__all__ = ["Attention"]

#: The step sizes, softplus(dt_bias), that layers begin with, and that of a softmax model's.
_STEP_SIZES, _STEP_SIZE_FROM_SOFTMAX = (1e-3, 1e-1), 1e-3
_NORM_EPS = 1e-5


class Attention(SelfAttention):
    """The gated delta rule on convolved queries, keys and values.

    A scan forwards is a head, and for images so is one backwards: between :meth:`prepare` and
    :meth:`finish` there are twice the heads, first all that scan forwards. Every scan has taps and
    gates of its own; their rows are ordered [head, scan].
    """

    def __init__(self, width: int, heads: int, settings: Any, mesh: Mesh, **options: Any) -> None:
        super().__init__(width, heads, settings, mesh, **options)
        self.num_scans = _num_scans(causal=self.causal)
        uses_fla = settings.implementation == "fla"
        if uses_fla and mesh.device.type == "cuda" and find_spec("fla") is None:
            raise ValueError(
                "attention implementation (fla) must be installed: pip install "
                "flash-linear-attention, or take torch"
            )

    @classmethod
    def own_parameters(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> Mapping[str, OwnParameter]:
        num_scans = _num_scans(causal=causal)
        rows, num_taps = num_scans * heads, num_scans * settings.conv_size
        linear = uniform(width)
        own = {
            # A row per row of the joint projection; per scan from the earliest token to the token.
            "conv_weight": OwnParameter((3 * width, num_taps), uniform(settings.conv_size)),
            "beta_weight": OwnParameter((rows, width), linear),
            "decay_weight": OwnParameter((rows, width), linear),
            "a_log": OwnParameter((rows,), _init_a_log),
            "dt_bias": OwnParameter((rows,), _init_dt_bias),
            "norm_weight": OwnParameter((width,), nn.init.ones_),
        }
        return own | (
            {"gate_weight": OwnParameter((width, width), linear)} if settings.gate else {}
        )

    @classmethod
    def num_summed(cls, settings: Any, width: int, num_tokens: int, *, causal: bool) -> int:
        return width * num_tokens

    @classmethod
    def projection_flops(cls, settings: Any, width: int, heads: int, *, causal: bool) -> float:
        gates = 2 * heads * _num_scans(causal=causal)
        return 2 * width * (gates + width * settings.gate)

    @classmethod
    def flops(cls, settings: Any, head_dim: int, num_tokens: int, *, causal: bool) -> float:
        # A token reads the state with its key and its query, and adds to it; not the chunks.
        state, taps = 6 * head_dim**2, 2 * 3 * settings.conv_size * head_dim
        return _num_scans(causal=causal) * (state + taps)

    def forward(self, x: Tensor, patches: Patches | None = None) -> Tensor:
        qkv = self.qkv(x)
        x = self._read_again(x, qkv.dtype)
        o = self._finish(self.attend(*self._prepare(qkv, x)), x)
        return self.out_proj(o.flatten(2))

    def prepare(self, x: Tensor, patches: Patches | None) -> tuple[Tensor, ...]:
        qkv = self.qkv(x)
        return self._prepare(qkv, self._read_again(x, qkv.dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        use_fla = self.settings.implementation == "fla" and q.is_cuda
        rule = partial(gated_delta_rule, backend="fla" if use_fla else "torch")
        return self._turn(rule(*(self._turn(each) for each in (q, k, v, *more))))

    def finish(self, o: Tensor, x: Tensor, v: Tensor, patches: Patches | None) -> Tensor:
        return self._finish(o, self._read_again(x, v.dtype))

    def start_from_softmax(self) -> None:
        """Begin as InfiniteVL's distillation does: no mixing of neighbours, hardly any decay."""
        for name in ("conv_weight", "beta_weight", "decay_weight", "a_log"):
            nn.init.zeros_(self.get_parameter(name))
        with torch.no_grad():
            size = self.settings.conv_size
            self.get_parameter("conv_weight").unflatten(1, (self.num_scans, size))[..., -1] = 1
            self.get_parameter("dt_bias").fill_(math.log(math.expm1(_STEP_SIZE_FROM_SOFTMAX)))

    def _read_again(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the layer's input for the gates; the backward sums its gradient over ranks."""
        return sum_gradients_of_heads(x.to(dtype), self.mesh)

    def _prepare(self, qkv: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        mixed = F.silu(self._convolve(qkv))  # [B, N, scans * H * 3 * D]
        heads = self.num_scans * self.local_heads
        q, k, v = mixed.unflatten(2, (heads, 3, self.head_dim)).unbind(3)
        dtype = wide_dtype(v)
        q = (self.head_dim**-0.5 * unit(widened(q))).to(v.dtype)
        k = unit(widened(k)).to(v.dtype)
        beta = self._per_scan(x, "beta_weight").to(dtype).sigmoid()
        step = F.softplus(
            self._per_scan(x, "decay_weight").to(dtype) + self._per_head("dt_bias", dtype)
        )
        return q, k, v, beta, -self._per_head("a_log", dtype).exp() * step

    def _convolve(self, qkv: Tensor) -> Tensor:
        """Return the depthwise convolution in every scan of [B, N, C], [B, N, scans * C]."""
        size = self.settings.conv_size
        weight = self.get_parameter("conv_weight").to(qkv.dtype)
        weight = weight[:, None].unflatten(2, (self.num_scans, size))  # [C, 1, scans, size]
        image = F.pad(qkv.transpose(1, 2), (size - 1, 0 if self.causal else size - 1))
        num_tokens, found = qkv.shape[1], []
        for scan in range(self.num_scans):
            taps = weight[:, :, scan].flip(2) if scan else weight[:, :, scan]
            start = scan * (size - 1)
            part = image[:, :, start : start + num_tokens + size - 1]
            found.append(F.conv1d(part, taps, groups=len(taps)))
        return torch.cat(found, dim=1).transpose(1, 2)

    def _per_scan(self, x: Tensor, name: str) -> Tensor:
        """Return the product [B, N, scans * H] of the input and a weight [H * scans, width]."""
        product = F.linear(x, self.get_parameter(name).to(x.dtype))
        return self._scans_first(product)

    def _per_head(self, name: str, dtype: torch.dtype) -> Tensor:
        return self._scans_first(self.get_parameter(name).to(dtype))

    def _scans_first(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.local_heads, self.num_scans)).transpose(-1, -2).flatten(-2)

    def _turn(self, x: Tensor) -> Tensor:
        """Reverse the tokens of the heads that scan backwards."""
        if self.num_scans == 1:
            return x
        forwards, backwards = x.chunk(2, dim=2)
        return torch.cat([forwards, backwards.flip(1)], dim=2)

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        dtype, result_dtype = wide_dtype(o), o.dtype
        o = o.to(dtype).unflatten(2, (self.num_scans, self.local_heads)).mean(2)
        gain = self.get_parameter("norm_weight").to(dtype).view(self.local_heads, self.head_dim)
        o = F.rms_norm(o, (self.head_dim,), eps=_NORM_EPS) * gain
        if self.settings.gate:
            gate = F.linear(x, self.get_parameter("gate_weight").to(x.dtype))
            o = o * F.silu(gate.to(dtype)).view(o.shape)
        return o.to(result_dtype)


def _num_scans(*, causal: bool) -> int:
    return 1 if causal else 2


def _init_a_log(x: Tensor) -> None:
    x.uniform_(0, 16).clamp_(min=1e-4).log_()


def _init_dt_bias(x: Tensor) -> None:
    """Set the inverse softplus of step sizes with uniform logarithms."""
    low, high = map(math.log, _STEP_SIZES)
    x.uniform_(low, high).exp_().expm1_().log_()
