"""Tensor-parallel layers: constructors over megatron.core that the model uses.

Every layer draws its full, unsplit weight from torch's default CPU generator and keeps its own
part, so the weights depend on the seed alone and not on the number of tensor-parallel ranks.
Parameters are created on the CPU; move the finished model to the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.table_rows import take_rows

__all__ = [
    "HeadRMSNorm",
    "column_parallel",
    "head_parameter",
    "row_parallel",
    "sum_gradients_of_heads",
    "vocab_parallel_embedding",
]

Init = Callable[[Tensor], object]


def column_parallel(
    mesh: Mesh, in_features: int, out_features: int, *, init: Init, bias_init: Init | None = None
) -> nn.Module:
    """Return a linear layer with split output features: ``x[..., in] -> y[..., out / tp]``.

    Args:
        mesh: The ranks that share the layer.
        in_features: Input features.
        out_features: Output features of all tensor-parallel ranks together.
        init: Initializes the full weight [out, in].
        bias_init: Initializes the full bias [out]; None: zeros.
    """
    layer = _ColumnParallel(
        in_features,
        out_features,
        config=_config(mesh),
        init_method=init,
        bias=True,
        gather_output=False,
        tp_group=mesh.tp.group,
    )
    if bias_init is not None:
        full = torch.empty(out_features)
        bias_init(full)
        with torch.no_grad():
            layer.bias.copy_(full.chunk(mesh.tp.size)[mesh.tp.rank])
    return layer


def row_parallel(
    mesh: Mesh, in_features: int, out_features: int, *, init: Init, bias_init: Init | None = None
) -> nn.Module:
    """Return a linear layer with split input features: ``x[..., in / tp] -> y[..., out]``.

    The output is summed over the tensor-parallel ranks, and the bias added once. Arguments are
    those of :func:`column_parallel`.
    """
    layer = _RowParallel(
        in_features,
        out_features,
        config=_config(mesh),
        init_method=init,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=mesh.tp.group,
    )
    if bias_init is not None:
        with torch.no_grad():
            bias_init(layer.bias)
    return layer


def vocab_parallel_embedding(mesh: Mesh, num_embeddings: int, dim: int, *, init: Init) -> nn.Module:
    """Return an embedding with split rows: ``ids [...] int64 -> [..., dim]``.

    ``init`` initializes the full table [num_embeddings, dim].

    Raises:
        ValueError: when ``num_embeddings`` does not divide by the tensor-parallel size.
    """
    if num_embeddings % mesh.tp.size:
        raise ValueError(
            f"num_embeddings ({num_embeddings}) must be divisible by parallel.tp ({mesh.tp.size})"
        )
    return _VocabParallelEmbedding(
        num_embeddings, dim, init_method=init, config=_config(mesh), tp_group=mesh.tp.group
    )


def head_parameter(
    mesh: Mesh, shape: tuple[int, ...], init: Init, split: int | None
) -> nn.Parameter:
    """Return this rank's part of a parameter of the heads.

    Args:
        mesh: The ranks that share the heads.
        shape: Shape of the whole parameter.
        init: Initializes the whole parameter in place.
        split: Dimension of the heads; None: every rank has the whole parameter, and reads it
            through :func:`sum_gradients_of_heads`.
    """
    full = torch.empty(shape)
    with torch.no_grad():
        init(full)
    if split is None:
        return nn.Parameter(full)
    part = nn.Parameter(full.chunk(mesh.tp.size, split)[mesh.tp.rank].contiguous())
    set_tensor_model_parallel_attributes(part, True, split, 1)
    return part


def sum_gradients_of_heads(x: Tensor, mesh: Mesh) -> Tensor:
    """Return ``x``, the same on all tensor-parallel ranks, for use by the heads of this one; the
    backward sums its gradient over the ranks."""
    if mesh.tp.size == 1:
        return x
    found: Tensor = copy_to_tensor_model_parallel_region(x, group=mesh.tp.group)
    return found


class _ColumnParallel(ColumnParallelLinear):
    """Returns the output alone, and keeps megatron's empty extra state out of the state dict.

    Attributes:
        compute_dtype: Dtype of product and output, if not that of the weight.
    """

    get_extra_state = nn.Module.get_extra_state
    compute_dtype: torch.dtype | None = None

    def forward(self, input_: Tensor) -> Tensor:
        # Megatron's backward waits for its sum over ranks by hand, which breaks a compiled graph.
        is_written_out = self.allreduce_dgrad and torch.compiler.is_compiling()
        if self.compute_dtype is None and not is_written_out:
            return super().forward(input_)[0]
        dtype = self.compute_dtype or self.weight.dtype
        x = copy_to_tensor_model_parallel_region(input_.to(dtype), group=self.tp_group)
        # Not F.linear: under ZeRO-3 DeepSpeed puts its own there, which adds the bias in place to a
        # product that selective checkpointing has kept.
        rows = torch.addmm(self.bias.to(dtype), x.flatten(0, -2), self.weight.to(dtype).t())
        return rows.unflatten(0, x.shape[:-1])


class _RowParallel(RowParallelLinear):
    """Returns the output alone, and keeps megatron's empty extra state out of the state dict.

    Attributes:
        compute_dtype: Dtype of product and output, if not that of the weight.
    """

    get_extra_state = nn.Module.get_extra_state
    compute_dtype: torch.dtype | None = None

    def forward(self, input_: Tensor) -> Tensor:
        if (dtype := self.compute_dtype) is None:
            return super().forward(input_)[0]
        products = F.linear(input_.to(dtype), self.weight.to(dtype))
        total = reduce_from_tensor_model_parallel_region(products, group=self.tp_group)
        return total + self.bias.to(dtype)

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        # Megatron passes no group here and warns of that, which breaks the graph of torch.compile.
        found: Tensor = super()._forward_impl(
            input, weight, **options | {"tp_group": self.tp_group}
        )
        return found


class _VocabParallelEmbedding(VocabParallelEmbedding):
    """Sums the gradient of a row in a compiled graph as outside of it."""

    def forward(self, input_: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(input_)
        if self.tp_group.size() == 1:  # an id outside of the table is an error, as in eager mode
            return take_rows(self.weight, input_)
        is_held = (input_ >= self.vocab_start_index) & (input_ < self.vocab_end_index)
        rows = take_rows(self.weight, torch.where(is_held, input_ - self.vocab_start_index, 0))
        return reduce_from_tensor_model_parallel_region(
            rows * is_held.unsqueeze(-1), group=self.tp_group
        )


class HeadRMSNorm(nn.Module):
    """RMSNorm over the channels of each of this rank's heads: ``x [..., heads, head_dim]`` to the
    same shape, with a gain for each head and channel, initially one.

    The gain is a vector, not a matrix: optimizers apply weight decay to matrices only.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.weight = nn.Parameter(torch.ones(heads * head_dim))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (self.head_dim,), eps=1e-6)  # [..., H, D]
        return normed * self.weight.view(self.heads, self.head_dim)


def _config(mesh: Mesh) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tp.size,
        use_cpu_initialization=True,
        perform_initialization=True,
        gradient_accumulation_fusion=False,
        params_dtype=torch.float32,
        # Otherwise embedding gradients on a GPU are summed in no fixed order; on a CPU the order is
        # fixed anyway, and the deterministic path is slower.
        deterministic_mode=mesh.device.type == "cuda",
    )
