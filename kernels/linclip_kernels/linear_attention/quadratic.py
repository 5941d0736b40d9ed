"""The quadratic feature map, 1 + x + x^2 / 2 on x = q.k, out of narrower feature maps.

x^2 / 2 is an inner product of features, the products of pairs of entries: of every entry with the
one d places further on, round the end, for d up to D / 2. They are too many for one state in
registers, and enter in blocks: o is the sum of the affine form, 1 + x, and of one product form per
block. Any map that is given as features can be built in this way.

Source: second-order Taylor attention as in QT-ViT and FAST.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linclip_kernels.linear_attention.form import NORM_EPS, Form

__all__ = ["attend_quadratic", "num_quadratic_features"]

#: Widest block of pairs (or D, if that is wider), and the ones behind v that give the denominator.
MAX_BLOCK = 128
NUM_ONES = 16


def num_quadratic_features(key_dim: int) -> int:
    """Features of the state beside the constant: x itself and the pairs of its entries."""
    return key_dim + key_dim * (key_dim // 2 + 1)


def attend_quadratic(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, Form], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    form: Form,
    *,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Attend with a form whose feature map is quadratic.

    Args:
        attend: (q, k, v, initial state, form) -> (o, state) for the narrow feature maps.
        q, k: [B, N, H, D].
        v: [B, N, H, Dv].
        initial: [S, H, F + 1, Dv + 1] with the F features of :func:`num_quadratic_features`.
        form: Which form.
        return_state: Whether ``attend`` gives states.

    Returns:
        o [B, N, H, Dv] and the state [S, H, F + 1, Dv + 1], meaningless without ``return_state``.
    """
    if form.qk_norm:
        q, k = _unit_rows(q), _unit_rows(k)
    value_dim, dtype = v.shape[-1], v.dtype
    narrow = form._replace(qk_norm=False, normalized=False)
    if form.normalized:
        # The mean over keys of (score v, score): its quotient is Eq. 4. Scores are at least 1/2.
        narrow = narrow._replace(score_scale=1.0, length_exponent=1.0)
        v = torch.cat([v, v.new_ones(*v.shape[:-1], NUM_ONES)], dim=-1)
        if initial is not None:
            ones = initial[..., -1:].expand(-1, -1, -1, NUM_ONES + 1)
            initial = torch.cat([initial[..., :-1], ones], dim=-1)
    key_dim = q.shape[-1]
    distances, at_once = range(key_dim // 2 + 1), max(1, MAX_BLOCK // key_dim)
    blocks = [distances[i : i + at_once] for i in range(0, len(distances), at_once)]
    begins = _split_state(initial, [key_dim * len(block) for block in ([0], *blocks)])

    out, state = attend(q, k, v, begins[0], narrow._replace(feature_map="affine"))
    out, states = _widened(out), [state]
    for block, begin in zip(blocks, begins[1:], strict=True):

        def attend_to_pairs(
            q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None, block: range = block
        ) -> tuple[Tensor, Tensor]:
            form = narrow._replace(feature_map="identity")
            return attend(_pairs(q, block), _pairs(k, block), v, begin, form)

        # The features are made again in the backward: kept, they would be D / 2 times q and k.
        share, state = checkpoint(
            attend_to_pairs, q, k, v, begin, use_reentrant=False, preserve_rng_state=False
        )
        out = out + share
        states.append(state)
    if form.normalized:
        out = out[..., :value_dim] / out[..., -1:]
    return out.to(dtype), _join_states(states, value_dim) if return_state else states[0]


def _unit_rows(x: Tensor) -> Tensor:
    rows = _widened(x)
    return (rows * (rows.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()).to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pairs(x: Tensor, distances: range) -> Tensor:
    """Products of pairs of entries, such that phi(q).phi(k) over all distances is (q.k)^2 / 2."""
    products = []
    for d in distances:
        # At distance 0 a pair should count half; at D / 2 every pair comes twice.
        weight = 0.5**0.5 if d == 0 or 2 * d == x.shape[-1] else 1.0
        products.append(x * x.roll(-d, dims=-1) * weight)
    return torch.cat(products, dim=-1)


def _split_state(state: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    """One state per block of features; each has the sums of v in its first row."""
    if state is None:
        return [None] * len(sizes)
    blocks = state[:, :, 1:].split(sizes, dim=2)
    return [torch.cat([state[:, :, :1], rows], dim=2) for rows in blocks]


def _join_states(states: list[Tensor], value_dim: int) -> Tensor:
    """The inverse, without the ones behind v."""
    rows = torch.cat([states[0], *(state[:, :, 1:] for state in states[1:])], dim=2)
    return torch.cat([rows[..., :value_dim], rows[..., -1:]], dim=-1)
