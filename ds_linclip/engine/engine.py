"""The engines: one optimizer step of the contrastive objective under DeepSpeed, with or without a
pipeline, behind one interface."""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn, optim

from ds_linclip.config import Config
from ds_linclip.model import CLIP
from ds_linclip.loss.grad_cache import Objective, surrogate
from ds_linclip.engine.optim import Lamb
from ds_linclip.engine.deepspeed_config import deepspeed_config, monitor_config
from ds_linclip.engine.ema import ema_weights, track_ema
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.engine.zero_state import Piece, StateShards, fill_module

__all__ = ["Engine", "Stage", "initialize_engine"]

#: Arguments of the model: images, texts and, with patch dropout, the patches to keep.
Inputs = tuple[Tensor, ...]


def initialize_engine(
    model: CLIP, optimizer: optim.Optimizer, config: Config, mesh: Mesh
) -> "Engine":
    """Hand model and optimizer to ``deepspeed.initialize``.

    Args:
        model: The whole model, or with pipeline parallelism this rank's stage of it.
        optimizer, config, mesh: Of the run.

    Raises:
        ValueError: as :func:`deepspeed_config`.
    """
    kind = PipelineEngine if mesh.pp.size > 1 else PlainEngine
    return kind(model, optimizer, config, mesh)


class Engine(ABC):
    """Takes optimizer steps, shows and loads its state. All ranks call every method together.

    Attributes:
        monitor: Where scalars and figures go: DeepSpeed's TensorBoard and others.
        objective: The loss, with its latest logit scale.
        shards: What this rank holds of the state, to be saved.
        on_features: Called in turn in every step when this rank's own forward is done, before it
            needs other ranks' features.
    """

    def __init__(self, model: CLIP, optimizer: optim.Optimizer, config: Config, mesh: Mesh) -> None:
        self._model = model
        self._mesh = mesh
        self._config = config
        self.objective = Objective(config.loss, mesh)
        generated = deepspeed_config(config, mesh)
        if config.optim.ema_decay:
            track_ema(optimizer)
        self._engine, _, _, _ = deepspeed.initialize(
            model=self._module(model),
            optimizer=optimizer,
            config=generated,
            mpu=mesh.mpu() if mesh.pp.size == 1 else None,
            dist_init_required=False,
        )
        if isinstance(optimizer, Lamb):
            optimizer.attach(self._engine, mesh)
        if config.train.precision == "fp16":  # when to give up is for the training loop to say
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self.shards = StateShards(self._engine, model, mesh)
        self.monitor = MonitorMaster(get_monitor_config(monitor_config(config)))
        self._num_micro_batches = int(generated["gradient_accumulation_steps"])
        self.on_features: list[Callable[[], None]] = []

    def step(self, batch: Inputs, *, lr: float, ema_decay: float = 0.0) -> Tensor:
        """One optimizer step on this rank's part of the global batch.

        Args:
            batch: Images [B, 3, H, W], texts [B, L] and perhaps patches [B, K].
            lr: Learning rate of this step.
            ema_decay: Share of the old running average of the weights that is kept, if there is
                one.

        Returns:
            The loss [] of this rank's rows.
        """
        for group in self._engine.optimizer.param_groups:
            group |= {"lr": lr, "ema_decay": ema_decay}
        parts = zip(*(tensor.chunk(self._num_micro_batches) for tensor in batch), strict=True)
        return self._step(list(parts))

    def _features_ready(self) -> None:
        for listener in self.on_features:
            listener()

    @property
    def deepspeed_engine(self) -> Any:
        """What ``deepspeed.initialize`` has made, for this package to look into."""
        return self._engine

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        return float(self._engine.get_global_grad_norm())

    @property
    def skipped_steps(self) -> int:
        """Steps of the run, as far as its checkpoints go back, that were not taken because a
        gradient was not finite."""
        return int(self._engine.skipped_steps)

    @property
    def was_skipped(self) -> bool:
        """Whether the last step was not taken because its gradient was not finite."""
        return not self._engine.was_step_applied()

    @property
    def can_lower_loss_scale(self) -> bool:
        """Whether a gradient that is not finite may be so for fp16's loss scale alone."""
        if self._config.train.precision != "fp16":
            return False
        scaler = self._engine.optimizer.loss_scaler
        return bool(scaler.cur_scale > scaler.min_scale)

    def load(
        self,
        read: Callable[[Piece, str], Tensor],
        kinds: Sequence[str],
        scalars: Mapping[str, Any],
    ) -> None:
        """Put saved state in the place of the present one, as :meth:`StateShards.restore`.

        Raises:
            AgreedError: when a rank cannot read what it needs.
        """
        restore = partial(self.shards.restore, read, kinds, scalars)
        self._mesh.agree(restore, errors=(ValueError, OSError))
        fill_module(self._engine.optimizer)

    @contextmanager
    def evaluation_model(self) -> Iterator[CLIP]:
        """The whole model (this rank's heads of it), in eval mode, without gradients.

        It has the running average of the weights, where there is one. Where this rank trains a part
        of the layers, or ZeRO-3 a part of each weight, it is a copy that lives as long as the
        context.
        """
        averages = ema_weights(self._engine) if self._config.optim.ema_decay else nullcontext()
        with torch.no_grad(), averages:
            model = self._whole_model()
            model.eval()
            yield model
        self._model.train()

    @abstractmethod
    def _module(self, model: CLIP) -> nn.Module:
        """What DeepSpeed is given."""

    @abstractmethod
    def _step(self, micro_batches: Sequence[Inputs]) -> Tensor: ...

    @abstractmethod
    def _whole_model(self) -> CLIP: ...

    def _empty_model(self) -> CLIP:
        """All layers, whatever their weights, in the dtype of training."""
        with torch.random.fork_rng(devices=[]):
            model = CLIP(self._config.model, self._mesh, loss=self._config.loss.kind)
        return model.to(next(self._model.parameters()).dtype)


class PlainEngine(Engine):
    """Every rank holds all layers: ZeRO-1, 2 or 3 over data, tensor and context parallelism."""

    def _module(self, model: CLIP) -> nn.Module:
        return model

    def _step(self, micro_batches: Sequence[Inputs]) -> Tensor:
        # A single micro-batch needs no second forward: its graph waits for the loss.
        is_single = len(micro_batches) == 1
        with torch.set_grad_enabled(is_single):
            outputs = [self._engine(*inputs) for inputs in micro_batches]
        self._features_ready()
        loss, gradients = self.objective(outputs)
        for number, inputs in enumerate(micro_batches):
            output = outputs[0] if is_single else self._engine(*inputs)
            # DeepSpeed takes the mean over micro-batches; the gradients are those of a sum.
            self._engine.backward(len(micro_batches) * surrogate(output, gradients[number]))
            self._engine.step()
        return loss

    def _whole_model(self) -> CLIP:
        if self._config.zero.stage < 3:
            return self._model
        model = self._empty_model()
        for mine, whole in zip(self._model.parameters(), model.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([mine]):
                whole.copy_(mine)
        return model


class PipelineEngine(Engine):
    """Every rank holds consecutive layers of both towers; micro-batches run through the stages."""

    def _module(self, model: CLIP) -> nn.Module:
        mesh = self._mesh
        topology = PipeModelDataParallelTopology(
            num_pp=mesh.pp.size, num_mp=mesh.tp.size, num_dp=mesh.replicas.size
        )
        place = topology.get_coord(mesh.rank)
        # DeepSpeed makes groups of its own: they must be megatron's.
        assert (place.pipe, place.data, place.model) == (
            mesh.pp.rank,
            mesh.replicas.rank,
            mesh.tp.rank,
        )
        layers: list[Any] = [LayerSpec(nn.Identity)] * mesh.pp.size  # others' are never built
        layers[mesh.pp.rank] = Stage(model)
        mesh.prepare_for_deepspeed()
        with redirect_stdout(io.StringIO()):
            return PipelineModule(
                layers, topology=topology, loss_fn=surrogate, partition_method="uniform"
            )

    def _step(self, micro_batches: Sequence[Inputs]) -> Tensor:
        engine = self._engine
        shapes = [tensor.shape for tensor in micro_batches[0]]
        if shapes != getattr(self, "_shapes", shapes):
            engine.reset_activation_shape()
        self._shapes = shapes

        nothing: list[tuple[Tensor, ...]] = [()] * len(micro_batches)
        # As eval_batch does, which waits besides for all ranks at a barrier.
        engine.set_dataiterator(iter(zip(micro_batches, nothing, strict=True)))
        engine.total_loss, engine._compute_loss = None, False
        with torch.no_grad():
            engine._exec_schedule(engine._inference_schedule(len(micro_batches)))
        self._features_ready()
        loss, gradients = torch.zeros((), device=self._mesh.device), nothing
        if engine.is_last_stage():
            loss, found = self.objective([tuple(output) for output in engine.fwd_outputs])
            # DeepSpeed takes the mean over micro-batches; the gradients are those of a sum.
            gradients = [tuple(len(found) * part for part in parts) for parts in found]
        engine.train_batch(iter(zip(micro_batches, gradients, strict=True)))
        shared = torch.stack([loss, self.objective.logit_scale.to(loss)])
        pp = self._mesh.pp
        dist.broadcast(shared, group=pp.group, group_src=pp.size - 1)
        loss, self.objective.logit_scale = shared.unbind()
        return loss

    def _whole_model(self) -> CLIP:
        model = self._empty_model()
        pp = self._mesh.pp
        whole = dict(model.named_parameters())
        mine = {name: p for name, p in self._model.named_parameters() if name in whole}
        names: list[list[str]] = [[]] * pp.size
        dist.all_gather_object(names, list(mine), group=pp.group)
        for stage, held in enumerate(names):
            for name in held:
                if stage == pp.rank:
                    whole[name].copy_(mine[name])
                dist.broadcast(whole[name].data, group=pp.group, group_src=stage)
        return model


class Stage(nn.Module):
    """A part of the model as a layer of DeepSpeed's pipeline: tuple in, tuple out.

    DeepSpeed takes every real tensor between stages to have a gradient, and every stage's input to
    need one, pixels included. Locked towers have neither.
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
    """Hands ``x`` on, and gives zeros to tensors that nothing depends on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(other) for other in ctx.saved_tensors)
