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

__all__ = ["Block", "BlockInit", "Recompute"]

Init = Callable[[Tensor], object]
Recompute = Literal["none", "selective", "full"]

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
    """Pre-norm residual block ``[B, N, width] -> [B, N, width]``: attention, then an MLP with
    exact GELU.

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
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        inits = {"init_qkv": init.qkv, "init_out": init.attn_out}
        kind = attention_class(attention)
        self.attn: SelfAttention = kind(width, heads, attention, mesh, causal=causal, **inits)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _MLP(width, int(width * mlp_ratio), mesh, init)
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
        x = x + self.attn(self.ln_1(x), patches)
        return x + self.mlp(self.ln_2(x))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, mesh: Mesh, init: BlockInit) -> None:
        super().__init__()
        bias_in, bias_out = _uniform(width**-0.5), _uniform(hidden**-0.5)
        self.c_fc = column_parallel(mesh, width, hidden, init=init.mlp_in, bias_init=bias_in)
        self.c_proj = row_parallel(mesh, hidden, width, init=init.mlp_out, bias_init=bias_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


def _uniform(bound: float) -> Init:
    return partial(nn.init.uniform_, a=-bound, b=bound)


def _uniform_fan_in(weight: Tensor) -> None:
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)
