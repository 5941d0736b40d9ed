"""RWKV-7's recurrence on the real and the imaginary part of a spectrum, the idea of FRWKV.

Queries, keys and values are Fourier transformed, and the real and the imaginary part of a head are
two streams with a state S each. Of query r, key k and value v of a stream, with the stream's own
parameters and kappa = unit(k xi), a token makes (arXiv 2503.14456; * is entry by entry)

    log w = -exp(-1/2) sigmoid(b_w + A_w k),   a = sigmoid(b_a + A_a k),
    k' = k * (1 + (a - 1) * g),
    S <- S (diag(w) - kappa (a * kappa)^T) + v k'^T,   o = S r + (r . (u * k')) v.

The output is the inverse transform of both streams, then RWKV-7's group norm of every head.

- From FRWKV (arXiv 2512.07539): one recurrence for each part of an orthonormal half spectrum, the
  bonus (r . (u * k')) v before the norm, and with ``side="paper"`` a transition that multiplies the
  state from the left, as its released code does. FRWKV transforms the samples in time of a variable
  and scans over the variables; that is ``axis="features"``, for features of tokens.
- From RWKV-7: the recurrence above with its initial xi, g and u (0.71, 1.02, -0.04), and the group
  norm.
- Ours: one projection for q, k and v instead of two-layer networks; no token shift, no output gate
  and no value of the first layer; A_w and A_a are linear in the key of the same head, and zero at
  first, when b_w rises evenly over the channels of a stream. Features are transformed head by head:
  ranks that hold different heads need nothing from each other. In images the scans from both ends
  are averaged. And ``axis="tokens"``:

A transform over tokens is that of the grid of patches, with zeros for dropped ones. Frequencies,
ordered by their magnitude, take the place of the tokens; the class token, which has no imaginary
part, comes last and so reads all real parts. Queries and keys are unit vectors there: spectra of
images are largest at frequency 0, and in a product of three little else would be left.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.model.attention.base import SelfAttention
from ds_linclip.model.attention.parameters import OwnParameter
from ds_linclip.model.attention.patches import Patches
from ds_linclip.model.attention.rows import unit, widened
from ds_linclip.model.recurrences import dplr

__all__ = ["Attention"]

#: The strongest decay of a token is exp(-exp(-1/2)).
_STRONGEST = math.exp(-0.5)
#: Initial b_w of the first and the last channel of a stream: states that last for hundreds of
#: tokens, down to a few.
_DECAY_RANGE = -6.0, -1.0
#: Added to the variance of a head, for each of its channels.
_NORM_EPS = 1e-5


class Attention(SelfAttention):
    """The recurrence on streams, [B, L, 2 H, C]: of head h, 2 h is the real part and 2 h + 1 the
    imaginary part.

    With ``axis="features"``, L tokens have C = D / 2 + 1 frequencies, and what :meth:`attend` gets
    and returns, and the weights, belong to streams. With ``axis="tokens"``, L frequencies and the
    class token have C = D features, and :meth:`attend` goes from tokens to tokens.
    """

    @classmethod
    def own_parameters(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> Mapping[str, OwnParameter]:
        channels = _num_channels(settings, width // heads)
        matrix, vector = (heads, 2, channels, channels), (heads * 2 * channels,)

        def constant(shape: tuple[int, ...], value: float) -> OwnParameter:
            return OwnParameter(shape, partial(nn.init.constant_, val=value))

        return {
            "decay_map": constant(matrix, 0.0),
            "decay_bias": OwnParameter(vector, partial(_set_ramp, channels=channels)),
            "rate_map": constant(matrix, 0.0),
            "rate_bias": constant(vector, 0.0),
            "removal_gain": constant(vector, 0.71),
            "rate_gain": constant(vector, 1.02),
            "bonus_gain": constant(vector, -0.04),
            "norm_gain": constant((width,), 1.0),
            "norm_bias": constant((width,), 0.0),
        }

    @classmethod
    def flops(cls, settings: Any, head_dim: int, num_tokens: int, *, causal: bool) -> float:
        channels, length, scans = _num_channels(settings, head_dim), num_tokens, 1 if causal else 2
        if settings.axis == "tokens":
            # The half spectrum of a square grid.
            side = (num_tokens - 1) ** 0.5
            length, scans = 1 + round(side * (side / 2 + 1)), 1
        # A token reads the state with kappa and its query, and adds two products to it; not the
        # chunks. And a matrix for its decay, one for its rate.
        stream = (8 * scans + 4) * channels**2
        return 2 * stream * length / num_tokens

    def prepare(self, x: Tensor, patches: Patches | None) -> tuple[Any, ...]:
        # There is no transform in bfloat16.
        q, k, v = (widened(each) for each in self.project(x))
        if self.settings.axis == "tokens":
            self.check_patches(patches)
            return q, k, v, patches
        q, k, v = (_to_streams(torch.fft.rfft(each, norm="ortho")) for each in (q, k, v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        if self.settings.axis == "features":
            return self._attend_streams(q, k, v)
        (patches,) = more
        q, k, v = (_to_frequencies(each, patches) for each in (q, k, v))
        return _from_frequencies(self._attend_streams(unit(q), unit(k), v), patches)

    def finish(self, o: Tensor, x: Tensor, v: Tensor, patches: Patches | None) -> Tensor:
        if self.settings.axis == "features":
            o = torch.fft.irfft(_from_streams(o), n=self.head_dim, norm="ortho")  # [B, N, H, D]
        o = F.layer_norm(o, o.shape[-1:], eps=_NORM_EPS * self.head_dim)
        gain, bias = (widened(self.get_parameter(f"norm_{each}")) for each in ("gain", "bias"))
        return (o * gain.view(o.shape[2:]) + bias.view(o.shape[2:])).to(x.dtype)

    def _attend_streams(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return S r and the bonus for streams r, k [B, L, 2 H, C] and v [B, L, 2 H, Cv]."""
        log_w = -_STRONGEST * self._gate("decay", k)
        rate = self._gate("rate", k)
        kappa = unit(k * self._per_channel("removal_gain", k))
        k = k * (1 + (rate - 1) * self._per_channel("rate_gain", k))
        bonus = (r * self._per_channel("bonus_gain", k) * k).sum(-1, keepdim=True)
        inputs = [r, k, v, log_w, -kappa, rate * kappa]
        scan = partial(dplr, side=self.settings.side)
        if self.causal or self.settings.axis == "tokens":
            return scan(*inputs) + bonus * v
        forward, backward = scan(*(torch.cat([x, x.flip(1)]) for x in inputs)).chunk(2)
        return (forward + backward.flip(1)) / 2 + bonus * v

    def _gate(self, name: str, k: Tensor) -> Tensor:
        """Return ``sigmoid(bias + map k)`` for keys [B, L, 2 H, C] of streams."""
        matrices = widened(self.get_parameter(f"{name}_map")).flatten(0, 1)  # [2 H, C, C]
        mapped = torch.einsum("blhc,hdc->blhd", k, matrices)
        return torch.sigmoid(mapped + self._per_channel(f"{name}_bias", k))

    def _per_channel(self, name: str, k: Tensor) -> Tensor:
        """Return a vector of parameters as [2 H, C]."""
        return widened(self.get_parameter(name)).view(k.shape[2:])


def _num_channels(settings: Any, head_dim: int) -> int:
    return head_dim if settings.axis == "tokens" else head_dim // 2 + 1


def _set_ramp(vector: Tensor, channels: int) -> None:
    vector.view(-1, channels).copy_(torch.linspace(*_DECAY_RANGE, channels))


def _to_streams(spectrum: Tensor) -> Tensor:
    """Return the parts [B, L, 2 H, C] of complex [B, L, H, C]."""
    return torch.view_as_real(spectrum).transpose(-1, -2).flatten(2, 3)


def _from_streams(x: Tensor) -> Tensor:
    """Return complex [B, L, H, C] of its parts [B, L, 2 H, C]."""
    return torch.complex(*x.unflatten(2, (-1, 2)).unbind(3))


def _to_frequencies(x: Tensor, patches: Patches) -> Tensor:
    """Return streams [B, L + 1, 2 H, D] of tokens [B, N, H, D]: L frequencies, from low to high,
    then the class token, if any."""
    spectrum = torch.fft.rfft2(patches.to_grid(x.flatten(2)), norm="ortho").flatten(2)
    order = _ascending(patches, x.device)
    spectrum = spectrum.index_select(2, order).transpose(1, 2).unflatten(2, x.shape[2:])
    class_token = x[:, : patches.num_class_tokens].to(spectrum.dtype)
    return _to_streams(torch.cat([spectrum, class_token], dim=1))


def _from_frequencies(x: Tensor, patches: Patches) -> Tensor:
    """Return tokens [B, N, H, D] of streams [B, L + 1, 2 H, D]. Parts that the half spectrum of a
    real image cannot have, such as the imaginary part of frequency 0, are left out."""
    spectrum = _from_streams(x)
    length = spectrum.shape[1] - patches.num_class_tokens
    spectrum, class_token = spectrum[:, :length], spectrum[:, length:].real
    place = _ascending(patches, x.device).argsort()
    image = spectrum.flatten(2).transpose(1, 2).index_select(2, place)  # [B, C, L]
    image = image.unflatten(2, (patches.rows, patches.columns // 2 + 1))
    size = patches.rows, patches.columns
    tokens = patches.from_grid(torch.fft.irfft2(image, s=size, norm="ortho"))
    tokens = tokens[:, patches.num_class_tokens :].unflatten(2, class_token.shape[2:])
    return torch.cat([class_token, tokens], dim=1)


def _ascending(patches: Patches, device: torch.device) -> Tensor:
    """Return the indices [L] of the half spectrum of a grid, from low to high frequencies in cycles
    per patch; equal ones row by row."""
    rows, columns = patches.rows, patches.columns
    row = torch.arange(rows, device=device)
    row = torch.minimum(row, rows - row)[:, None]
    column = torch.arange(columns // 2 + 1, device=device)
    # Integers, so that equal frequencies are equal: |f|^2 times (rows * columns)^2.
    squares = (row * columns).square() + (column * rows).square()
    return squares.flatten().argsort(stable=True)
