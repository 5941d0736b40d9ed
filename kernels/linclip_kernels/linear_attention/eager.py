"""Linear attention in O(N) torch operations with a hand-derived backward: the CPU path.

float64 is computed in float64, everything else in float32. Only q, k and v are kept for the
backward. The derivation is in README.md beside this file; names follow it: S, w, z are the state,
``scale`` is the factor of a row's numerator, ``e`` the gradient of its denominator.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linclip_kernels.linear_attention.reference import DENOMINATOR_EPS, NORM_EPS

__all__ = ["Form", "linear_attention_eager"]

#: Up to this many tokens are one masked causal tile; longer sequences are cut into tiles of 64.
ONE_TILE = 128
TILE = 64


@dataclass(frozen=True)
class Form:
    """Which of the operator's forms is meant; see :func:`linclip_kernels.linear_attention`."""

    causal: bool
    normalized: bool
    qk_norm: bool
    score_scale: float
    length_exponent: float


def linear_attention_eager(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
    """The torch form of :func:`linclip_kernels.linear_attention`; arguments are not checked.

    Args:
        q, k: [B, N, H, D].
        v: [B, N, H, Dv].
        form: Which form.

    Returns:
        [B, N, H, Dv], contiguous, in v.dtype.
    """
    function = _Causal if form.causal else _Bidirectional
    return function.apply(q, k, v, form)


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.form, num_keys = form, k.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            q_hat, k_hat = _unit_rows(q, form)[0], _unit_rows(k, form)[0]
            values = _by_head(v)
            state, w = k_hat.mT @ values, values.sum(-2, keepdim=True)
            if form.normalized:
                score_sum = q_hat @ k_hat.sum(-2).unsqueeze(-1) + num_keys
                out = _affine(w, q_hat, state).mul_(_inverse_denominator(score_sum, num_keys)[0])
            else:
                out = _affine(w, q_hat, state, _length_factor(num_keys, form))
            return _by_token(out, v).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        form, num_keys = ctx.form, k.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            (q_hat, q_inverse), (k_hat, k_inverse) = _unit_rows(q, form), _unit_rows(k, form)
            values, grad = _by_head(v), _by_head(grad)
            d_q = grad @ (k_hat.mT @ values).mT
            if form.normalized:
                z = k_hat.sum(-2, keepdim=True)
                scale, free = _inverse_denominator(q_hat @ z.mT + num_keys, num_keys)
                numerator = _row_dot(q_hat, d_q) + grad @ values.sum(-2).unsqueeze(-1)
                e = numerator.mul_(scale).mul_(scale).mul_(free).neg_()
                d_q = torch.addcmul(e * z, d_q, scale)
                grad = grad * scale
                d_z = (e * q_hat).sum(-2, keepdim=True)
                d_state, d_w = q_hat.mT @ grad, grad.sum(-2, keepdim=True)
                d_k = _affine(d_z, values, d_state.mT)
            else:
                factor = _length_factor(num_keys, form)
                d_q *= factor
                d_state, d_w = q_hat.mT @ grad * factor, grad.sum(-2, keepdim=True) * factor
                d_k = values @ d_state.mT
            d_v = _affine(d_w, k_hat, d_state)
            d_q = _unit_rows_backward(d_q, q_hat, q_inverse)
            d_k = _unit_rows_backward(d_k, k_hat, k_inverse)
            return _by_token(d_q, q), _by_token(d_k, k), _by_token(d_v, v), None


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.form, num_tokens = form, q.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            q_hat, k_hat = _tiles(_unit_rows(q, form)[0]), _tiles(_unit_rows(k, form)[0])
            values = _tiles(_by_head(v))
            scores = _masked_scores(q_hat, k_hat, form)
            before = _state_before(k_hat, values)
            out = scores @ values
            if before:
                out += (q_hat @ before.matrix).add_(before.w)
            out *= _row_scale(scores, q_hat, before, form)[0]
            return _by_token(_whole(out, num_tokens), v).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        form, num_tokens = ctx.form, q.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            (q_rows, q_inverse), (k_rows, k_inverse) = _unit_rows(q, form), _unit_rows(k, form)
            q_hat, k_hat, values = _tiles(q_rows), _tiles(k_rows), _tiles(_by_head(v))
            scores = _masked_scores(q_hat, k_hat, form)
            before = _state_before(k_hat, values)
            scale, free = _row_scale(scores, q_hat, before, form)
            grad = _tiles(_by_head(grad)) * scale

            d_scores = grad @ values.mT
            d_q_before = grad @ before.matrix.mT if before else torch.zeros_like(scale)
            e = None
            if form.normalized:
                numerator = _row_dot(scores, d_scores)
                if before:
                    numerator += _row_dot(q_hat, d_q_before) + grad @ before.w.mT
                e = numerator.mul_(scale).mul_(free).neg_()
                d_scores += e
            d_scores.tril_()

            d_q, d_k, d_v = d_scores @ k_hat, d_scores.mT @ q_hat, scores.mT @ grad
            if before:
                after = _state_after(q_hat, grad, e)
                d_q += d_q_before if e is None else d_q_before + e * before.z
                d_k += values @ after.matrix.mT if e is None else values @ after.matrix.mT + after.z
                d_v += (k_hat @ after.matrix).add_(after.w)
            d_q = _unit_rows_backward(_whole(d_q, num_tokens), q_rows, q_inverse)
            d_k = _unit_rows_backward(_whole(d_k, num_tokens), k_rows, k_inverse)
            d_v = _whole(d_v, num_tokens)
            return _by_token(d_q, q), _by_token(d_k, k), _by_token(d_v, v), None


def _by_head(x: Tensor) -> Tensor:
    """[B, N, H, D] in any dtype -> [B, H, N, D] contiguous in the computing dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.transpose(1, 2).to(dtype).contiguous()


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H, D] in the dtype of ``like``."""
    return x.transpose(1, 2).to(like.dtype)


def _affine(offset: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """factor * (offset + a @ b) in one call; all [B, H, *, *]."""
    batched = (x.flatten(0, 1) for x in (offset, a, b))
    return torch.baddbmm(*batched, beta=factor, alpha=factor).unflatten(0, a.shape[:2])


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _unit_rows(x: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """[B, N, H, D] -> x-hat [B, H, N, D] and its factor [B, H, N, 1] (None: not normalised)."""
    x = _by_head(x)
    if not form.qk_norm:
        return x, None
    inverse = _row_dot(x, x).add_(NORM_EPS).rsqrt_()
    return x * inverse, inverse


def _unit_rows_backward(grad: Tensor, x_hat: Tensor, inverse: Tensor | None) -> Tensor:
    if inverse is None:
        return grad
    return torch.addcmul(grad, x_hat, _row_dot(x_hat, grad), value=-1).mul_(inverse)


def _length_factor(num_keys: int, form: Form) -> float:
    return form.score_scale * num_keys**-form.length_exponent


def _inverse_denominator(denominator: Tensor, num_keys: int | Tensor) -> tuple[Tensor, Tensor]:
    """1 / clamped denominator, and where the clamp left it free."""
    floor = DENOMINATOR_EPS * num_keys
    return denominator.clamp(min=floor).reciprocal_(), denominator >= floor


def _tiles(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, H, number of tiles, tile, D], the last tile filled up with zeros."""
    num_tokens = x.shape[2]
    tile = num_tokens if num_tokens <= ONE_TILE else TILE
    if num_tokens % tile:
        x = F.pad(x, (0, 0, 0, -num_tokens % tile))
    return x.unflatten(2, (-1, tile))


def _whole(x: Tensor, num_tokens: int) -> Tensor:
    """The inverse of :func:`_tiles`."""
    return x.flatten(2, 3)[:, :, :num_tokens]


def _masked_scores(q_hat: Tensor, k_hat: Tensor, form: Form) -> Tensor:
    """1 + q.k within each tile, zero above the diagonal: [B, H, tiles, tile, tile]."""
    scores = (q_hat @ k_hat.mT).add_(1).tril_()
    if form.normalized:
        scores[:, :, 0, 0, 0] = 1  # row 1 has one key: its weight is 1, in the limit too
    return scores


class _State(NamedTuple):
    """Sums over tokens, one per tile: [B, H, tiles, *, *]."""

    matrix: Tensor  # x y^T, [.., D, Dv]
    w: Tensor  # y, [.., 1, Dv]
    z: Tensor  # e x, [.., 1, D]


def _state_before(x: Tensor, y: Tensor, e: Tensor | None = None) -> _State | None:
    """The state of all earlier tiles; None if there is one tile."""
    if x.shape[2] == 1:
        return None
    x, y = x[:, :, :-1], y[:, :, :-1]
    weighted = x if e is None else e[:, :, :-1] * x
    sums = x.mT @ y, y.sum(-2, keepdim=True), weighted.sum(-2, keepdim=True)
    return _State(*(F.pad(s.cumsum(2), (0, 0, 0, 0, 1, 0)) for s in sums))


def _state_after(x: Tensor, y: Tensor, e: Tensor | None) -> _State:
    """The state of all later tiles; there must be more than one."""
    before = _state_before(x.flip(2), y.flip(2), None if e is None else e.flip(2))
    assert before is not None
    return _State(*(s.flip(2) for s in before))


def _row_scale(
    scores: Tensor, q_hat: Tensor, before: _State | None, form: Form
) -> tuple[Tensor, Tensor]:
    """Factor of every row's numerator, and where no clamp holds its denominator."""
    num_tiles, tile = scores.shape[2:4]
    num_keys = torch.arange(1, num_tiles * tile + 1, dtype=scores.dtype, device=scores.device)
    num_keys = num_keys.view(num_tiles, tile, 1)
    if not form.normalized:
        scale = num_keys**-form.length_exponent * form.score_scale
        return scale, torch.ones_like(scale, dtype=torch.bool)
    denominator = scores.sum(-1, keepdim=True)
    if before:
        denominator += q_hat @ before.z.mT + (num_keys[:, :1] - 1)
    return _inverse_denominator(denominator, num_keys)
