"""Local parts of linear attention: what a token takes from its neighbours, beside attention."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.config import DepthwiseLocal, PredictedLocal
from ds_linclip.model.attention.parameters import OwnParameter, uniform
from ds_linclip.model.attention.patches import Patches
from ds_linclip.model.attention.recompute import recomputed
from ds_linclip.model.attention.rows import running_mean, wide_dtype
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.tensor_parallel import sum_gradients_of_heads

__all__ = ["LocalPart", "local_part"]

#: Side of the square, and number of tokens, of predicted weights.
_SIZE = 3


class LocalPart:
    """The base of all local parts, which adds nothing.

    Attributes:
        zeroed: The parameters without which the part adds nothing.
    """

    zeroed: tuple[str, ...] = ()

    def __init__(self, settings: Any, *, causal: bool) -> None:
        self.settings, self.causal = settings, causal

    def own_parameters(self, width: int, heads: int) -> Mapping[str, OwnParameter]:
        """Return the parameters, by name."""
        return {}

    def flops(self, head_dim: int, num_tokens: int) -> float:
        """Return the FLOPs per token and head."""
        return 0

    def num_summed(self, width: int, num_tokens: int) -> int:
        """Return how many numbers per sequence the backward sums over tensor-parallel ranks."""
        return 0

    def add(
        self,
        o: Tensor,
        x: Tensor,
        v: Tensor,
        patches: Patches | None,
        parameter: Callable[[str], Tensor],
        mesh: Mesh,
    ) -> Tensor:
        """Return the output of attention with the local part added.

        Args:
            o: Output of attention [B, N, H, D].
            x: Input of the layer [B, N, width].
            v: Values [B, N, H, D] of this rank's heads.
            patches: Where the tokens of an image lie; None for a text.
            parameter: Returns this rank's part of a parameter.
            mesh: Splits the heads.
        """
        return o


class _Depthwise(LocalPart):
    """Convolution whose weights [H * D, taps] are parameters: row by row over the square around a
    patch; in a text from the earliest token of the window to the token itself."""

    zeroed = ("local_weight",)

    @property
    def num_taps(self) -> int:
        size: int = self.settings.size
        return size if self.causal else size**2

    def own_parameters(self, width: int, heads: int) -> Mapping[str, OwnParameter]:
        # As torch's convolutions begin.
        return {"local_weight": OwnParameter((width, self.num_taps), uniform(self.num_taps))}

    def flops(self, head_dim: int, num_tokens: int) -> float:
        return 2 * head_dim * self.num_taps

    def add(
        self,
        o: Tensor,
        x: Tensor,
        v: Tensor,
        patches: Patches | None,
        parameter: Callable[[str], Tensor],
        mesh: Mesh,
    ) -> Tensor:
        values, size, dtype = v.flatten(2), self.settings.size, v.dtype
        weight = parameter("local_weight").to(dtype)
        if patches is None:
            windows = F.pad(values, (0, 0, size - 1, 0)).transpose(1, 2)  # [B, C, size - 1 + N]
            found = F.conv1d(windows, weight[:, None], groups=len(weight)).transpose(1, 2)
        else:
            kernel = weight.view(-1, 1, size, size)
            image = patches.to_grid(values)
            image = F.conv2d(image, kernel, padding=size // 2, groups=len(weight))
            found = patches.from_grid(image)
        return o + found.unflatten(2, o.shape[2:]).to(o.dtype)


class _Predicted(LocalPart):
    """InLine's local residual: an MLP per head of the mean of the layer's input gives the weights.

    ``local_hidden_weight`` [H * D, D] and ``local_taps_weight`` [H * D * taps, D] hold the matrices
    of all heads below each other; the taps of a channel follow each other, in the order of
    :class:`_Depthwise`. The products run in the dtype of the values, as those of other linear
    layers do.

    Source: Bridging the Divide: Reconsidering Softmax and Linear Attention, arXiv 2412.06590; the
    causal form is not from the paper.
    """

    zeroed = ("local_taps_weight", "local_taps_bias")

    @property
    def num_taps(self) -> int:
        return _SIZE if self.causal else _SIZE**2

    def own_parameters(self, width: int, heads: int) -> Mapping[str, OwnParameter]:
        head_dim, rows = width // heads, width * self.num_taps
        init = uniform(head_dim)
        return {
            "local_hidden_weight": OwnParameter((width, head_dim), init),
            "local_hidden_bias": OwnParameter((width,), init),
            "local_taps_weight": OwnParameter((rows, head_dim), init),
            "local_taps_bias": OwnParameter((rows,), init),
        }

    def flops(self, head_dim: int, num_tokens: int) -> float:
        predicted = 2 * head_dim**2 * (1 + self.num_taps)
        applied = 2 * head_dim * self.num_taps
        return applied + (predicted if self.causal else predicted / num_tokens)

    def num_summed(self, width: int, num_tokens: int) -> int:
        return width * (num_tokens if self.causal else 1)

    def add(
        self,
        o: Tensor,
        x: Tensor,
        v: Tensor,
        patches: Patches | None,
        parameter: Callable[[str], Tensor],
        mesh: Mesh,
    ) -> Tensor:
        # [B, N or 1, W]
        mean = running_mean(x) if self.causal else x.mean(1, keepdim=True, dtype=wide_dtype(x))
        # Every rank has the whole mean, and its heads use their channels.
        mean = sum_gradients_of_heads(mean.to(v.dtype), mesh)
        mean = mean.chunk(mesh.tp.size, dim=-1)[mesh.tp.rank].unflatten(-1, v.shape[2:])
        layers = ("hidden", "taps")
        parts = [parameter(f"local_{n}_{p}") for n in layers for p in ("weight", "bias")]
        if patches is None:
            # What it computes on the way is several times the size of its inputs.
            found = recomputed(_causal_residual, mean, v, *parts)
        else:
            found = _grid_residual(mean, v, patches, *parts)
        return o + found.to(o.dtype)


def _grid_residual(mean: Tensor, v: Tensor, patches: Patches, *parts: Tensor) -> Tensor:
    """Return the convolution [B, N, H, D] of patches with the weights of their image."""
    image = patches.to_grid(v.flatten(2))  # [B, C, rows, columns]
    kernel = _predict(mean, *parts).reshape(-1, 1, _SIZE, _SIZE)  # [B * C, 1, 3, 3]
    channels = image.flatten(0, 1)[None]  # [1, B * C, rows, columns]
    found = F.conv2d(channels, kernel, padding=_SIZE // 2, groups=len(kernel))
    return patches.from_grid(found.view(image.shape)).unflatten(2, v.shape[2:])


def _causal_residual(mean: Tensor, v: Tensor, *parts: Tensor) -> Tensor:
    """Return, for each token, the weighted sum [B, N, H, D] of its value and those before it."""
    weights = _predict(mean, *parts)  # [B, N, H, D, taps]
    windows = F.pad(v, (0, 0, 0, 0, _SIZE - 1, 0)).unfold(1, _SIZE, 1)  # [B, N, H, D, taps]
    return (weights * windows).sum(-1)


def _predict(
    mean: Tensor, weight: Tensor, bias: Tensor, taps_weight: Tensor, taps_bias: Tensor
) -> Tensor:
    """Return weights [B, M, H, D, taps] from means [B, M, H, D]."""
    heads, head_dim = mean.shape[2:]

    def per_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        matrices = weight.to(x.dtype).view(heads, -1, head_dim)  # [H, rows of a head, D]
        return torch.einsum("bmhd,hrd->bmhr", x, matrices) + bias.to(x.dtype).view(heads, -1)

    hidden = F.gelu(per_head(mean, weight, bias))
    return per_head(hidden, taps_weight, taps_bias).unflatten(-1, (head_dim, -1))


_PARTS: dict[type, type[LocalPart]] = {DepthwiseLocal: _Depthwise, PredictedLocal: _Predicted}


def local_part(settings: Any, *, causal: bool) -> LocalPart:
    """Return the local part that the settings ask for."""
    return _PARTS.get(type(settings), LocalPart)(settings, causal=causal)
