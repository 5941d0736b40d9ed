"""One optimizer step of the contrastive objective under DeepSpeed, and the state it changes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from torch import Tensor, nn, optim

from ds_linclip.config import Config
from ds_linclip.engine.deepspeed_config import deepspeed_config, monitor_config
from ds_linclip.engine.ema import ema_weights, track_ema
from ds_linclip.engine.lamb import Lamb
from ds_linclip.engine.zero_state import Piece, StateShards, fill_module
from ds_linclip.loss.grad_cache import Objective, surrogate
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh

__all__ = ["Engine", "Inputs", "PlainEngine"]

#: Arguments of the model: images, texts and, with patch dropout, the patches to keep.
Inputs = tuple[Tensor, ...]


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
