"""Every kind of attention as a loop over tokens in float64, written by hand from its definition."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_linclip.config import (
    DepthwiseLocal,
    FastAttention,
    FocusedAttention,
    FrequencyAttention,
    GatedDeltaAttention,
    HedgehogAttention,
    InlineAttention,
    LinearAttention,
    LunaAttention,
    MilaAttention,
    PolaformerAttention,
    PredictedLocal,
    QtAttention,
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
        gate: Returns the factor on the output after head norm and local part, [B, N, H, D].
    """

    settings: Any
    define: Definition
    is_causal: bool = True
    is_bidirectional: bool = True
    gate: Callable[[Any, Tensor], Tensor] | None = None


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
    if isinstance(local, PredictedLocal):
        o = o + predicted(layer, x, patches)
    if getattr(settings, "value_part", False):
        _, _, v = layer.project(x)
        gain, bias = (
            getattr(layer, f"value_{name}").view(v.shape[2:]) for name in ("gain", "bias")
        )
        o = o + gelu(gain * v + bias)
    return o if case.gate is None else o * case.gate(layer, x)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + (x / 2**0.5).erf()) / 2


def predicted(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    """Return the convolution with predicted weights of the values, token by token and head by
    head."""
    _, _, v = layer.project(x)
    heads, dim = v.shape[2:]
    weight, bias = layer.local_hidden_weight.view(heads, dim, dim), layer.local_hidden_bias
    taps_weight = layer.local_taps_weight.view(heads, dim, -1, dim)  # [H, D, taps, D]
    taps_bias = layer.local_taps_bias.view(heads, dim, -1)
    found = []
    for b, i in ((b, i) for b in range(len(v)) for i in range(v.shape[1])):
        mean = x[b, slice(0, i + 1 if patches is None else None)].mean(0)
        for h in range(heads):
            own = slice(h * dim, (h + 1) * dim)
            hidden = gelu(weight[h] @ mean[own] + bias[own])
            taps = taps_weight[h] @ hidden + taps_bias[h]  # [D, taps]
            near = neighbours(i, b, v, patches, 3)
            found.append(sum((taps[:, t] * v[b, n, h] for t, n in near), 0 * v[b, i, h]))
    return torch.stack(found).view(v.shape)


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
    first = patches.num_class_tokens
    if i < first:
        return []
    places = patches.coordinates(v.device).expand(len(v), -1, -1)[b].tolist()
    row, column = places[i - first]
    found = []
    for n, (other_row, other_column) in enumerate(places, start=first):
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
    rows, columns, first = patches.rows, patches.columns, patches.num_class_tokens

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
            torch.einsum("wfp,phd->fhwd", waves.forward[:, :, places], each[b, first:])
            for b, places in enumerate(kept)
        ]
        real = each[:, :first]
        of_class = torch.stack([real, torch.zeros_like(real)], dim=3)
        streams.append(torch.cat([torch.stack(bins), of_class], dim=1))
    o = rwkv7(layer, unit(streams[0]), unit(streams[1]), streams[2])  # [B, L + 1, H, 2, D]
    patch_tokens = [
        torch.einsum("wfp,fhwd->phd", waves.backward[:, :, places], o[b, : len(found)])
        for b, places in enumerate(kept)
    ]
    return torch.cat([o[:, len(found) :, :, 0], torch.stack(patch_tokens)], dim=1)


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


def window(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    q, k, v = layer.project(x)

    def seen(b: int, i: int) -> list[int]:
        if patches is None:
            return [*range(max(0, i - layer.settings.size + 1), i + 1)]
        if i < patches.num_class_tokens:
            return [*range(q.shape[1])]
        size = 2 * layer.settings.radius + 1
        return [
            *range(patches.num_class_tokens),
            *(n for _, n in neighbours(i, b, v, patches, size)),
        ]

    found = []
    for b, i in product(range(len(q)), range(q.shape[1])):
        n = seen(b, i)
        scores = torch.einsum("hd,nhd->hn", q[b, i], k[b, n]) / q.shape[3] ** 0.5
        found.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v[b, n]))
    return torch.stack(found).view(q.shape)


def gated_delta(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    settings, heads, head_dim = layer.settings, layer.heads, layer.head_dim
    num_scans = 1 if layer.causal else 2
    v = (x @ layer.qkv.weight.T + layer.qkv.bias).unflatten(2, (heads, 3, head_dim))
    taps = layer.conv_weight.view(heads, 3, head_dim, num_scans, settings.conv_size)
    gates = (layer.beta_weight, layer.decay_weight, layer.a_log, layer.dt_bias)
    scans = [each.unflatten(0, (heads, num_scans)) for each in gates]
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
    o = torch.stack(outputs).mean(0)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    o = o * layer.norm_weight.view(heads, head_dim)
    if settings.gate:
        gate = (x @ layer.gate_weight.T).view(o.shape)
        o = o * gate / (1 + (-gate).exp())
    return o


def inline(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    def row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = k @ q / len(q) ** 0.5
        return (scores - scores.mean() + 1) @ v / len(k)

    return by_row(layer, x, row)


def fast(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    q, k, v = layer.project(x)
    if layer.settings.qk_norm == "max":
        largest = [y.square().sum(-1).amax(1)[:, None, :, None] for y in (q, k)]
        q, k = (y / (m + 1e-6).sqrt() for y, m in zip((q, k), largest, strict=True))
    else:
        q, k = unit(q), unit(k)
    found = []
    for i, seen in enumerate(rows(layer, q.shape[1])):
        x = torch.einsum("bhd,bnhd->bhn", q[:, i], k[:, seen])
        score = 1 + x + (x**2 / 2 if layer.settings.order == 2 else 0)
        # The weight of a row's only key is one, whatever its score.
        weights = score / score.sum(-1, keepdim=True) if x.shape[2] > 1 else torch.ones_like(x)
        found.append(torch.einsum("bhn,bnhd->bhd", weights, v[:, seen]))
    return torch.stack(found, dim=1)


def qt(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = k @ q / len(q) ** 0.5
        score = 1 + x + x**2 / 2
        return score @ v / score.sum()

    if layer.settings.form == "full":
        return by_row(layer, x, full)
    q, k, v = layer.project(x)
    q, k = (y / y.square().sum(-1, keepdim=True).sqrt() for y in (unit(q) ** 2, unit(k) ** 2))
    constant = layer.constant.square().clamp(min=1e-4)[:, None]  # [H, 1]
    found = []
    for i, seen in enumerate(rows(layer, q.shape[1])):
        score = constant + torch.einsum("bhd,bnhd->bhn", q[:, i], k[:, seen])
        weights = score / score.sum(-1, keepdim=True)
        found.append(torch.einsum("bhn,bnhd->bhd", weights, v[:, seen]))
    return torch.stack(found, dim=1)


def focused(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    def features(x: Tensor) -> Tensor:
        r = x.clamp(min=0)
        powers = r**layer.settings.power
        lengths = (r.square().sum(-1, keepdim=True) / powers.square().sum(-1, keepdim=True)).sqrt()
        return lengths * powers

    def row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = features(k) @ features(q)
        return score @ v / score.sum().clamp(min=1e-6 * len(k))

    return by_row(layer, x, row)


def mila(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    """Return every weight from the angle between two tokens: turning both features by their angles
    has the effect of turning one by the difference."""
    q, k, v = layer.project(x)
    q, k = (torch.where(each > 0, each + 1, each.exp()) for each in (q, k))
    half = q.shape[3] // 2
    out = []
    for b in range(len(q)):
        if patches is None:
            places = torch.arange(q.shape[1])[:, None]
        else:
            found = patches.coordinates(v.device).expand(len(v), -1, -1)[b]
            places = torch.cat([torch.zeros(patches.num_class_tokens, 2), found])
        steps = half // places.shape[1]
        speeds = layer.settings.rotation_base ** -(torch.arange(steps).double() / steps)
        for i, seen in enumerate(rows(layer, q.shape[1])):
            turns = ((places[i] - places[seen])[:, :, None] * speeds).flatten(1)[:, None]
            q_1, q_2 = q[b, i].chunk(2, -1)  # [H, D / 2]
            k_1, k_2 = k[b, seen].chunk(2, -1)  # [n, H, D / 2]
            along, across = q_1 * k_1 + q_2 * k_2, q_1 * k_2 - q_2 * k_1
            weight = (turns.cos() * along + turns.sin() * across).sum(-1)
            score = (q[b, i] * k[b, seen]).sum(-1)  # [n, H]
            out.append((weight[:, :, None] * v[b, seen]).sum(0) / score.sum(0)[:, None])
    return torch.stack(out).view(v.shape)


def polaformer(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    size = layer.head_dim
    learned = layer.power.view(1, layer.local_heads, size)
    exponent = 1 + layer.settings.alpha / (1 + (-learned).exp())  # [1, H, D]

    def score(q: Tensor, k: Tensor) -> Tensor:
        """Return the products of entries of equal sign, to their power, [n, H]."""
        product = q * k
        return torch.where(product > 0, product.abs() ** exponent, 0).sum(-1)

    q, k, v = layer.project(x)
    out = []
    for b in range(len(q)):
        for i, seen in enumerate(rows(layer, x.shape[1])):
            halves = []
            for sign, values in zip((1, -1), v[b, seen].chunk(2, -1), strict=True):
                weight = score(sign * q[b, i], k[b, seen])
                total = weight.sum(0).clamp(min=1e-6 * len(weight))  # [H]
                halves.append((weight[:, :, None] * values).sum(0) / total[:, None])
            out.append(torch.cat(halves, -1))
    return torch.stack(out).view(v.shape)


def linear_gate(layer: Any, x: Tensor) -> Tensor:
    gate = x @ layer.gate_weight.T + layer.gate_bias
    return gate.view(*x.shape[:2], layer.local_heads, layer.head_dim)


def by_features(
    layer: Any,
    x: Tensor,
    query_features: Callable[[Tensor, int], Tensor],
    key_features: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Return means of values with weights phi(q).phi(k); phi is given a row [D] and its head."""
    q, k, v = layer.project(x)
    o = torch.zeros_like(v)
    for b, h in product(range(len(v)), range(v.shape[2])):
        keys = torch.stack([key_features(each, h) for each in k[b, :, h]])
        for i, seen in enumerate(rows(layer, v.shape[1])):
            score = keys[seen] @ query_features(q[b, i, h], h)
            o[b, i, h] = score @ v[b, seen, h] / score.sum().clamp(min=1e-6 * len(score))
    return o


def hedgehog(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    def features(matrices: Tensor, row: Tensor, head: int) -> Tensor:
        up, down = (matrices[head] @ row).exp(), (-matrices[head] @ row).exp()
        return torch.cat([up / up.sum(), down / down.sum()])

    maps = partial(features, layer.query_map), partial(features, layer.key_map)
    return by_features(layer, x, *maps)


def luna(layer: Any, x: Tensor, patches: Patches | None) -> Tensor:
    def psi(u: Tensor) -> Tensor:
        hidden = (layer.hidden_weight * u + layer.hidden_bias).clamp(min=0)
        return (1 + (layer.channel_weight @ hidden + layer.channel_bias).exp()).log()

    def features(row: Tensor, head: int) -> Tensor:
        projections = layer.directions @ row + layer.offsets
        return torch.cat([psi(u) for u in projections]) / len(projections) ** 0.5

    return by_features(layer, x, features, features)


CASES: dict[str, Case] = {
    "softmax": Case(SoftmaxAttention(), softmax),
    "eq4": Case(LinearAttention(normalized=True, head_norm=True), linear),
    "eq7": Case(LinearAttention(score_scale=0.25, length_exponent=0.5), linear),
    "eq7-local": Case(LinearAttention(local=DepthwiseLocal(size=5)), linear),
    "quadratic": Case(LinearAttention(feature_map="quadratic", normalized=True), linear),
    "relu": Case(LinearAttention(feature_map="relu", normalized=True), linear),
    "softplus": Case(LinearAttention(feature_map="softplus"), linear),
    "hedgehog": Case(HedgehogAttention(), hedgehog),
    "hedgehog-local": Case(HedgehogAttention(head_norm=True, local=DepthwiseLocal()), hedgehog),
    "luna": Case(LunaAttention(directions=5, channels=4, hidden=7), luna),
    "luna-local": Case(LunaAttention(head_norm=True, local=DepthwiseLocal()), luna),
    "focused": Case(FocusedAttention(), focused),
    "focused-power": Case(
        FocusedAttention(power=2.5, head_norm=True, local=DepthwiseLocal(size=5)), focused
    ),
    "mila": Case(MilaAttention(local=DepthwiseLocal(size=3)), mila),
    "mila-base": Case(MilaAttention(rotation_base=50.0), mila),
    "polaformer": Case(
        PolaformerAttention(local=DepthwiseLocal(size=5)), polaformer, gate=linear_gate
    ),
    "polaformer-ungated": Case(PolaformerAttention(alpha=3.0, gate=False), polaformer),
    "eq7-predicted": Case(LinearAttention(local=PredictedLocal()), linear),
    "inline": Case(InlineAttention(), inline),
    "inline-predicted": Case(InlineAttention(head_norm=True, local=PredictedLocal()), inline),
    "fast-1": Case(FastAttention(), fast),
    "fast-2": Case(FastAttention(order=2, head_norm=True), fast),
    "fast-1-max": Case(FastAttention(qk_norm="max"), fast, is_causal=False),
    "fast-2-max": Case(FastAttention(order=2, qk_norm="max"), fast, is_causal=False),
    "qt": Case(QtAttention(value_part=True, local=DepthwiseLocal()), qt),
    "qt-full": Case(QtAttention(form="full"), qt),
    "gated-delta": Case(GatedDeltaAttention(), gated_delta),
    "gated-delta-plain": Case(GatedDeltaAttention(conv_size=2, gate=False), gated_delta),
    "window": Case(WindowAttention(size=5, radius=1), window),
    "window-of-everything": Case(WindowAttention(size=200, radius=20), window),
    "frequency": Case(FrequencyAttention(), frequency),
    "frequency-paper": Case(FrequencyAttention(side="paper"), frequency),
    "frequency-tokens": Case(FrequencyAttention(axis="tokens"), frequency, is_causal=False),
    "frequency-tokens-paper": Case(
        FrequencyAttention(axis="tokens", side="paper"), frequency, is_causal=False
    ),
}
