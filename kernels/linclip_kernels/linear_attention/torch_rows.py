"""Rows of q, k and v as the torch backend computes with them: their features, norms and factors.

float64 is computed in float64, everything else in float32. A constant feature precedes those of
queries and keys, and a one follows values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from linclip_kernels.linear_attention.variant import DENOMINATOR_EPS, NORM_EPS, Variant

__all__ = ["Keys", "Queries", "Rows", "by_head"]

#: An index into the rows of [B, H, N, *].
Rows = tuple[slice | Tensor, ...]


class _Rows:
    """Rows of q or k, and their features with the constant: ``phi`` [B, H, N, D + 1]."""

    def __init__(self, x: Tensor, constant: float, variant: Variant, scale: float = 1.0) -> None:
        self.variant, self.x, self.scale = variant, by_head(x), scale
        self.phi = self.x.new_empty(*self.x.shape[:-1], self.x.shape[-1] + 1)
        self.phi[..., 0], hat = constant, self.phi[..., 1:]
        if variant.qk_norm:
            square = torch.linalg.vecdot(self.x, self.x)
            inverse = (square + NORM_EPS).rsqrt_()
            # 0 * infinity is NaN: a row whose |x|^2 overflows is not scaled to zero.
            self.inverse = inverse.add_(square.mul_(0)).unsqueeze(-1)  # [B, H, N, 1]
            torch.mul(self.x, self.inverse, out=hat)
        else:
            hat.copy_(self.x)
        if variant.feature_map == "relu":
            hat.relu_()
        elif variant.feature_map == "softplus":
            hat.copy_(F.softplus(hat))
        if scale != 1:
            hat *= scale

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of the rows from that of phi without its constant [B, H, N, D]."""
        if self.scale != 1:
            grad *= self.scale
        if self.variant.feature_map == "relu":
            grad = grad * (self.x > 0)
        elif self.variant.feature_map == "softplus":
            hat = self.phi[..., 1:] / self.scale
            grad = grad * -torch.expm1(-hat)  # of log(1 + e^x), from its value
        if not self.variant.qk_norm:
            return grad
        along = torch.linalg.vecdot(self.x, grad).unsqueeze(-1) * self.inverse.square()
        return torch.addcmul(grad, self.x, along, value=-1).mul_(self.inverse)


class Keys(_Rows):
    """A piece of k, and of v with a one appended: ``v`` [B, H, N, Dv + 1]."""

    def __init__(self, k: Tensor, v: Tensor, piece: slice, variant: Variant) -> None:
        super().__init__(k[:, piece], 1.0, variant)
        self.v = _append(by_head(v[:, piece]), 1.0)

    def state(self) -> Tensor:
        return self.phi.mT @ self.v


class Queries(_Rows):
    """A piece of q, and how its rows are scaled.

    Args:
        num_keys: Keys in view: of the first row if causal, otherwise of every row.
        single: Index of the rows of [B, H, N, *] whose only key's weight is set.
    """

    def __init__(
        self,
        q: Tensor,
        piece: slice,
        num_keys: float | Tensor,
        single: Rows | None,
        variant: Variant,
    ) -> None:
        super().__init__(q[:, piece], float(variant.has_constant), variant, variant.qk_scale)
        self.num_keys = num_keys
        self.single = single
        if single is not None:
            self.phi[(*single, ..., slice(1, None))] = 0  # the score is the constant

    def outputs(self, y: Tensor) -> Tensor:
        """Return o [B, H, N, Dv] from numerator and denominator [B, H, N, Dv + 1]."""
        return y[..., :-1].mul_(self._scale(y)[0])

    def outputs_backward(self, grad: Tensor, y: Tensor | None) -> Tensor:
        """Return the gradient of y; the normalised variant needs y itself."""
        scale, unclamped = self._scale(y)
        if y is None:
            return _append(grad * scale, 0.0)
        e = -(grad * y[..., :-1]).sum(-1, keepdim=True) * scale * scale * unclamped
        return _append(grad * scale, e)

    def backward(self, grad: Tensor) -> Tensor:
        if self.single is not None:
            grad[self.single] = 0
        return super().backward(grad)

    def _scale(self, y: Tensor | None) -> tuple[Tensor | float, Tensor | bool]:
        """Return the factor of every row's numerator, and where its denominator is unclamped."""
        variant, num_keys = self.variant, self.num_keys
        if not variant.normalized and not variant.has_length_factor:
            return variant.score_scale, True
        if variant.causal:
            place = torch.arange(self.x.shape[2], dtype=self.x.dtype, device=self.x.device)
            num_keys = place.unsqueeze(-1) + num_keys
        if variant.normalized:
            assert y is not None
            floor, denominator = DENOMINATOR_EPS * num_keys, y[..., -1:]
            return denominator.clamp(min=floor).reciprocal(), denominator >= floor
        return variant.score_scale * num_keys**-variant.length_exponent, True


def by_head(x: Tensor) -> Tensor:
    """[B, N, H, D] in any dtype -> [B, H, N, D] contiguous in the computing dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.transpose(1, 2).to(dtype).contiguous()


def _append(x: Tensor, last: Tensor | float) -> Tensor:
    out = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    out[..., :-1], out[..., -1:] = x, last
    return out
