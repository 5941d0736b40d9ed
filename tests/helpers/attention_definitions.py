"""Every kind of attention as a loop over tokens in float64, written by hand from its definition."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_linclip.config import (
    DepthwiseLocal,
    FrequencyAttention,
    LinearAttention,
    SoftmaxAttention,
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


def frequency(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    r, k, v = layer.project(x)
    heads, size = v.shape[2:]
    if layer.settings.axis == "features":
        waves = waves_of((1, size), [(0, f) for f in range(size // 2 + 1)])
        r, k, v = (torch.einsum("wfd,bnhd->bnhwf", waves.forward, each) for each in (r, k, v))
        o = rwkv7(layer, r, k, v)
        o = torch.einsum("wfd,bnhwf->bnhd", waves.backward, o)
    else:
        o = over_frequencies(layer, r, k, v, patches)
    o = o - o.mean(-1, keepdim=True)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5 * size).sqrt()
    gain, bias = layer.norm_gain, layer.norm_bias
    return o * gain.view(heads, size) + bias.view(heads, size)


class Waves(NamedTuple):
    """Real and imaginary parts of a half spectrum, [2, frequencies, places] of a grid.

    Attributes:
        forward: Times the places: the spectrum.
        backward: Times the spectrum: the places.
    """

    forward: Tensor
    backward: Tensor


def waves_of(grid: tuple[int, int], frequencies: list[tuple[int, int]]) -> Waves:
    rows, columns = grid
    found, counts = torch.zeros(2, len(frequencies), rows * columns, dtype=torch.float64), []
    for f, (up, along) in enumerate(frequencies):
        for place in range(rows * columns):
            row, column = divmod(place, columns)
            angle = 2 * math.pi * (up * row / rows + along * column / columns)
            found[0, f, place] = math.cos(angle) / (rows * columns) ** 0.5
            found[1, f, place] = -math.sin(angle) / (rows * columns) ** 0.5
        # The others stand for their conjugates, too.
        counts.append(1.0 if 2 * along in (0, columns) else 2.0)
    return Waves(found, found * torch.tensor(counts, dtype=torch.float64)[:, None])


def over_frequencies(layer: Any, r: Tensor, k: Tensor, v: Tensor, patches: Any) -> Tensor:
    rows, columns = patches.rows, patches.columns

    def magnitude(frequency: tuple[int, int]) -> Fraction:
        up = Fraction(min(frequency[0], rows - frequency[0]), rows)
        return up**2 + Fraction(frequency[1], columns) ** 2

    found = [(up, along) for up in range(rows) for along in range(columns // 2 + 1)]
    waves = waves_of((rows, columns), sorted(found, key=magnitude))
    kept = [*range(rows * columns)]
    kept = [kept] * len(v) if patches.kept is None else patches.kept.tolist()
    streams = []
    for each in (r, k, v):
        bins = [
            torch.einsum("wfp,phd->fhwd", waves.forward[:, :, places], each[b, 1:])
            for b, places in enumerate(kept)
        ]
        of_class = torch.stack([each[:, :1], torch.zeros_like(each[:, :1])], dim=3)
        streams.append(torch.cat([torch.stack(bins), of_class], dim=1))
    o = rwkv7(layer, unit(streams[0]), unit(streams[1]), streams[2])  # [B, L + 1, H, 2, D]
    patch_tokens = [
        torch.einsum("wfp,fhwd->phd", waves.backward[:, :, places], o[b, :-1])
        for b, places in enumerate(kept)
    ]
    return torch.cat([o[:, -1:, :, 0], torch.stack(patch_tokens)], dim=1)


def rwkv7(layer: Any, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the recurrence on real and imaginary parts [B, L, H, 2, C], a token at a time."""
    shape = k.shape[2:]
    xi, g, u = (getattr(layer, f"{n}_gain").view(shape) for n in ("removal", "rate", "bonus"))
    b_w, b_a = layer.decay_bias.view(shape), layer.rate_bias.view(shape)
    orders = [[*range(r.shape[1])]]
    if not layer.causal and layer.settings.axis == "features":
        orders.append(orders[0][::-1])
    total = torch.zeros_like(v)
    for order in orders:
        state = v.new_zeros(len(v), *shape, shape[-1])  # values by keys
        outputs: dict[int, Tensor] = {}
        for t in order:
            key = k[:, t]
            z = b_w + torch.einsum("hwdc,bhwc->bhwd", layer.decay_map, key)
            w = (-math.exp(-0.5) / (1 + (-z).exp())).exp()
            rate = 1 / (1 + (-b_a - torch.einsum("hwdc,bhwc->bhwd", layer.rate_map, key)).exp())
            kappa = unit(key * xi)
            change = torch.diag_embed(w) - kappa[..., :, None] * (rate * kappa)[..., None, :]
            key = key * (1 + (rate - 1) * g)
            state = state @ change if layer.settings.side == "right" else change @ state
            state = state + v[:, t, ..., :, None] * key[..., None, :]
            bonus = (r[:, t] * u * key).sum(-1, keepdim=True) * v[:, t]
            outputs[t] = (state @ r[:, t, ..., None])[..., 0] + bonus
        total = total + torch.stack([outputs[t] for t in sorted(outputs)], dim=1) / len(orders)
    return total


CASES: dict[str, Case] = {
    "softmax": Case(SoftmaxAttention(), softmax),
    "eq4": Case(LinearAttention(normalized=True, head_norm=True), linear),
    "eq7": Case(LinearAttention(score_scale=0.25, length_exponent=0.5), linear),
    "eq7-local": Case(LinearAttention(local=DepthwiseLocal(size=5)), linear),
    "quadratic": Case(LinearAttention(feature_map="quadratic", normalized=True), linear),
    "relu": Case(LinearAttention(feature_map="relu", normalized=True), linear),
    "softplus": Case(LinearAttention(feature_map="softplus"), linear),
    "frequency": Case(FrequencyAttention(), frequency),
    "frequency-paper": Case(FrequencyAttention(side="paper"), frequency),
    "frequency-tokens": Case(FrequencyAttention(axis="tokens"), frequency, is_causal=False),
    "frequency-tokens-paper": Case(
        FrequencyAttention(axis="tokens", side="paper"), frequency, is_causal=False
    ),
}
