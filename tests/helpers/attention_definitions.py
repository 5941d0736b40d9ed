"""Every kind of attention as a loop over tokens in float64, written by hand from its definition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_linclip.config import (
    DepthwiseLocal,
    GatedDeltaAttention,
    LinearAttention,
    SoftmaxAttention,
    WindowAttention,
)
from ds_linclip.model.attention import Patches, SelfAttention

__all__ = ["CASES", "Case", "define"]

#: From a layer, its input [B, N, W] and the places of its tokens to what enters the output
#: projection, [B, N, H, D].
Definition = Callable[[Any, Tensor, Patches | None], Tensor]


class Case(NamedTuple):
    """Settings with their definition.

    Attributes:
        settings: The settings of a kind.
        define: Returns the output of attention, before head norm and local part.
        is_causal, is_bidirectional: Whether a text, an image tower may have it.
    """

    settings: Any
    define: Definition
    is_causal: bool = True
    is_bidirectional: bool = True


def define(case: Case, layer: SelfAttention, x: Tensor, patches: Patches | None) -> Tensor:
    """Return what enters the output projection, [B, N, H, D]."""
    o = case.define(layer, x, patches)
    settings = layer.settings
    if getattr(settings, "head_norm", False):
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        o = o * layer.get_parameter("head_norm.weight").view(o.shape[2:])
    local = getattr(settings, "local", None)
    if isinstance(local, DepthwiseLocal):
        o = o + depthwise(layer, x, patches, local.size)
    return o


def depthwise(layer: Any, x: Tensor, patches: Patches | None, size: int) -> Tensor:
    """Return the depthwise convolution of the values, token by token."""
    _, _, v = layer.project(x)
    weight = layer.local_weight.view(*v.shape[2:], -1)  # [H, D, taps]
    return torch.stack(
        [
            sum(
                (v[b, n] * weight[..., tap] for tap, n in neighbours(i, b, v, patches, size)),
                torch.zeros_like(v[b, i]),
            )
            for b in range(len(v))
            for i in range(v.shape[1])
        ]
    ).view(v.shape)


def neighbours(
    i: int, b: int, v: Tensor, patches: Patches | None, size: int
) -> list[tuple[int, int]]:
    """Return tap and token of everything that token i of sequence b takes from."""
    if patches is None:
        return [(tap, n) for tap in range(size) if (n := i - size + 1 + tap) >= 0]
    if i == 0:
        return []
    places = patches.coordinates(v.device).expand(len(v), -1, -1)[b].tolist()
    row, column = places[i - 1]
    found = []
    for n, (other_row, other_column) in enumerate(places, start=1):
        down, right = other_row - row + size // 2, other_column - column + size // 2
        if 0 <= down < size and 0 <= right < size:
            found.append((down * size + right, n))
    return found


def rows(layer: Any, num_tokens: int) -> list[slice]:
    """Return the keys that each row sees."""
    return [slice(0, i + 1 if layer.causal else num_tokens) for i in range(num_tokens)]


def by_row(layer: Any, x: Tensor, row: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Return a row at a time of every head: ``row(q [D], k [n, D], v [n, D]) -> [D]``."""
    q, k, v = layer.project(x)
    return torch.stack(
        [
            row(q[b, i, h], k[b, seen, h], v[b, seen, h])
            for b in range(len(q))
            for i, seen in enumerate(rows(layer, q.shape[1]))
            for h in range(q.shape[2])
        ]
    ).view(q.shape)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def softmax(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    def row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (k @ q / len(q) ** 0.5).softmax(0) @ v

    return by_row(layer, x, row)


def linear(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    settings = layer.settings
    scores = {
        "affine": lambda q, k: 1 + k @ q,
        "quadratic": lambda q, k: 1 + k @ q + (k @ q) ** 2 / 2,
        "relu": lambda q, k: k.relu() @ q.relu(),
        "softplus": lambda q, k: (1 + k.exp()).log() @ (1 + q.exp()).log(),
    }

    def row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = scores[settings.feature_map](unit(q), unit(k))
        if settings.normalized:
            # The weight of a row's only key is one, whatever its score.
            is_single = settings.feature_map == "affine" and len(k) == 1
            return v[0] if is_single else score @ v / score.sum().clamp(min=1e-6 * len(k))
        return settings.score_scale * len(k) ** -settings.length_exponent * (score @ v)

    return by_row(layer, x, row)


def window(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    q, k, v = layer.project(x)

    def seen(b: int, i: int) -> list[int]:
        if patches is None:
            return [*range(max(0, i - layer.settings.size + 1), i + 1)]
        if i == 0:
            return [*range(q.shape[1])]
        size = 2 * layer.settings.radius + 1
        return [0, *(n for _, n in neighbours(i, b, v, patches, size))]

    def row(b: int, i: int, h: int) -> Tensor:
        n = seen(b, i)
        return (k[b, n, h] @ q[b, i, h] / q.shape[3] ** 0.5).softmax(0) @ v[b, n, h]

    places = [
        (b, i, h) for b in range(len(q)) for i in range(q.shape[1]) for h in range(q.shape[2])
    ]
    return torch.stack([row(*place) for place in places]).view(q.shape)


def gated_delta(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    settings, heads, head_dim = layer.settings, layer.heads, layer.head_dim
    num_scans = 1 if layer.causal else 2
    v = (x @ layer.qkv.weight.T + layer.qkv.bias).unflatten(2, (heads, 3, head_dim))
    taps = layer.conv_weight.view(heads, 3, head_dim, num_scans, settings.conv_size)
    scans = (layer.beta_weight, layer.decay_weight, layer.a_log, layer.dt_bias)
    scans = [each.unflatten(0, (heads, num_scans)) for each in scans]
    outputs = []
    for scan in range(num_scans):
        order = [*range(x.shape[1])]
        order = order[::-1] if scan else order
        w_beta, w_decay, a_log, dt_bias = (each[:, scan] for each in scans)
        state: Any = 0
        found = {}
        for step, token in enumerate(order):
            mixed = sum(
                v[:, order[step - back]] * taps[:, :, :, scan, -1 - back]
                for back in range(min(step + 1, settings.conv_size))
            )
            query, key, value = (mixed / (1 + (-mixed).exp())).unbind(2)  # [B, H, D]
            query, key = unit(query) / head_dim**0.5, unit(key)
            beta = 1 / (1 + (-x[:, token] @ w_beta.T).exp())  # [B, H]
            step_size = (1 + (x[:, token] @ w_decay.T + dt_bias).exp()).log()
            state = state * (-a_log.exp() * step_size).exp()[:, :, None, None]
            if step == 0:
                state = torch.zeros_like(key[..., None] * value[..., None, :])
            wrong = value - torch.einsum("bhkv,bhk->bhv", state, key)
            state = state + beta[..., None, None] * key[..., None] * wrong[..., None, :]
            found[token] = torch.einsum("bhkv,bhk->bhv", state, query)
        outputs.append(torch.stack([found[token] for token in range(x.shape[1])], 1))
    o = sum(outputs) / num_scans
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    o = o * layer.norm_weight.view(heads, head_dim)
    if settings.gate:
        gate = (x @ layer.gate_weight.T).view(o.shape)
        o = o * gate / (1 + (-gate).exp())
    return o


CASES: dict[str, Case] = {
    "softmax": Case(SoftmaxAttention(), softmax),
    "eq4": Case(LinearAttention(normalized=True, head_norm=True), linear),
    "eq7": Case(LinearAttention(score_scale=0.25, length_exponent=0.5), linear),
    "eq7-local": Case(LinearAttention(local=DepthwiseLocal(size=5)), linear),
    "quadratic": Case(LinearAttention(feature_map="quadratic", normalized=True), linear),
    "relu": Case(LinearAttention(feature_map="relu", normalized=True), linear),
    "softplus": Case(LinearAttention(feature_map="softplus"), linear),
    "gated-delta": Case(GatedDeltaAttention(), gated_delta),
    "gated-delta-plain": Case(GatedDeltaAttention(conv_size=2, gate=False), gated_delta),
    "window": Case(WindowAttention(size=5, radius=1), window),
    "window-of-everything": Case(WindowAttention(size=200, radius=20), window),
}
