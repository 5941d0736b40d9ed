"""The quadratic feature map, 1 + x + x^2 / 2 on x = q.k, composed of narrower feature maps.

x^2 / 2 is an inner product of features, the products of pairs of entries: of every entry with the
one d places further on, cyclically, for d up to D / 2. They are too many for one state in
registers, and are processed in blocks: o is the sum of the affine variant, 1 + x, and of one
identity variant per block. Any map that is given as features can be composed in this way.

Source: second-order Taylor attention as in QT-ViT and FAST.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linclip_kernels.linear_attention.variant import NORM_EPS, Variant

__all__ = [
    "apply_quadratic_state",
    "attend_quadratic",
    "num_quadratic_features",
    "sum_quadratic_keys",
]

#: Widest block of pairs (or D, if that is wider), and how many ones are appended to v to give the
#: denominator.
MAX_BLOCK = 128
NUM_ONES = 16


def num_quadratic_features(key_dim: int) -> int:
    """Return the number of features: x itself and the products of pairs of its entries."""
    return key_dim + key_dim * (key_dim // 2 + 1)


def attend_quadratic(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, Variant], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    variant: Variant,
    *,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Compute attention with the quadratic feature map.

    Args:
        attend: (q, k, v, initial state, variant) -> (o, state) with the narrow feature maps.
        q, k: [B, N, H, D].
        v: [B, N, H, Dv].
        initial: [S, H, F + 1, Dv + 1] with the F features of :func:`num_quadratic_features`.
        variant: The variant to compute.
        return_state: Whether ``attend`` returns states.

    Returns:
        o [B, N, H, Dv] and the state [S, H, F + 1, Dv + 1], meaningless without ``return_state``.
    """
    if variant.qk_norm:
        q, k = _unit_rows(q), _unit_rows(k)
    value_dim, dtype = v.shape[-1], v.dtype
    narrow = _narrowed(variant)
    if variant.normalized:
        v = torch.cat([v, v.new_ones(*v.shape[:-1], NUM_ONES)], dim=-1)
        initial = None if initial is None else _with_ones(initial)
    blocks = _blocks(q.shape[-1])
    begins = _split_state(initial, q.shape[-1], blocks)

    out, state = attend(q, k, v, begins[0], narrow._replace(feature_map="affine"))
    out, states = _widened(out), [state]
    for block, begin in zip(blocks, begins[1:], strict=True):

        def attend_to_pairs(
            q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None, block: range = block
        ) -> tuple[Tensor, Tensor]:
            return attend(_pairs(q, block), _pairs(k, block), v, begin, _of_pairs(narrow))

        share, state = _without_features(attend_to_pairs, q, k, v, begin)
        out = out + share
        states.append(state)
    if variant.normalized:
        out = out[..., :value_dim] / out[..., -1:]
    return out.to(dtype), _join_states(states, value_dim) if return_state else states[0]


def sum_quadratic_keys(
    sum_keys: Callable[[Tensor, Tensor, Variant], Tensor], k: Tensor, v: Tensor, variant: Variant
) -> Tensor:
    """Return the state [B, H, F + 1, Dv + 1] of all keys with the quadratic feature map.

    Args:
        sum_keys: (k, v, variant) -> state with the narrow feature maps.
        k: [B, N, H, D].
        v: [B, N, H, Dv].
        variant: The variant to compute.
    """
    k, narrow = _unit_rows(k) if variant.qk_norm else k, _narrowed(variant)
    states = [sum_keys(k, v, narrow._replace(feature_map="affine"))]
    for block in _blocks(k.shape[-1]):

        def sum_pairs(k: Tensor, v: Tensor, block: range = block) -> Tensor:
            return sum_keys(_pairs(k, block), v, _of_pairs(narrow))

        states.append(_without_features(sum_pairs, k, v))
    return _join_states(states, v.shape[-1])


def apply_quadratic_state(
    apply_state: Callable[[Tensor, Tensor, Variant], Tensor],
    q: Tensor,
    state: Tensor,
    variant: Variant,
) -> Tensor:
    """Return o [B, N, H, Dv] of queries that all see one state, with the quadratic feature map.

    Args:
        apply_state: (q, state, variant) -> o with the narrow feature maps.
        q: [B, N, H, D].
        state: [B, H, F + 1, Dv + 1].
        variant: The variant to compute.
    """
    value_dim, dtype = state.shape[-1] - 1, q.dtype
    q, narrow = _unit_rows(q) if variant.qk_norm else q, _narrowed(variant)
    state = _with_ones(state) if variant.normalized else state
    blocks = _blocks(q.shape[-1])
    first, *others = _split_state(state, q.shape[-1], blocks)
    assert first is not None
    out = _widened(apply_state(q, first, narrow._replace(feature_map="affine")))
    for block, part in zip(blocks, others, strict=True):

        def apply_to_pairs(q: Tensor, part: Tensor, block: range = block) -> Tensor:
            return apply_state(_pairs(q, block), part, _of_pairs(narrow))

        out = out + _without_features(apply_to_pairs, q, part)
    if variant.normalized:
        out = out[..., :value_dim] / out[..., -1:]
    return out.to(dtype)


def _narrowed(variant: Variant) -> Variant:
    """Return the variant of the summands, except for its feature map.

    Eq. 4 is the quotient of two parts of the mean over keys of (score v, score): columns of v and
    appended ones. Scores are at least 1/2.
    """
    narrow = variant._replace(qk_norm=False, normalized=False)
    return narrow._replace(score_scale=1.0, length_exponent=1.0) if variant.normalized else narrow


def _of_pairs(narrow: Variant) -> Variant:
    """Return the variant of a block of pairs, whose products come with the square of the scale."""
    return narrow._replace(feature_map="identity", qk_scale=narrow.qk_scale**2)


def _with_ones(state: Tensor) -> Tensor:
    """Return the state of values with ones appended."""
    ones = state[..., -1:].expand(-1, -1, -1, NUM_ONES + 1)
    return torch.cat([state[..., :-1], ones], dim=-1)


def _blocks(key_dim: int) -> list[range]:
    """Return the distances between the entries of a pair, in blocks."""
    distances, at_once = range(key_dim // 2 + 1), max(1, MAX_BLOCK // key_dim)
    return [distances[i : i + at_once] for i in range(0, len(distances), at_once)]


def _without_features(function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """Call a function whose features, D / 2 times q and k, the backward recomputes.

    They are kept inside torch.func's transforms, which torch's checkpoint does not support.
    """
    if torch._C._are_functorch_transforms_active():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _unit_rows(x: Tensor) -> Tensor:
    rows = _widened(x)
    square = rows.square().sum(-1, keepdim=True)
    # 0 * infinity is NaN: a row whose |x|^2 overflows is not scaled to zero.
    return (rows * ((square + NORM_EPS).rsqrt() + 0 * square)).to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pairs(x: Tensor, distances: range) -> Tensor:
    """Return products of pairs such that phi(q).phi(k) over all distances is (q.k)^2 / 2."""
    products = []
    for d in distances:
        # At distance 0 a pair should count half; at D / 2 every pair comes twice.
        weight = 0.5**0.5 if d == 0 or 2 * d == x.shape[-1] else 1.0
        products.append(x * x.roll(-d, dims=-1) * weight)
    return torch.cat(products, dim=-1)


def _split_state(state: Tensor | None, key_dim: int, blocks: list[range]) -> list[Tensor | None]:
    """Return a state for the keys themselves and one per block; the sums of v are in each."""
    sizes = [key_dim * len(block) for block in ([0], *blocks)]
    if state is None:
        return [None] * len(sizes)
    parts = state[:, :, 1:].split(sizes, dim=2)
    return [torch.cat([state[:, :, :1], rows], dim=2) for rows in parts]


def _join_states(states: list[Tensor], value_dim: int) -> Tensor:
    """Return one state from those of :func:`_split_state`, without the ones appended to v."""
    rows = torch.cat([states[0], *(state[:, :, 1:] for state in states[1:])], dim=2)
    return torch.cat([rows[..., :value_dim], rows[..., -1:]], dim=-1)
