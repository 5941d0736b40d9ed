"""A model of a rank's memory in a step: weights, gradients, optimizer state and communication
buckets as DeepSpeed 0.19.8 allocates them, with the activations beside them."""

from collections.abc import Iterable

from torch import nn

from ds_linclip.config import Config
from ds_linclip.engine.deepspeed_config import deepspeed_config
from ds_linclip.model.flops import num_state_values
from ds_linclip.parallel.mesh import Mesh

__all__ = ["PERSISTENT_BELOW", "StepMemory", "product_bytes", "reduced_bytes", "value_bytes"]

#: Temporaries of the optimizer's step, in tensors as large as the rank's part of the weights.
_MOMENTARY = {"adamw": 0, "lamb": 2, "lion": 1}
_FP32 = 4
#: ZeRO-3 keeps smaller parameters whole on every rank (DeepSpeed's default).
PERSISTENT_BELOW = 100_000


def value_bytes(config: Config) -> int:
    """Return the bytes of a weight, and of an activation between blocks."""
    return 2 if config.train.precision in ("bf16", "fp16") else _FP32


def product_bytes(config: Config) -> int:
    """Return the bytes of an element of a matrix product."""
    return _FP32 if config.train.precision == "fp32" else 2


def reduced_bytes(config: Config) -> int:
    """Return the bytes of a gradient as ranks send it."""
    return _FP32 if config.train.reduce_dtype == "fp32" else 2


class StepMemory:
    """The bytes that a rank with these parameters needs at the ZeRO stage of the config.

    Kinds of bytes are "weights", "gradients", "optimizer" (master weights, moments, average),
    "buckets" (for communication) and "activations". Not counted: memory inside torch's kernels, the
    padding of partitions, and what is offloaded.

    Attributes:
        kept: Bytes between steps, all kinds together.
    """

    def __init__(self, config: Config, mesh: Mesh, parameters: list[nn.Parameter]) -> None:
        replicas, self.stage = mesh.replicas.size, config.zero.stage
        zero = deepspeed_config(config, mesh)["zero_optimization"]
        sizes = [p.numel() for p in parameters]
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        part = -(-self.trained // replicas)
        self.is_accumulated = config.num_micro_batches(mesh.dp.size) > 1
        self.value, self.reduced = value_bytes(config), reduced_bytes(config)
        self.gradient = _FP32 if self.is_accumulated else self.value  # as it is summed
        self.bucket = zero["reduce_bucket_size"]
        is_offloaded = config.zero.offload_optimizer != "none"
        self.optimizer = 0 if is_offloaded else _FP32 * num_state_values(config.optim) * part
        self.in_fp32 = 0 if is_offloaded else _FP32 * part  # gradients for the optimizer
        self.momentary = _MOMENTARY[config.optim.kind] * self.in_fp32
        self.in_step = self.value * sum(sizes)
        #: Whether DeepSpeed uses its BF16_Optimizer, which keeps all gradients in fp32.
        self.sums_all = (
            self.stage == 1
            and config.train.precision == "bf16"
            and self.is_accumulated
            and not is_offloaded
        )
        self.is_compact = self.stage == 2 and self.is_accumulated and self.value < _FP32
        #: Without overlap, stage 1 averages gradients after the whole backward.
        self.is_late = not zero.get("overlap_comm")
        of_bucket = {1: self.gradient, 2: self.value, 3: self.reduced}[self.stage]
        self.buckets = of_bucket * self.bucket * (1 if self.stage == 3 else 2 - self.is_late)
        #: DeepSpeed gives pipelines a second bucket when gradients are averaged.
        self.of_pipeline = self.reduced * self.bucket * (mesh.pp.size > 1)
        #: The copy of a full bucket, or of a larger gradient, that is being sent: once more if it
        #: is sent in another dtype, or where gloo scatters it. A single replica sends nothing, and
        #: makes the copy in the other dtype alone.
        largest = max(p.numel() for p in parameters if p.requires_grad)
        is_copied = self.stage == 3 and mesh.device.type == "cpu"
        self.copy = of_bucket * (replicas > 1)
        self.copy += self.reduced * (self.reduced != of_bucket or is_copied)
        self.sent = self.copy * max(largest, min(self.bucket, self.trained))
        self.averaged = (_FP32 if self.is_compact else self.gradient) * part
        #: The copy of all gradients that is sent, where they are summed in fp32.
        self.copied = (_FP32 + self.reduced * (self.reduced < _FP32)) * self.trained
        self.copied *= replicas > 1
        self.kept = self.in_step + self.optimizer
        if self.stage == 3:
            # The partition's gradients and the bucket stay allocated. Small weights are always
            # whole; the limit of live parameters is for the others.
            limit = zero.get("stage3_param_persistence_threshold", PERSISTENT_BELOW)
            small = sum(size for size in sizes if size <= limit)
            parts = sum(-(-size // replicas) for size in sizes)
            here = self.value * (parts * (config.zero.offload_param == "none") + small)
            self.kept = here + self.optimizer + self.gradient * part + self.buckets
            live = min(zero["stage3_max_live_parameters"], sum(sizes) - small)
            live = max(live, *sizes)  # the limit concerns prefetching only
            self.in_step = here + self.value * live
        elif self.sums_all:
            self.kept += _FP32 * self.trained

    def fullest(self, peaks: Iterable[tuple[int, int]], rest: int) -> dict[str, int]:
        """Return bytes by kind at the fullest moment of a step with the activations that
        :func:`~ds_linclip.planner.activations.trace_activations` returns."""
        moments = [self._backward(taken) | {"activations": size} for taken, size in peaks]
        moments += [moment | {"activations": rest} for moment in self._after_backward()]
        return max(moments, key=lambda moment: sum(moment.values()))

    def _backward(self, taken: int) -> dict[str, int]:
        """Return bytes by kind after ``taken`` elements' gradients of a micro-batch were taken.

        Of several micro-batches it is not the first.
        """
        if self.stage == 3:
            sent = self.sent * (taken >= min(self.bucket, self.trained))
            return self._held(self.averaged, self.buckets + sent)
        if self.sums_all:
            # All gradients in fp32 stay allocated, those in bf16 until the end of the step.
            return self._held((_FP32 + self.value) * self.trained, 0)
        if self.stage == 1 and (self.is_late or self.is_accumulated):
            there = self.trained if self.is_accumulated else taken
            return self._held(self.gradient * there, self.buckets)
        return self._sending(taken)

    def _after_backward(self) -> list[dict[str, int]]:
        """Return bytes by kind when gradients are averaged late, and in the optimizer's step."""
        if self.stage == 3:
            gradients = self.averaged + self.in_fp32 + self.momentary
            return [self._held(gradients, self.buckets)]
        if self.sums_all:
            gradients = (_FP32 + self.value) * self.trained
            return [self._held(gradients, max(self.copied, self.momentary))]
        flat = self.averaged * (self.value < _FP32)  # before the cast to fp32
        gradients = 0 if self.is_compact else self.averaged + flat
        moments = [self._held(self.in_fp32 + max(gradients, self.momentary), 0)]
        if self.stage == 1 and self.is_late:
            # Full buckets replace gradients.
            moments.append(self._sending(self.trained, left=self.trained))
        elif self.of_pipeline:
            moments.append(self._held(self.averaged, self.buckets))
        if self.of_pipeline:
            moments[-1]["buckets"] += self.of_pipeline
        return moments

    def _sending(self, taken: int, left: int = 0) -> dict[str, int]:
        """Return bytes by kind while a bucket is sent.

        Averaged gradients of the partition are the sum over micro-batches and, after the first
        bucket was received, those of this micro-batch.

        Args:
            taken: Elements whose gradients were taken.
            left: Elements whose gradients existed before the first bucket was filled.
        """
        summed = self.averaged * (self.stage == 2 and self.is_accumulated)
        sent = self.sent * (taken >= min(self.bucket, self.trained))
        unsent = self.gradient * max(0, left - self.bucket)
        first = self._held(summed + unsent, self.buckets + sent)
        if taken <= self.bucket:
            return first
        unsent = self.gradient * max(0, left - 2 * self.bucket)
        sent = min(self.sent, self.copy * (taken - self.bucket))
        received = self.averaged * (not self.is_compact)
        second = self._held(summed + received + unsent, self.buckets + sent)
        return max(first, second, key=lambda held: sum(held.values()))

    def _held(self, gradients: int, buckets: int) -> dict[str, int]:
        return {
            "weights": self.in_step,
            "gradients": gradients,
            "optimizer": self.optimizer,
            "buckets": buckets,
        }
