"""Linear attention in O(N) torch operations with a hand-derived backward: the CPU path.

float64 is computed in float64, everything else in float32. Only q, k and v are kept for the
backward. The derivation is in README.md beside this file; names follow it: S, w, z are the state,
``scale`` is the factor of a row's numerator, ``e`` the gradient of its denominator.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linclip_kernels.linear_attention.reference import DENOMINATOR_EPS, NORM_EPS

__all__ = ["Form", "linear_attention_eager"]

#: Tokens of one masked causal tile.
CHUNK = 128


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
    # With one key both orders are the same, and the causal one knows the limit of its first row.
    causal = form.causal or q.shape[1] == 1
    function = _Causal if causal else _Bidirectional
    return function.apply(q, k, v, form)


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.form = form
        with torch.autocast(q.device.type, enabled=False):
            q_hat, k_hat = _unit_rows(q, form)[0], _unit_rows(k, form)[0]
            values = _by_head(v)
            state, w = k_hat.mT @ values, values.sum(-2, keepdim=True)
            if form.normalized:
                score_sum = q_hat @ k_hat.sum(-2).unsqueeze(-1) + k.shape[1]
                scale = _inverse_denominator(score_sum, k.shape[1])[0]
                out = _affine(w, q_hat, state).mul_(scale)
            else:
                out = _affine(w, q_hat, state, _length_factor(k.shape[1], form))
            return _by_token(out, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        form, num_keys = ctx.form, q.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            (q_hat, q_inv), (k_hat, k_inv) = _unit_rows(q, form), _unit_rows(k, form)
            values, grad = _by_head(v), _by_head(grad)
            state = k_hat.mT @ values
            d_q = grad @ state.mT
            if form.normalized:
                z = k_hat.sum(-2, keepdim=True)
                scale, free = _inverse_denominator(q_hat @ z.mT + num_keys, num_keys)
                numerator = _row_dot(q_hat, d_q) + grad @ values.sum(-2).unsqueeze(-1)
                e = -(numerator * scale * scale * free)
                d_q = torch.addcmul(e * z, d_q, scale)
                grad = grad * scale
            else:
                factor = _length_factor(num_keys, form)
                d_q *= factor
            d_state, d_w = q_hat.mT @ grad, grad.sum(-2, keepdim=True)
            if form.normalized:
                d_k = _affine((e * q_hat).sum(-2, keepdim=True), values, d_state.mT)
            else:
                d_state, d_w = d_state * factor, d_w * factor
                d_k = values @ d_state.mT
            d_v = _affine(d_w, k_hat, d_state)
            d_q, d_k = (
                _unit_rows_backward(d_q, q_hat, q_inv),
                _unit_rows_backward(d_k, k_hat, k_inv),
            )
            return _by_token(d_q, q), _by_token(d_k, k), _by_token(d_v, v), None


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.form = form
        with torch.autocast(q.device.type, enabled=False):
            q_hat, k_hat = _unit_rows(q, form)[0], _unit_rows(k, form)[0]
            q_hat, k_hat, values = _chunks(q_hat), _chunks(k_hat), _chunks(_by_head(v))
            scores = _masked_scores(q_hat, k_hat, form)
            state, w, z = _before(k_hat, values, torch.ones_like(values[..., :1]))
            out = scores @ values
            if state is not None:
                out += q_hat @ state + w
            out *= _row_scale(scores, q_hat, z, form)[0]
            return _by_token(_whole(out, q.shape[1]), v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        form, num_tokens = ctx.form, q.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            (q_hat, q_inv), (k_hat, k_inv) = _unit_rows(q, form), _unit_rows(k, form)
            q_tiles, k_tiles = _chunks(q_hat), _chunks(k_hat)
            values, grad = _chunks(_by_head(v)), _chunks(_by_head(grad))
            scores = _masked_scores(q_tiles, k_tiles, form)
            state, w, z = _before(k_tiles, values, torch.ones_like(values[..., :1]))
            scale, free = _row_scale(scores, q_tiles, z, form)
            grad = grad * scale
            d_scores = grad @ values.mT
            d_q = None if state is None else grad @ state.mT
            e = torch.zeros_like(scale)
            if form.normalized:
                numerator = _row_dot(scores, d_scores)
                if d_q is not None:
                    numerator += _row_dot(q_tiles, d_q) + grad @ w.mT
                e = -(numerator * scale * free)
                d_scores += e
            d_scores.tril_()
            d_q_tile = d_scores @ k_tiles
            if d_q is not None:
                d_q_tile += d_q + e * z
            d_k, d_v = d_scores.mT @ q_tiles, scores.mT @ grad
            d_state, d_w, d_z = _after(q_tiles, grad, e)
            if d_state is not None:
                d_k += values @ d_state.mT + d_z
                d_v += k_tiles @ d_state + d_w
            d_q = _unit_rows_backward(_whole(d_q_tile, num_tokens), q_hat, q_inv)
            d_k = _unit_rows_backward(_whole(d_k, num_tokens), k_hat, k_inv)
            d_v = _whole(d_v, num_tokens)
            return _by_token(d_q, q), _by_token(d_k, k), _by_token(d_v, v), None


def _by_head(x: Tensor) -> Tensor:
    """[B, N, H, D] in any dtype -> [B, H, N, D] contiguous in the computing dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.transpose(1, 2).to(dtype).contiguous()


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H, D] contiguous in the dtype of ``like``."""
    return x.transpose(1, 2).to(like.dtype).contiguous()


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
    """1 / clamped denominator, and whether the clamp left it free."""
    floor = DENOMINATOR_EPS * num_keys
    return denominator.clamp(min=floor).reciprocal(), denominator >= floor


def _chunks(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, H, number of tiles, tile, D], the last tile filled up with zeros."""
    num_tokens = x.shape[2]
    tile = min(CHUNK, num_tokens)
    x = F.pad(x, (0, 0, 0, -num_tokens % tile))
    return x.unflatten(2, (-1, tile))


def _whole(x: Tensor, num_tokens: int) -> Tensor:
    return x.flatten(2, 3)[:, :, :num_tokens]


def _masked_scores(q_hat: Tensor, k_hat: Tensor, form: Form) -> Tensor:
    """1 + q.k within each tile, zero above the diagonal: [B, H, tiles, tile, tile]."""
    scores = (q_hat @ k_hat.mT).add_(1).tril_()
    if form.normalized:
        scores[:, :, 0, 0, 0] = 1  # row 1 has one key: its weight is 1 in the limit too
    return scores


def _row_scale(
    scores: Tensor, q_hat: Tensor, z: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    """Factor of every row's numerator and whether its denominator is free: [.., tile, 1]."""
    num_tiles, tile = scores.shape[2:4]
    index = torch.arange(num_tiles * tile, dtype=scores.dtype, device=scores.device)
    index = index.view(num_tiles, tile, 1)
    if not form.normalized:
        scale = (index + 1) ** -form.length_exponent * form.score_scale
        return scale, torch.ones_like(scale)
    row_sum = scores.sum(-1, keepdim=True)
    if z is not None:
        row_sum += q_hat @ z.mT + torch.arange(num_tiles, device=z.device).view(-1, 1, 1) * tile
    return _inverse_denominator(row_sum, index + 1)


def _before(x: Tensor, y: Tensor, e: Tensor) -> tuple[Tensor | None, ...]:
    """State of all earlier tiles, per tile: sums of x y^T, y and e x. None with one tile."""
    if x.shape[2] == 1:
        return None, None, None
    sums = x.mT @ y, y.sum(-2, keepdim=True), (e * x).sum(-2, keepdim=True)
    return tuple(F.pad(s[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0)) for s in sums)


def _after(x: Tensor, y: Tensor, e: Tensor) -> tuple[Tensor | None, ...]:
    """State of all later tiles, per tile."""
    if x.shape[2] == 1:
        return None, None, None
    backwards = _before(x.flip(2), y.flip(2), e.flip(2))
    return tuple(None if s is None else s.flip(2) for s in backwards)
