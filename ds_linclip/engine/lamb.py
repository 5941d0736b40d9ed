"""LAMB with trust ratios of whole parameters, however ZeRO and tensor parallelism split them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, optim

from ds_linclip.engine.zero_state import FlatTensor, flat_tensors
from ds_linclip.parallel.mesh import Mesh

__all__ = ["Lamb"]


class Lamb(optim.Optimizer):
    """LAMB (arXiv 1904.00962, Algorithm 2, with bias correction), exact also under ZeRO.

    Where this rank has only a part of a parameter, because of ZeRO or tensor parallelism, squared
    norms are summed over the ranks, so that the trust ratio is that of the whole parameter. As in
    timm's and NVIDIA's LAMB, groups without weight decay take a plain Adam step. Gradients are not
    clipped here.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float = 1e-6
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._layouts: dict[Tensor, FlatTensor] = {each.tensor: each for each in flat_tensors(self)}
        self._mesh: Mesh | None = None

    def attach(self, engine: Any, mesh: Mesh) -> None:
        """Read where ZeRO keeps the parameters; call it once, after ``deepspeed.initialize``."""
        flat_parts = flat_tensors(engine.optimizer, mesh.replicas.rank)
        self._layouts = {each.tensor: each for each in flat_parts}
        self._mesh = mesh

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = self._adam_update(p, group)
                if group["weight_decay"] != 0:
                    update.add_(p, alpha=group["weight_decay"])
                    self._scale_by_trust_ratios(p, update)
                p.add_(update, alpha=-group["lr"])

    def _adam_update(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return (state["exp_avg"] / (1 - beta1**step)).div_(denominator)

    def _scale_by_trust_ratios(self, p: Tensor, update: Tensor) -> None:
        if p not in self._layouts:
            raise RuntimeError("Lamb.attach must be called after deepspeed.initialize")
        layout = self._layouts[p]
        weights, updates = p.view(-1), update.view(-1)
        squares = p.new_zeros(2, len(layout.parameters))
        for part in layout.fragments:
            squares[0, part.index] = weights[part.span].square().sum()
            squares[1, part.index] = updates[part.span].square().sum()
        if self._mesh is not None:
            squares = _sum_over_ranks(squares, layout, self._mesh)
        weight_norm, update_norm = squares.sqrt()
        usable = (weight_norm > 0) & (update_norm > 0)
        ratio = torch.where(usable, weight_norm / update_norm, 1.0)
        for part in layout.fragments:
            updates[part.span].mul_(ratio[part.index])


def _sum_over_ranks(squares: Tensor, layout: FlatTensor, mesh: Mesh) -> Tensor:
    on_device = squares.to(mesh.device)  # offloaded state is on the CPU, where nccl cannot send
    dist.all_reduce(on_device, group=mesh.replicas.group)
    if mesh.tp.size > 1:
        total = on_device.clone()
        dist.all_reduce(total, group=mesh.tp.group)
        is_split = [getattr(p, "tensor_model_parallel", False) for p in layout.parameters]
        on_device = torch.where(torch.tensor(is_split, device=mesh.device), total, on_device)
    return on_device.to(squares.device)
