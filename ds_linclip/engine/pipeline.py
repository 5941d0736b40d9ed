"""Pipeline parallelism: each stage holds consecutive layers, through which micro-batches pass."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from ds_linclip.engine.engine import Engine, Inputs
from ds_linclip.loss.grad_cache import Targets, surrogate
from ds_linclip.model import CLIP
from ds_linclip.process.consensus import gather

__all__ = ["PipelineEngine", "Stage"]


class PipelineEngine(Engine):
    """Every rank holds consecutive layers of both towers; micro-batches run through the stages."""

    def _module(self, model: CLIP) -> nn.Module:
        mesh = self._mesh
        topology = PipeModelDataParallelTopology(
            num_pp=mesh.pp.size, num_mp=mesh.tp.size, num_dp=mesh.replicas.size
        )
        place = topology.get_coord(mesh.rank)
        # DeepSpeed creates process groups of its own, which must equal megatron's.
        assert (place.pipe, place.data, place.model) == (
            mesh.pp.rank,
            mesh.replicas.rank,
            mesh.tp.rank,
        )
        # The other stages' layers are never built.
        layers: list[Any] = [LayerSpec(nn.Identity)] * mesh.pp.size
        layers[mesh.pp.rank] = Stage(model)
        with redirect_stdout(io.StringIO()):
            return PipelineModule(
                layers, topology=topology, loss_fn=surrogate, partition_method="uniform"
            )

    def _step(self, micro_batches: Sequence[Inputs], targets: Targets) -> Tensor:
        engine = self.deepspeed_engine
        shapes = [tensor.shape for tensor in micro_batches[0]]
        if shapes != getattr(self, "_shapes", shapes):
            engine.reset_activation_shape()
        self._shapes = shapes

        nothing: list[tuple[Tensor, ...]] = [()] * len(micro_batches)
        # The same as DeepSpeed's eval_batch, without its barrier of all ranks.
        engine.set_dataiterator(iter(zip(micro_batches, nothing, strict=True)))
        engine.total_loss, engine._compute_loss = None, False
        with torch.no_grad():
            engine._exec_schedule(engine._inference_schedule(len(micro_batches)))
        self._features_ready()
        loss, gradients = torch.zeros((), device=self._mesh.device), nothing
        if engine.is_last_stage():
            loss, found = self._loss([tuple(output) for output in engine.fwd_outputs], targets)
            # DeepSpeed averages over micro-batches; the gradients are those of a sum.
            gradients = [tuple(len(found) * part for part in parts) for parts in found]
        engine.train_batch(iter(zip(micro_batches, gradients, strict=True)))
        objective = self.objective
        shared = torch.stack([loss, objective.logit_scale.to(loss), *objective.values.to(loss)])
        pp = self._mesh.pp
        dist.broadcast(shared, group=pp.group, group_src=pp.size - 1)
        loss, objective.logit_scale = shared[:2].unbind()
        objective.values = shared[2:]
        return loss

    def _whole_model(self) -> CLIP:
        model = self._empty_model()
        pp = self._mesh.pp
        whole = dict(model.named_parameters())
        mine = {name: p for name, p in self._model.named_parameters() if name in whole}
        for stage, held in enumerate(gather(list(mine), pp.group)):
            for name in held:
                if stage == pp.rank:
                    whole[name].copy_(mine[name])
                dist.broadcast(whole[name].data, group=pp.group, group_src=stage)
        return model


class Stage(nn.Module):
    """One stage's layers as a single layer of DeepSpeed's pipeline; inputs and outputs are tuples.

    DeepSpeed expects a gradient for every floating-point tensor between stages and for every
    stage's input, pixels included. Locked towers give none, so zeros stand in for them.
    """

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.clip = model

    def forward(self, inputs: Inputs) -> Inputs:
        visual, text = self.clip.visual, self.clip.text
        if visual is not None and visual.has_embedding:
            inputs = tuple(tensor.detach() for tensor in inputs)
        image, *outputs = self.clip(*inputs)
        without: list[Tensor] = []
        if visual is not None and visual.starts_locked:
            without += inputs[:1]
        if text is not None and text.starts_locked and not text.has_embedding:
            without += inputs[2:]
        without = [tensor for tensor in without if tensor.requires_grad]
        if without:
            image = _ZeroGradients.apply(image, *without)
        if torch.is_grad_enabled():
            for tensor in (image, *outputs):
                if tensor.is_floating_point() and not tensor.requires_grad:
                    tensor.requires_grad_()
        return image, *outputs


class _ZeroGradients(torch.autograd.Function):
    """Returns ``x`` unchanged; in the backward, gives zero gradients to ``others``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(other) for other in ctx.saved_tensors)
