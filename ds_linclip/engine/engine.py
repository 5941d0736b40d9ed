"""One optimizer step of contrastive training under DeepSpeed, and the state that it changes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn, optim

from ds_linclip.config import Config
from ds_linclip.engine.deepspeed_config import deepspeed_config
from ds_linclip.engine.ema import ema_weights, track_ema
from ds_linclip.engine.lamb import Lamb
from ds_linclip.engine.zero_state import ParameterPiece, RankState, fill_module
from ds_linclip.loss.grad_cache import ContrastiveLoss, Outputs, Targets, surrogate
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh, prepare_for_deepspeed

__all__ = ["Engine", "Inputs", "PlainEngine"]

#: Arguments of the model: images, texts and, with patch dropout, the patches to keep.
Inputs = tuple[Tensor, ...]


class Engine(ABC):
    """Takes optimizer steps, and saves and restores their state; a collective of all ranks.

    Attributes:
        deepspeed_engine: The object that ``deepspeed.initialize`` returns.
        objective: The contrastive loss; it holds the logit scale of the last step.
        state: The part of the training state that this rank holds.
        on_features: Functions that every step calls when this rank's own forward is done, before it
            needs other ranks' features.
    """

    def __init__(self, model: CLIP, optimizer: optim.Optimizer, config: Config, mesh: Mesh) -> None:
        self._model = model
        self._mesh = mesh
        self._config = config
        self.objective = ContrastiveLoss(config.loss, mesh)
        generated = deepspeed_config(config, mesh)
        if config.optim.ema_decay > 0:
            track_ema(optimizer)
        if config.train.precision == "amp_bf16":
            model.compute_in(torch.bfloat16)
        unrounded: dict[str, Tensor] = {}
        if config.train.precision in ("bf16", "fp16"):  # DeepSpeed rounds before it copies
            unrounded = {name: p.detach().cpu() for name, p in model.named_parameters()}
        prepare_for_deepspeed()
        self.deepspeed_engine, _, _, _ = deepspeed.initialize(
            model=self._module(model),
            optimizer=optimizer,
            config=generated,
            mpu=mesh.mpu() if mesh.pp.size == 1 else None,
            dist_init_required=False,
        )
        mesh.set_timeouts()
        if isinstance(optimizer, Lamb):
            optimizer.attach(self.deepspeed_engine, mesh)
        if config.train.precision == "fp16":  # the divergence guard decides when to give up
            self.deepspeed_engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self.state = RankState(self.deepspeed_engine, model, mesh)
        if unrounded:
            self.state.fill(unrounded)
        self._read_logit_values = self.state.reader(model.logit_parameters())
        self._num_micro_batches = int(generated["gradient_accumulation_steps"])
        self.on_features: list[Callable[[], None]] = []

    def step(
        self, batch: Inputs, *, lr: float, ema_decay: float = 0.0, targets: Targets = ()
    ) -> Tensor:
        """Take one optimizer step on this rank's part of the global batch.

        Args:
            batch: Images [B, 3, H, W], texts [B, L] and perhaps patches [B, K].
            lr: Learning rate of this step.
            ema_decay: Weight of the old running average of the weights, if there is one.
            targets: The teacher's features of the batch and its logit scale, if there is one.

        Returns:
            The loss [] of this rank's rows.
        """
        for group in self.deepspeed_engine.optimizer.param_groups:
            group |= {"lr": lr, "ema_decay": ema_decay}
        parts = zip(*(tensor.chunk(self._num_micro_batches) for tensor in batch), strict=True)
        return self._step(list(parts), targets)

    @property
    def grad_norm(self) -> float:
        """The norm of the last step's gradient over all parameters, before clipping."""
        return float(self.deepspeed_engine.get_global_grad_norm())

    @property
    def skipped_steps(self) -> int:
        """The number of the run's steps, before a resume too, whose gradient was not finite."""
        return int(self.deepspeed_engine.skipped_steps)

    @property
    def was_skipped(self) -> bool:
        """Whether the last step was skipped because its gradient was not finite."""
        return not self.deepspeed_engine.was_step_applied()

    @property
    def can_lower_loss_scale(self) -> bool:
        """Whether the loss scale of fp16 may be the cause of a gradient that is not finite."""
        if self._config.train.precision != "fp16":
            return False
        scaler = self.deepspeed_engine.optimizer.loss_scaler
        return bool(scaler.cur_scale > scaler.min_scale)

    def load(
        self,
        read: Callable[[ParameterPiece, str], Tensor],
        kinds: Sequence[str],
        scalars: Mapping[str, Any],
    ) -> None:
        """Replace the training state by a saved one; for arguments see :meth:`RankState.restore`.

        Raises:
            AgreedError: when a rank cannot read what it needs.
        """
        restore = partial(self.state.restore, read, kinds, scalars)
        self._mesh.agree(restore, errors=(ValueError, OSError))
        fill_module(self.deepspeed_engine.optimizer)

    @contextmanager
    def evaluation_model(self) -> Iterator[CLIP]:
        """Yield all layers of the model (this rank's heads), in eval mode, without gradients.

        The weights are the running averages, if there are any. Where this rank trains only some of
        the layers, or under ZeRO-3 only a part of each weight, the model is a copy that lives as
        long as the context.
        """
        has_averages = self._config.optim.ema_decay > 0
        averages = ema_weights(self.deepspeed_engine) if has_averages else nullcontext()
        with torch.no_grad(), averages:
            model = self._whole_model()
            model.eval()
            yield model
        self._model.train()

    @abstractmethod
    def _module(self, model: CLIP) -> nn.Module:
        """Return the module that DeepSpeed wraps."""

    @abstractmethod
    def _step(self, micro_batches: Sequence[Inputs], targets: Targets) -> Tensor: ...

    @abstractmethod
    def _whole_model(self) -> CLIP: ...

    def _loss(self, outputs: Sequence[Outputs], targets: Targets) -> tuple[Tensor, list[Outputs]]:
        """Return the loss of the model's outputs and their gradients; see
        :class:`ContrastiveLoss`.

        The logit scale and the bias are the optimizer's, in fp32: in bf16 a scale would move in
        steps of 1.6 to 3.1 %, and a small change of it would be lost.
        """
        values = self._read_logit_values().split(1)
        return self.objective([(*output[:2], *values) for output in outputs], targets)

    def _features_ready(self) -> None:
        for listener in self.on_features:
            listener()

    def _empty_model(self) -> CLIP:
        """Return a model of all layers with arbitrary weights, in the dtype of training."""
        with torch.random.fork_rng(devices=[]):
            model = CLIP(self._config.model, self._mesh, loss=self._config.loss.kind)
        if self._config.train.precision == "amp_bf16":
            model.compute_in(torch.bfloat16)
        return model.to(next(self._model.parameters()).dtype)


class PlainEngine(Engine):
    """Every rank holds all layers: ZeRO-1, 2 or 3 over data, tensor and context parallelism."""

    def _module(self, model: CLIP) -> nn.Module:
        return model

    def _step(self, micro_batches: Sequence[Inputs], targets: Targets) -> Tensor:
        # A single micro-batch needs no second forward: its graph is kept until the loss is there.
        is_single = len(micro_batches) == 1
        with torch.set_grad_enabled(is_single):
            outputs = [self.deepspeed_engine(*inputs) for inputs in micro_batches]
        self._features_ready()
        loss, gradients = self._loss(outputs, targets)
        for number, inputs in enumerate(micro_batches):
            output = outputs[0] if is_single else self.deepspeed_engine(*inputs)
            # DeepSpeed averages over micro-batches; the gradients are those of a sum.
            scaled = len(micro_batches) * surrogate(output, gradients[number])
            self.deepspeed_engine.backward(scaled)
            self.deepspeed_engine.step()
        return loss

    def _whole_model(self) -> CLIP:
        if self._config.zero.stage < 3:
            return self._model
        model = self._empty_model()
        for mine, whole in zip(self._model.parameters(), model.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([mine]):
                whole.copy_(mine)
        return model
