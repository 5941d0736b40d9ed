"""Local parts of linear attention: what a token takes from its neighbours, beside attention."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.config import DepthwiseLocal
from ds_linclip.model.attention.parameters import OwnParameter
from ds_linclip.model.attention.patches import Patches

__all__ = ["add_local", "local_flops", "local_parameters"]


def local_parameters(local: Any, width: int, *, causal: bool) -> Mapping[str, OwnParameter]:
    """Return the parameters of a local part; ``local_weight`` begins as torch's convolutions do."""
    if not isinstance(local, DepthwiseLocal):
        return {}
    num_taps = local.size if causal else local.size**2
    bound = num_taps**-0.5
    init = partial(nn.init.uniform_, a=-bound, b=bound)
    return {"local_weight": OwnParameter((width, num_taps), init)}


def local_flops(local: Any, head_dim: int, *, causal: bool) -> float:
    """Return the FLOPs of a local part per token and head."""
    if not isinstance(local, DepthwiseLocal):
        return 0
    return 2 * head_dim * (local.size if causal else local.size**2)


def add_local(
    o: Tensor, v: Tensor, weight: Tensor, local: DepthwiseLocal, patches: Patches | None
) -> Tensor:
    """Add the depthwise convolution of values to the output of attention.

    Args:
        o: Output of attention [B, N, H, D].
        v: Values [B, N, H, D].
        weight: [H * D, size^2], row by row over the square around a patch; in a text [H * D, size],
            from the earliest token of the window to the token itself.
        local: Its settings.
        patches: Where the tokens of an image lie; None: of a text, token i takes from i - size + 1
            to i.

    Returns:
        [B, N, H, D].
    """
    values, size, dtype = v.flatten(2), local.size, v.dtype
    if patches is None:
        windows = F.pad(values, (0, 0, size - 1, 0)).transpose(1, 2)  # [B, C, size - 1 + N]
        found = F.conv1d(windows, weight[:, None].to(dtype), groups=len(weight)).transpose(1, 2)
    else:
        kernel = weight.view(-1, 1, size, size).to(dtype)
        image = patches.to_grid(values)
        found = patches.from_grid(F.conv2d(image, kernel, padding=size // 2, groups=len(weight)))
    return o + found.unflatten(2, o.shape[2:]).to(o.dtype)
