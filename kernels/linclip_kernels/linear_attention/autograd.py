"""How the operators take part in autograd and torch.func: reverse mode, once, and vmap."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

__all__ = ["Differentiated", "differentiated", "fold_vmap_into_batch", "gradient_of"]


class Differentiated(torch.autograd.Function):
    """An operator that reverse mode differentiates; forward mode is refused."""

    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Function.apply asks for the signature at every call, and would build it again.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
        torch.compiler.allow_in_graph(cls)  # torch.compile would trace it, and cannot trace jvp

    @staticmethod
    def jvp(_ctx: Any, *_tangents: Any) -> Any:
        raise RuntimeError(
            "linear_attention has no forward-mode derivative (torch.func.jvp, jacfwd, "
            "torch.autograd.forward_ad); use reverse mode (torch.func.vjp, jacrev, backward)"
        )


def gradient_of(operator: CustomOpDef) -> type[Differentiated]:
    """Return a backward operator as a function that cannot be differentiated itself."""

    class Gradient(Differentiated):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def setup_context(_ctx: Any, _inputs: Any, _output: Any) -> None:
            """Keep nothing."""

        @staticmethod
        def backward(_ctx: Any, *_gradients: Any) -> Any:
            raise RuntimeError("linear_attention can be differentiated once; its gradients cannot")

    fold_vmap_into_batch(operator)
    return Gradient


def differentiated(operator: CustomOpDef, backward_operator: CustomOpDef) -> type[Differentiated]:
    """Return an operator of two tensors and options with its gradient.

    ``backward_operator`` takes the two tensors, the gradient of the output, and the options.
    """
    gradient = gradient_of(backward_operator)

    class WithGradient(Differentiated):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
            ctx.save_for_backward(*inputs[:2])
            ctx.options = inputs[2:]

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            found = gradient.apply(*ctx.saved_tensors, *gradients, *ctx.options)
            return *found, *(None,) * len(ctx.options)

    fold_vmap_into_batch(operator)
    return WithGradient


def fold_vmap_into_batch(operator: CustomOpDef) -> None:
    """Let torch.func.vmap call an operator once: the mapped axis becomes part of the batch.

    The first axis of all tensors with four axes or more must be the batch.
    """

    def call(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        folded = [_fold(x, dim, info.batch_size) for x, dim in zip(arguments, in_dims, strict=True)]
        found = operator(*folded)
        outputs = (found,) if isinstance(found, Tensor) else found
        dims = tuple(0 if x.dim() >= 4 else None for x in outputs)
        split = tuple(
            x if dim is None else x.unflatten(0, (info.batch_size, -1))
            for x, dim in zip(outputs, dims, strict=True)
        )
        return (split[0], dims[0]) if isinstance(found, Tensor) else (split, dims)

    operator.register_vmap(call)


def _fold(x: Any, dim: int | None, size: int) -> Any:
    if not isinstance(x, Tensor) or (dim is None and x.dim() < 4 and x.is_floating_point()):
        return x  # an option, or an empty tensor in place of a state
    if not x.is_floating_point():
        raise ValueError("cu_seqlens must be None inside torch.func.vmap, which extends the batch")
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)
