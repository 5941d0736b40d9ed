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

from linclip_kernels.linear_attention.torch_rows import Keys, Queries, Rows, by_head
from linclip_kernels.linear_attention.variant import Variant

__all__ = [
    "apply_state",
    "apply_state_backward",
    "backward",
    "forward",
    "sum_keys",
    "sum_keys_backward",
]

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
    gradients: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:
    """Compute the gradients of q, k, v and the initial state.

    Args:
        q, k, v, initial, boundaries, variant: The arguments of :func:`forward`.
        grad: The gradient of o [B, N, H, Dv]; None: zero.
        grad_state: The gradient of the state [S, H, D + 1, Dv + 1]; None: zero.
        gradients: Receive dq and dk [B, N, H, D] and dv [B, N, H, Dv], with any strides.

    Returns:
        The gradient of the initial state, [S, H, D + 1, Dv + 1], or None.
    """
    d_states, order = [], _Causal if variant.causal else _Bidirectional
    grad = torch.zeros_like(v) if grad is None else grad
    for tokens, sequences in _sequences(q, boundaries):
        begin = None if initial is None else initial[sequences]
        end = None if grad_state is None else grad_state[sequences]
        run = order(q[:, tokens], k[:, tokens], v[:, tokens], begin, variant)
        outs = tuple(x[:, tokens] for x in gradients)
        d_state = run.backward(grad[:, tokens], end, outs)
        d_state[..., 0, -1] = 0  # the number of keys is not differentiated
        d_states.append(d_state)
    return None if initial is None else torch.cat(d_states)


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
        self.keys = lru_cache(maxsize=1)(lambda i: Keys(k, v, pieces[i], variant))

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
        self.q, self.state, self.variant = q, seen, variant
        self.seen = _center(seen) if variant.centered else seen
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
        d_seen = torch.zeros_like(self.seen) if self.variant.centered else d_state
        for piece in self.pieces:
            queries = self._queries(piece)
            y = queries.phi @ self.seen if self.variant.normalized else None
            d_y = queries.outputs_backward(by_head(grad[:, piece]), y)
            _put(queries.backward(d_y @ self.seen[..., 1:, :].mT), d_q[:, piece])
            d_seen += queries.phi.mT @ d_y
        if self.variant.centered:
            d_state += _center_backward(d_seen, self.state)

    def _queries(self, piece: slice) -> Queries:
        return Queries(self.q, piece, self.num_keys, self.single, self.variant)


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
            own, before = Keys(self.k, self.v, piece, self.variant).state(), states[-1]
            states.append(own if before is None else own + before)
        for piece, state in zip(reversed(self.pieces), reversed(states), strict=True):
            part = self._part(piece, state)
            y = part.y() if self.variant.normalized else None
            d_y = part.queries.outputs_backward(by_head(grad[:, piece]), y)
            d_phi_q, d_phi_k, d_v, d_state = part.backward(d_y, d_state)
            shares = part.queries.backward(d_phi_q), part.keys.backward(d_phi_k), d_v
            for share, gradient in zip(shares, gradients, strict=True):
                _put(share, gradient[:, piece])
        assert d_state is not None
        return d_state

    def _part(self, piece: slice, state: Tensor | None) -> "_CausalPiece":
        num_keys = 1 if state is None else state[:, :1, :1, -1:] + 1  # of the first row
        single = _FIRST_ROW if state is None and self.variant.fixes_single_key else None
        queries = Queries(self.q, piece, num_keys, single, self.variant)
        return _CausalPiece(queries, Keys(self.k, self.v, piece, self.variant), state)


class _CausalPiece:
    """Tokens in tiles [B, H, T, tile, *]: a row sees part of its tile, and the state before it."""

    def __init__(self, queries: Queries, keys: Keys, initial: Tensor | None) -> None:
        self.queries, self.keys = queries, keys
        self.num_tokens = keys.phi.shape[2]
        self.q, self.k, self.v = map(self._tiles, (queries.phi, keys.phi, keys.v))
        self.scores = (self.q @ self.k.mT).tril_()
        self.seen = None  # one tile, and nothing before it
        if self.k.shape[2] > 1 or initial is not None:
            self.seen = _running_sum(self.k[:, :, :-1].mT @ self.v[:, :, :-1], initial)
        if queries.variant.centered:
            tiles = self.q.shape[2:4]
            place = torch.arange(tiles.numel(), dtype=self.q.dtype, device=self.q.device)
            num_keys = queries.num_keys
            num_keys = num_keys.unsqueeze(2) if isinstance(num_keys, Tensor) else num_keys
            self.num_keys = place.view(*tiles, 1) + num_keys  # in view of every row
            column = None if self.seen is None else self.seen[..., -1:]
            self.q[..., :1] += self._shift_mean(self.scores, 1.0, self.q, column)

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
        if self.queries.variant.centered:  # the sum of a row's scores has this gradient
            row = None if self.seen is None else self.seen[..., :1, :].mT
            d_y[..., -1:] = self._shift_mean(d_scores, 0.0, d_y, row)
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

    def _shift_mean(
        self, products: Tensor, mean: float, rows: Tensor, seen: Tensor | None
    ) -> Tensor:
        """Shift masked products with keys so that their mean over all keys in view is ``mean``.

        Args:
            products: Products with the keys of the tile [B, H, T, tile, tile]; shifted in place.
            mean: The mean that they get, including those of earlier tiles.
            rows: What is multiplied [B, H, T, tile, *].
            seen: The sum of all earlier keys [B, H, T, *, 1]; None: there are none.

        Returns:
            What was added to the products of every row, [B, H, T, tile, 1].
        """
        total = products.sum(-1, keepdim=True)
        if seen is not None:
            total += rows @ seen
        shift = mean - total / self.num_keys
        products.add_(shift).tril_()
        return shift

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


def _center(state: Tensor) -> Tensor:
    """Return the state [B, H, D + 1, Dv + 1] of keys minus their mean."""
    sum_v, sum_k, num_keys = state[..., :1, :-1], state[..., 1:, -1:], state[..., :1, -1:]
    centered = state.clone()
    centered[..., 1:, :-1] -= sum_k * (sum_v / num_keys.clamp(min=1))
    centered[..., 1:, -1] = 0
    return centered


def _center_backward(grad: Tensor, state: Tensor) -> Tensor:
    """Return the gradient of a state from that of the centred state."""
    mean_v, mean_k = (
        x / state[..., :1, -1:].clamp(min=1) for x in (state[..., :1, :-1], state[..., 1:, -1:])
    )
    d_state, d_products = grad.clone(), grad[..., 1:, :-1]
    d_state[..., :1, :-1] -= mean_k.mT @ d_products
    d_state[..., 1:, -1:] = d_products @ -mean_v.mT
    return d_state


def _put(x: Tensor, out: Tensor) -> None:
    """Copy [B, H, N, D] into ``out`` [B, N, H, D]."""
    out.copy_(x.transpose(1, 2))


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
