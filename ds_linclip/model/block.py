"""The transformer block of both towers, with open_clip's two initializations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ds_linclip.config import AttentionSettings
from ds_linclip.model.attention import Patches, SelfAttention, attention_class
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.tensor_parallel import column_parallel, row_parallel

__all__ = ["MLP", "Block", "BlockInit", "Recompute"]

Init = Callable[[Tensor], object]
Recompute = Literal["none", "selective", "full"]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}

#: Operators whose outputs "selective" keeps. A sum over ranks works in place, on the product of a
#: row-parallel layer or on a clone of a state, so keeping those keeps the sum, without a second
#: all-reduce.
_KEPT_OPERATORS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.linclip.linear_attention.default,
    torch.ops.linclip.linear_attention_packed.default,
    torch.ops.linclip.linear_attention_state.default,
    torch.ops.linclip.linear_attention_from_state.default,
    torch.ops.aten.clone.default,
    torch.ops.c10d.allreduce_.default,
]


@dataclass(frozen=True, kw_only=True)
class BlockInit:
    """Initializers of the four weight matrices of a block, run on the unsplit weights."""

    qkv: Init
    attn_out: Init
    mlp_in: Init
    mlp_out: Init

    @classmethod
    def vision(cls) -> "BlockInit":
        """Return torch's defaults for attention and linear layers, as in open_clip's ViT."""
        fan_in = _uniform_fan_in
        return cls(qkv=nn.init.xavier_uniform_, attn_out=fan_in, mlp_in=fan_in, mlp_out=fan_in)

    @classmethod
    def text(cls, width: int, layers: int) -> "BlockInit":
        """Return normal distributions with deviations that decrease with width and depth, as in
        OpenAI's CLIP and GPT-2."""
        out = partial(nn.init.normal_, std=width**-0.5 * (2 * layers) ** -0.5)
        return cls(
            qkv=partial(nn.init.normal_, std=width**-0.5),
            attn_out=out,
            mlp_in=partial(nn.init.normal_, std=(2 * width) ** -0.5),
            mlp_out=out,
        )


class Block(nn.Module):
    """Pre-norm residual block ``[B, N, width] -> [B, N, width]``: attention, then an MLP.

    Args:
        width: Size of a token's embedding.
        heads: Number of attention heads.
        mlp_ratio: Hidden size of the MLP, as a multiple of ``width``.
        attention: The settings of the attention.
        mesh: Splits heads, MLP and tokens.
        causal: Whether a token attends only to itself and the tokens before it.
        init: Initializes the weight matrices.
        activation: Name of the MLP's activation.
        norm_eps: Added to the variance in both norms.
        ls_init_value: Initial value of LayerScale; None: no LayerScale.

    Attributes:
        recompute: Activations that the backward recomputes: "none"; "full": all; "selective": all
            but the outputs of matrix products, attention and sums over ranks. A block draws no
            random numbers, so recomputed values are identical.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        attention: AttentionSettings,
        mesh: Mesh,
        *,
        causal: bool,
        init: BlockInit,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        ls_init_value: float | None = None,
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=norm_eps)
        inits = {"init_qkv": init.qkv, "init_out": init.attn_out}
        kind = attention_class(attention)
        self.attn: SelfAttention = kind(width, heads, attention, mesh, causal=causal, **inits)
        self.ls_1 = _layer_scale(width, ls_init_value)
        self.ln_2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), mesh, init, activation=activation)
        self.ls_2 = _layer_scale(width, ls_init_value)
        self.recompute: Recompute = "none"
        self._run: Callable[[Tensor, Patches | None], Tensor] = self._forward

    def compile_layers(self) -> None:
        """Apply torch.compile inside of activation checkpointing.

        Around it, dynamo would silently run the block eagerly: it skips a checkpointed region that
        breaks the graph.
        """
        self._run = torch.compile(self._forward)

    def forward(self, x: Tensor, patches: Patches | None = None) -> Tensor:
        """Run the block on tokens [B, N, width]; ``patches`` says where those of an image lie."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._run(x, patches)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.recompute == "selective":
            # A partial made here and not a constant: torch.compile knows no other kind.
            options["context_fn"] = partial(
                create_selective_checkpoint_contexts,
                _KEPT_OPERATORS,
                allow_cache_entry_mutation=True,
            )
        return checkpoint(self._run, x, patches, **options)

    def _forward(self, x: Tensor, patches: Patches | None) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), patches))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class MLP(nn.Module):
    """Two linear layers ``[..., width] -> [..., width]`` with an activation between, split over
    the tensor-parallel ranks."""

    def __init__(
        self, width: int, hidden: int, mesh: Mesh, init: BlockInit, *, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        bias_in, bias_out = _uniform(width**-0.5), _uniform(hidden**-0.5)
        self.c_fc = column_parallel(mesh, width, hidden, init=init.mlp_in, bias_init=bias_in)
        self.c_proj = row_parallel(mesh, hidden, width, init=init.mlp_out, bias_init=bias_out)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers on tokens [..., width]."""
        return self.c_proj(self.activation(self.c_fc(x)))


class _LayerScale(nn.Module):
    """A learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _layer_scale(width: int, value: float | None) -> nn.Module:
    return nn.Identity() if value is None else _LayerScale(width, value)


def _uniform(bound: float) -> Init:
    return partial(nn.init.uniform_, a=-bound, b=bound)


def _uniform_fan_in(weight: Tensor) -> None:
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)
