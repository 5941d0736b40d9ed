"""Linear attention in O(N) torch operations with a hand-derived backward: the CPU path.

float64 is computed in float64, everything else in float32. A constant feature precedes those of
queries and keys, and a one follows values, so that one matrix, the state, holds all sums over
tokens and one product gives numerator and denominator. Long sequences are computed in pieces, so
that temporaries stay small. The derivation is in README.md beside this file.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from linclip_kernels.linear_attention.variant import DENOMINATOR_EPS, NORM_EPS, Variant

__all__ = [
    "apply_state",
    "apply_state_backward",
    "backward",
    "forward",
    "sum_keys",
    "sum_keys_backward",
]

#: An index into the rows of [B, H, N, *].
Rows = tuple[slice | Tensor, ...]
#: Rows (tokens of all heads) of a piece, so that temporaries fit a core's cache, but at least so
#: many tokens.
PIECE_ROWS, MIN_PIECE = 2**12, 512
#: Up to this many tokens are one masked causal tile; longer sequences are split into tiles of 64.
ONE_TILE = 128
TILE = 64
#: Index of the rows of [B, H, N, *] that see a single key where no state precedes a sequence.
_FIRST_ROW = slice(None), slice(None), slice(1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    boundaries: list[int] | None,
    variant: Variant,
    *,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the output and, with return_state, the state; arguments are not checked.

    Args:
        q, k: [B, N, H, D].
        v: [B, N, H, Dv].
        initial: The state [S, H, D + 1, Dv + 1] of earlier keys, one per sequence.
        boundaries: Begin and end of the S sequences; None: S = B sequences of N tokens.
        variant: The variant to compute.
        return_state: Whether to compute the state.

    Returns:
        o [B, N, H, Dv] in v.dtype, and the state [S, H, D + 1, Dv + 1] or None.
    """
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    states, order = [], _Causal if variant.causal else _Bidirectional
    for tokens, sequences in _sequences(q, boundaries):
        begin = None if initial is None else initial[sequences]
        run = order(q[:, tokens], k[:, tokens], v[:, tokens], begin, variant)
        run.forward(out[:, tokens])
        if return_state:
            states.append(run.state())
    return out, torch.cat(states) if return_state else None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    boundaries: list[int] | None,
    variant: Variant,
    _state: Tensor | None,
    grad: Tensor | None,
    grad_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and the initial state.

    Args:
        q, k, v, initial, boundaries, variant: The arguments of :func:`forward`.
        grad: The gradient of o [B, N, H, Dv]; None: zero.
        grad_state: The gradient of the state [S, H, D + 1, Dv + 1]; None: zero.

    Returns:
        dq and dk [B, N, H, D], dv [B, N, H, Dv], and [S, H, D + 1, Dv + 1].
    """
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_states, order = [], _Causal if variant.causal else _Bidirectional
    grad = torch.zeros_like(v) if grad is None else grad
    for tokens, sequences in _sequences(q, boundaries):
        begin = None if initial is None else initial[sequences]
        end = None if grad_state is None else grad_state[sequences]
        run = order(q[:, tokens], k[:, tokens], v[:, tokens], begin, variant)
        gradients = d_q[:, tokens], d_k[:, tokens], d_v[:, tokens]
        d_state = run.backward(grad[:, tokens], end, gradients)
        d_state[..., 0, -1] = 0  # the number of keys is not differentiated
        d_states.append(d_state)
    return d_q, d_k, d_v, torch.cat(d_states)


def sum_keys(k: Tensor, v: Tensor, variant: Variant) -> Tensor:
    """Return the state of all keys, [B, H, D + 1, Dv + 1]; there may be none."""
    return _KeySide(k, v, variant).state()


def sum_keys_backward(
    k: Tensor, v: Tensor, variant: Variant, grad_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v from that of their state."""
    d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    _KeySide(k, v, variant).backward(grad_state, d_k, d_v)
    return d_k, d_v


def apply_state(q: Tensor, state: Tensor, variant: Variant) -> Tensor:
    """Return o [B, N, H, Dv] of queries that all see ``state`` [B, H, D + 1, Dv + 1]."""
    shape = *q.shape[:-1], state.shape[-1] - 1
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    _QuerySide(q, state, variant).forward(out)
    return out


def apply_state_backward(
    q: Tensor, state: Tensor, variant: Variant, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and of the state from that of o."""
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_state = state.new_zeros(state.shape)
    _QuerySide(q, state, variant).backward(grad, d_q, d_state)
    d_state[..., 0, -1] = 0  # the number of keys is not differentiated
    return d_q, d_state


def _sequences(q: Tensor, boundaries: list[int] | None) -> Iterator[tuple[slice, slice]]:
    """Yield tokens that are computed together, and the rows of their states."""
    if boundaries is None:
        yield slice(0, q.shape[1]), slice(0, q.shape[0])
    else:
        for i, tokens in enumerate(pairwise(boundaries)):
            yield slice(*tokens), slice(i, i + 1)


class _Bidirectional:
    """Sequences of equal length whose rows all see the same state."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, variant: Variant
    ) -> None:
        self.keys = _KeySide(k, v, variant)
        self.seen = self.keys.state()  # [B, H, D + 1, Dv + 1]
        if initial is not None:
            self.seen += initial
        self.queries = _QuerySide(q, self.seen, variant, fixes_single_key=initial is None)

    def forward(self, out: Tensor) -> None:
        """Write o into ``out`` [B, N, H, Dv]."""
        self.queries.forward(out)

    def state(self) -> Tensor:
        """Return the state of all keys, [B, H, D + 1, Dv + 1]."""
        return self.seen

    def backward(
        self, grad: Tensor, grad_state: Tensor | None, gradients: tuple[Tensor, ...]
    ) -> Tensor:
        """Write dq, dk, dv [B, N, H, *] and return the gradient of the initial state."""
        d_q, d_k, d_v = gradients
        d_state = torch.zeros_like(self.seen) if grad_state is None else grad_state.clone()
        self.queries.backward(grad, d_q, d_state)
        self.keys.backward(d_state, d_k, d_v)
        return d_state


class _KeySide:
    """Keys and values of sequences of equal length, piece by piece."""

    def __init__(self, k: Tensor, v: Tensor, variant: Variant) -> None:
        self.pieces = pieces = _pieces(k)
        # The keys of a single piece are kept, those of several are recomputed. A function that
        # referred to self would keep them until the garbage collector runs.
        self.keys = lru_cache(maxsize=1)(lambda i: _Keys(k, v, pieces[i], variant))

    def state(self) -> Tensor:
        """Return the state of all keys, [B, H, D + 1, Dv + 1]."""
        state = self.keys(0).state()
        for i in range(1, len(self.pieces)):
            state += self.keys(i).state()
        return state

    def backward(self, d_state: Tensor, d_k: Tensor, d_v: Tensor) -> None:
        """Write dk and dv [B, N, H, *] from the gradient of the state."""
        for i in reversed(range(len(self.pieces))):
            keys, piece = self.keys(i), self.pieces[i]
            _put(keys.backward(keys.v @ d_state[..., 1:, :].mT), d_k[:, piece])
            _put(keys.phi @ d_state[..., :-1], d_v[:, piece])


class _QuerySide:
    """Queries of sequences of equal length that all see one state, piece by piece.

    Args:
        fixes_single_key: Whether the weight of a state's only key may be set to 1.
    """

    def __init__(
        self, q: Tensor, seen: Tensor, variant: Variant, *, fixes_single_key: bool = True
    ) -> None:
        self.q, self.seen, self.variant = q, seen, variant
        self.pieces = _pieces(q)
        self.num_keys = seen[:, :1, :1, -1:]  # [B, 1, 1, 1]
        self.single: Rows | None = None
        if fixes_single_key and variant.fixes_single_key:
            is_single = self.num_keys.flatten() == 1
            if not is_single.is_meta and is_single.any():
                self.single = (is_single,)

    def forward(self, out: Tensor) -> None:
        """Write o into ``out`` [B, N, H, Dv]."""
        for piece in self.pieces:
            queries = self._queries(piece)
            _put(queries.outputs(queries.phi @ self.seen), out[:, piece])

    def backward(self, grad: Tensor, d_q: Tensor, d_state: Tensor) -> None:
        """Write dq [B, N, H, D], and add to the gradient of the state."""
        for piece in self.pieces:
            queries = self._queries(piece)
            y = queries.phi @ self.seen if self.variant.normalized else None
            d_y = queries.outputs_backward(_by_head(grad[:, piece]), y)
            _put(queries.backward(d_y @ self.seen[..., 1:, :].mT), d_q[:, piece])
            d_state += queries.phi.mT @ d_y

    def _queries(self, piece: slice) -> "_Queries":
        return _Queries(self.q, piece, self.num_keys, self.single, self.variant)


class _Causal:
    """Sequences of equal length; a piece continues from the state of those before it."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, variant: Variant
    ) -> None:
        self.q, self.k, self.v, self.initial, self.variant = q, k, v, initial, variant
        self.pieces = _pieces(q)

    def forward(self, out: Tensor) -> None:
        """Write o into ``out`` [B, N, H, Dv]."""
        part = None
        for piece in self.pieces:
            part = self._part(piece, self.initial if part is None else part.state())
            _put(part.queries.outputs(part.y()), out[:, piece])
        self.last = part

    def state(self) -> Tensor:
        """Return the state of all keys, [B, H, D + 1, Dv + 1], after the forward."""
        assert self.last is not None
        return self.last.state()

    def backward(
        self, grad: Tensor, grad_state: Tensor | None, gradients: tuple[Tensor, ...]
    ) -> Tensor:
        """Write dq, dk, dv [B, N, H, *] and return the gradient of the initial state."""
        states, d_state = [self.initial], grad_state
        for piece in self.pieces[:-1]:
            own, before = _Keys(self.k, self.v, piece, self.variant).state(), states[-1]
            states.append(own if before is None else own + before)
        for piece, state in zip(reversed(self.pieces), reversed(states), strict=True):
            part = self._part(piece, state)
            y = part.y() if self.variant.normalized else None
            d_y = part.queries.outputs_backward(_by_head(grad[:, piece]), y)
            d_phi_q, d_phi_k, d_v, d_state = part.backward(d_y, d_state)
            shares = part.queries.backward(d_phi_q), part.keys.backward(d_phi_k), d_v
            for share, gradient in zip(shares, gradients, strict=True):
                _put(share, gradient[:, piece])
        assert d_state is not None
        return d_state

    def _part(self, piece: slice, state: Tensor | None) -> "_CausalPiece":
        num_keys = 1 if state is None else state[:, :1, :1, -1:] + 1  # of the first row
        single = _FIRST_ROW if state is None and self.variant.fixes_single_key else None
        queries = _Queries(self.q, piece, num_keys, single, self.variant)
        return _CausalPiece(queries, _Keys(self.k, self.v, piece, self.variant), state)


class _CausalPiece:
    """Tokens in tiles [B, H, T, tile, *]: a row sees part of its tile, and the state before it."""

    def __init__(self, queries: "_Queries", keys: "_Keys", initial: Tensor | None) -> None:
        self.queries, self.keys = queries, keys
        self.num_tokens = keys.phi.shape[2]
        self.q, self.k, self.v = map(self._tiles, (queries.phi, keys.phi, keys.v))
        self.scores = (self.q @ self.k.mT).tril_()
        self.seen = None  # one tile, and nothing before it
        if self.k.shape[2] > 1 or initial is not None:
            self.seen = _running_sum(self.k[:, :, :-1].mT @ self.v[:, :, :-1], initial)

    def y(self) -> Tensor:
        """Return numerator and denominator of every row, [B, H, N, Dv + 1]."""
        y = _masked_product(self.scores, self.v)
        if self.seen is not None:
            y += self.q @ self.seen
        return self._whole(y)

    def state(self) -> Tensor:
        last = self.k[:, :, -1].mT @ self.v[:, :, -1]
        return last if self.seen is None else last + self.seen[:, :, -1]

    def backward(self, d_y: Tensor, grad_state: Tensor | None) -> tuple[Tensor, ...]:
        """Return the gradients of phi(q), phi(k), v and the state before the piece."""
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
        """[B, H, N, *] -> [B, H, T, tile, *], the last tile padded with zeros."""
        tile = max(1, self.num_tokens) if self.num_tokens <= ONE_TILE else TILE
        num_tiles = max(1, -(-self.num_tokens // tile))
        if num_tiles * tile != self.num_tokens:
            x = F.pad(x, (0, 0, 0, num_tiles * tile - self.num_tokens))
        return x.unflatten(2, (num_tiles, tile))

    def _whole(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`_tiles`."""
        return x.flatten(2, 3)[:, :, : self.num_tokens]


class _Rows:
    """Rows of q or k, and their features with the constant: ``phi`` [B, H, N, D + 1]."""

    def __init__(self, x: Tensor, constant: float, variant: Variant) -> None:
        self.variant, self.x = variant, _by_head(x)
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

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of the rows from that of phi without its constant [B, H, N, D]."""
        if self.variant.feature_map == "relu":
            grad = grad * (self.x > 0)
        elif self.variant.feature_map == "softplus":
            grad = grad * -torch.expm1(-self.phi[..., 1:])  # of log(1 + e^x), from its value
        if not self.variant.qk_norm:
            return grad
        along = torch.linalg.vecdot(self.x, grad).unsqueeze(-1) * self.inverse.square()
        return torch.addcmul(grad, self.x, along, value=-1).mul_(self.inverse)


class _Keys(_Rows):
    """A piece of k, and of v with a one appended: ``v`` [B, H, N, Dv + 1]."""

    def __init__(self, k: Tensor, v: Tensor, piece: slice, variant: Variant) -> None:
        super().__init__(k[:, piece], 1.0, variant)
        self.v = _append(_by_head(v[:, piece]), 1.0)

    def state(self) -> Tensor:
        return self.phi.mT @ self.v


class _Queries(_Rows):
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
        super().__init__(q[:, piece], float(variant.has_constant), variant)
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


def _pieces(q: Tensor) -> list[slice]:
    """Split the tokens of q [B, N, H, D] into slices of about equal length."""
    batch, num_tokens, heads, _ = q.shape
    most = max(MIN_PIECE, PIECE_ROWS // (batch * heads))
    count = max(1, -(-num_tokens // most))
    edges = [num_tokens * i // count for i in range(count + 1)]
    return [slice(*edge) for edge in pairwise(edges)]


def _running_sum(states: Tensor, start: Tensor | None) -> Tensor:
    """Return the sums of the first 0, 1, ... T - 1 of T - 1 states, all with ``start`` added."""
    if start is None:
        return F.pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))
    return torch.cat([start.unsqueeze(2), states], dim=2).cumsum(2)


def _by_head(x: Tensor) -> Tensor:
    """[B, N, H, D] in any dtype -> [B, H, N, D] contiguous in the computing dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.transpose(1, 2).to(dtype).contiguous()


def _put(x: Tensor, out: Tensor) -> None:
    """Copy [B, H, N, D] into ``out`` [B, N, H, D]."""
    out.copy_(x.transpose(1, 2))


def _append(x: Tensor, last: Tensor | float) -> Tensor:
    out = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    out[..., :-1], out[..., -1:] = x, last
    return out


def _masked_product(mask: Tensor, rows: Tensor, *, transposed: bool = False) -> Tensor:
    """Return mask @ rows for a lower triangular mask, whose zeros keep out NaN and infinity too."""
    mask = mask.mT if transposed else mask
    product = mask @ rows
    if product.is_meta or product.sum().isfinite():
        return product
    finite = rows.isfinite()
    product = mask @ torch.where(finite, rows, 0)
    # A row of the product depends on itself and on all rows on its side of the diagonal.
    side = torch.ones_like(mask).triu() if transposed else torch.ones_like(mask).tril()
    return product.masked_fill(side @ (~finite).to(side.dtype) > 0, torch.nan)
