"""Linear attention in O(N) torch operations with a hand-derived backward: the CPU path.

float64 is computed in float64, everything else in float32. Queries and keys carry a constant
feature in front, values a one behind, so that one matrix, the state, holds all sums over tokens and
one product gives numerator and denominator. The derivation is in README.md beside this file.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linclip_kernels.linear_attention.form import DENOMINATOR_EPS, NORM_EPS, Form

__all__ = ["backward", "forward"]

#: Up to this many tokens are one masked causal tile; longer sequences are cut into tiles of 64.
ONE_TILE = 128
TILE = 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    boundaries: list[int] | None,
    form: Form,
    *,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend; arguments are not checked.

    Args:
        q, k: [B, N, H, D].
        v: [B, N, H, Dv].
        initial: State [S, H, D + 1, Dv + 1] of earlier keys, one per sequence.
        boundaries: Where the S sequences begin and end; None: S = B sequences of N tokens.
        form: Which form.

    Returns:
        o [B, N, H, Dv] in v.dtype, and with return_state the state [S, H, D + 1, Dv + 1].
    """
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    states, order = [], _Causal if form.causal else _Bidirectional
    for tokens, sequences in _sequences(q, boundaries):
        begin = None if initial is None else initial[sequences]
        pass_ = order(q[:, tokens], k[:, tokens], v[:, tokens], begin, form)
        pass_.forward(out[:, tokens])
        if return_state:
            states.append(pass_.state())
    return out, torch.cat(states) if return_state else None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    boundaries: list[int] | None,
    form: Form,
    grad: Tensor | None,
    grad_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state, from those of o and the state (None: zero)."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    d_states, order = [], _Causal if form.causal else _Bidirectional
    if grad is None:
        grad = torch.zeros_like(v)
    for tokens, sequences in _sequences(q, boundaries):
        begin = None if initial is None else initial[sequences]
        end = None if grad_state is None else grad_state[sequences]
        pass_ = order(q[:, tokens], k[:, tokens], v[:, tokens], begin, form)
        *rows, d_state = pass_.backward(grad[:, tokens], end)
        for gradient, x in zip(gradients, rows, strict=True):
            gradient[:, tokens] = x.transpose(1, 2)
        d_states.append(d_state)
    d_q, d_k, d_v = gradients
    return d_q, d_k, d_v, torch.cat(d_states)


def _sequences(q: Tensor, boundaries: list[int] | None) -> Iterator[tuple[slice, slice]]:
    """Tokens and states that belong together."""
    if boundaries is None:
        yield slice(0, q.shape[1]), slice(0, q.shape[0])
    else:
        for i, tokens in enumerate(pairwise(boundaries)):
            yield slice(*tokens), slice(i, i + 1)


class _Features(NamedTuple):
    """Rows of q or k on their way to features."""

    rows: Tensor  # x in the computing dtype, [B, H, N, D]
    inverse: Tensor | None  # of the norm, [B, H, N, 1]
    phi: Tensor  # (constant, phi(x-hat)), [B, H, N, D + 1]


class _Pass:
    """Sequences of equal length, forward or backward; both begin with features and states.

    Queries see keys through ``y``, numerator and denominator of their rows; what lies between the
    features and y, and its gradient, is the order's own.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, form: Form) -> None:
        self.form = form
        self.num_tokens = q.shape[1]
        self.query = _features(q, float(form.has_constant), form)
        self.key = _features(k, 1.0, form)
        self.num_keys: float | Tensor = 1 if form.causal else max(1, self.num_tokens)  # of row 1
        self.single_key = form.frees_single_key and initial is None and self.num_keys == 1
        if initial is not None:
            self.num_keys = initial[:, :1, :1, -1:] + self.num_keys  # [S, 1, 1, 1]
        if self.single_key:
            self.query.phi[:, :, :1, 1:] = 0  # the score of row 1 is the constant
        self.q, self.k = self.query.phi, self.key.phi
        self.v = _append(_by_head(v), 1.0)
        self.see_keys(initial)

    def forward(self, out: Tensor) -> None:
        """Write o into ``out`` [B, N, H, Dv]."""
        y = self.y()
        rows = y[..., :-1].mul_(self._row_scale(y)[0])
        out.copy_(rows.transpose(1, 2))

    def backward(self, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor, ...]:
        grad = _by_head(grad)
        e: Tensor | float = 0.0
        if self.form.normalized:
            y = self.y()
            scale, free = self._row_scale(y)
            e = -(grad * y[..., :-1]).sum(-1, keepdim=True) * scale * scale * free
        else:
            scale, _ = self._row_scale(None)
        d_q, d_k, d_v, d_state = self.see_keys_backward(_append(grad * scale, e), grad_state)
        if self.single_key:
            d_q[:, :, :1] = 0
        d_state[..., 0, -1] = 0  # the number of keys is not differentiated
        return (
            _features_backward(d_q, self.query, self.form),
            _features_backward(d_k, self.key, self.form),
            d_v,
            d_state,
        )

    def see_keys(self, initial: Tensor | None) -> None:
        """Sum up what the rows will see."""
        raise NotImplementedError

    def y(self) -> Tensor:
        """Numerator and denominator of every row, [B, H, N, Dv + 1]."""
        raise NotImplementedError

    def state(self) -> Tensor:
        """The state of all keys, [B, H, D + 1, Dv + 1]."""
        raise NotImplementedError

    def see_keys_backward(
        self, d_y: Tensor, grad_state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of phi(q), phi(k), v and the initial state."""
        raise NotImplementedError

    def _row_scale(self, y: Tensor | None) -> tuple[Tensor | float, Tensor | bool]:
        """Factor of every row's numerator, and where no clamp holds its denominator."""
        form, num_keys = self.form, self.num_keys
        if not form.normalized and not form.has_length_factor:
            return form.score_scale, True
        if form.causal:
            place = torch.arange(self.num_tokens, dtype=self.v.dtype, device=self.v.device)
            num_keys = place.unsqueeze(-1) + num_keys
        if form.normalized:
            assert y is not None
            floor, denominator = DENOMINATOR_EPS * num_keys, y[..., -1:]
            return denominator.clamp(min=floor).reciprocal(), denominator >= floor
        return form.score_scale * num_keys**-form.length_exponent, True


class _Bidirectional(_Pass):
    def see_keys(self, initial: Tensor | None) -> None:
        self.seen = self.k.mT @ self.v
        if initial is not None:
            self.seen += initial

    def y(self) -> Tensor:
        return self.q @ self.seen

    def state(self) -> Tensor:
        return self.seen

    def see_keys_backward(
        self, d_y: Tensor, grad_state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_state = self.q.mT @ d_y
        if grad_state is not None:
            d_state += grad_state
        d_q = d_y @ self.seen[..., 1:, :].mT
        return d_q, self.v @ d_state[..., 1:, :].mT, self.k @ d_state[..., :-1], d_state


class _Causal(_Pass):
    """Tokens in tiles [B, H, T, tile, *]: a row sees part of its tile, and the state before it."""

    def see_keys(self, initial: Tensor | None) -> None:
        self.q, self.k, self.v = self._tiles(self.q), self._tiles(self.k), self._tiles(self.v)
        self.scores = (self.q @ self.k.mT).tril_()
        self.seen = None  # one tile, and nothing before it
        if self.k.shape[2] > 1 or initial is not None:
            self.seen = _running_sum(self.k[:, :, :-1].mT @ self.v[:, :, :-1], initial)

    def y(self) -> Tensor:
        y = _masked_product(self.scores, self.v)
        if self.seen is not None:
            y += self.q @ self.seen
        return self._whole(y)

    def state(self) -> Tensor:
        last = self.k[:, :, -1].mT @ self.v[:, :, -1]
        return last if self.seen is None else last + self.seen[:, :, -1]

    def see_keys_backward(
        self, d_y: Tensor, grad_state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_y = self._tiles(d_y)
        d_scores = (d_y @ self.v.mT).tril_()
        d_q = _masked_product(d_scores, self.k[..., 1:])
        d_k = _masked_product(d_scores, self.q[..., 1:], transposed=True)
        d_v = _masked_product(self.scores, d_y[..., :-1], transposed=True)
        d_state = self.q.mT @ d_y
        if self.seen is not None:
            d_q += d_y @ self.seen[..., 1:, :].mT
        if self.k.shape[2] > 1 or grad_state is not None:
            after = _running_sum(d_state[:, :, 1:].flip(2), grad_state).flip(2)
            d_k += self.v @ after[..., 1:, :].mT
            d_v += self.k @ after[..., :-1]
            d_state = d_state[:, :, :1] + after[:, :, :1]
        return self._whole(d_q), self._whole(d_k), self._whole(d_v), d_state[:, :, 0]

    def _tiles(self, x: Tensor) -> Tensor:
        """[B, H, N, *] -> [B, H, T, tile, *], the last tile filled up with zeros."""
        tile = max(1, self.num_tokens) if self.num_tokens <= ONE_TILE else TILE
        num_tiles = max(1, -(-self.num_tokens // tile))
        if num_tiles * tile != self.num_tokens:
            x = F.pad(x, (0, 0, 0, num_tiles * tile - self.num_tokens))
        return x.unflatten(2, (num_tiles, tile))

    def _whole(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`_tiles`."""
        return x.flatten(2, 3)[:, :, : self.num_tokens]


def _running_sum(states: Tensor, start: Tensor | None) -> Tensor:
    """The sums of the first 0, 1, ... T - 1 of T - 1 states, and of the one at the start."""
    if start is None:
        return F.pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))
    return torch.cat([start.unsqueeze(2), states], dim=2).cumsum(2)


def _by_head(x: Tensor) -> Tensor:
    """[B, N, H, D] in any dtype -> [B, H, N, D] contiguous in the computing dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.transpose(1, 2).to(dtype).contiguous()


def _append(x: Tensor, last: Tensor | float) -> Tensor:
    out = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    out[..., :-1], out[..., -1:] = x, last
    return out


def _features(x: Tensor, constant: float, form: Form) -> _Features:
    rows = _by_head(x)
    phi = rows.new_empty(*rows.shape[:-1], rows.shape[-1] + 1)
    phi[..., 0], hat = constant, phi[..., 1:]
    inverse = None
    if form.qk_norm:
        inverse = torch.linalg.vecdot(rows, rows).add_(NORM_EPS).rsqrt_().unsqueeze(-1)
        torch.mul(rows, inverse, out=hat)
    else:
        hat.copy_(rows)
    if form.feature_map == "relu":
        hat.relu_()
    elif form.feature_map == "softplus":
        hat.copy_(F.softplus(hat))
    return _Features(rows, inverse, phi)


def _features_backward(grad: Tensor, features: _Features, form: Form) -> Tensor:
    """Gradient of x from that of phi(x-hat); ``grad`` may be overwritten."""
    rows, inverse, phi = features
    if form.feature_map == "relu":
        grad = grad * (rows > 0)
    elif form.feature_map == "softplus":
        grad = grad * -torch.expm1(-phi[..., 1:])  # the derivative of log(1 + e^x), from its value
    if inverse is None:
        return grad
    along = torch.linalg.vecdot(rows, grad).unsqueeze(-1) * inverse.square()
    return torch.addcmul(grad, rows, along, value=-1).mul_(inverse)


def _masked_product(mask: Tensor, rows: Tensor, *, transposed: bool = False) -> Tensor:
    """mask @ rows for a lower triangular mask, whose zeros keep out NaN and infinity too."""
    mask = mask.mT if transposed else mask
    product = mask @ rows
    if product.sum().isfinite():
        return product
    finite = rows.isfinite()
    product = mask @ torch.where(finite, rows, 0)
    # A row of the product depends on itself and on all rows on its side of the diagonal.
    side = torch.ones_like(mask).triu() if transposed else torch.ones_like(mask).tril()
    return product.masked_fill(side @ (~finite).to(side.dtype) > 0, torch.nan)
