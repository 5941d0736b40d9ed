"""The parallel plan: what lies where, how many bytes it takes, and what a step communicates."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist

from ds_linclip.config import Config
from ds_linclip.flops import num_features, num_state_values
from ds_linclip.model import CLIP
from ds_linclip.parallel.context import token_slice
from ds_linclip.parallel.deepspeed_config import deepspeed_config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.stages import stage_units

__all__ = ["RankPlan", "describe", "plan_rank"]

_FP32 = 4
#: ZeRO-3 keeps smaller parameters whole on every rank (DeepSpeed's default).
_PERSISTENT_BELOW = 100_000


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds and communicates.

    Attributes:
        units: Names of the layers held, first and last.
        num_parameters: Of these layers, on this tensor-parallel rank.
        memory: Bytes of "weights", "gradients", "optimizer" (master weights, moments, average) and
            "buckets" (DeepSpeed's for communication) at the fullest moment of a step.
        kept: Bytes of all of them that stay between steps.
        traffic: Bytes of a step by axis, as :class:`~ds_linclip.parallel.traffic.TrafficMeter`
            counts them: "tp", "cp", "pp", "dp" (features for the loss) and "zero".
    """

    units: str
    num_parameters: int
    memory: dict[str, int]
    kept: int
    traffic: dict[str, int]


def plan_rank(config: Config, mesh: Mesh, model: CLIP) -> RankPlan:
    """The plan of this rank, at the image size of the first step.

    Args:
        config, mesh: Of the run.
        model: This rank's part of it, before the engine takes its weights apart.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    units = stage_units(config, mesh.pp)
    traffic = _Traffic(config, mesh, units)
    found = {
        "tp": traffic.tensor() if mesh.tp.size > 1 else 0,
        "cp": traffic.context() if mesh.cp.size > 1 else 0,
        "pp": traffic.pipeline(),
        "dp": traffic.loss() if mesh.dp.size > 1 and model.is_last else 0,
        "zero": traffic.zero(model) if mesh.replicas.size > 1 else 0,
    }
    memory, kept = _memory(config, mesh, model)
    return RankPlan(
        units=_unit_names(config, units),
        num_parameters=sum(sizes),
        memory=memory,
        kept=kept,
        traffic={axis: size for axis, size in found.items() if size},
    )


def describe(config: Config, mesh: Mesh, plan: RankPlan) -> str:
    """The plan of all ranks as a Markdown table, one row per distinct one. All ranks call this."""
    plans: list[RankPlan] = [plan] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(plans, plan)
    ranks_of: dict[str, list[int]] = {}
    for rank, each in enumerate(plans):
        kinds = ("weights", "gradients", "optimizer", "buckets")
        memory = (*(_gib(each.memory[kind]) for kind in kinds), _gib(each.kept))
        traffic = (_mib(each.traffic.get(axis, 0)) for axis in ("tp", "cp", "pp", "dp", "zero"))
        row = (each.units, f"{each.num_parameters / 1e6:.1f}", *memory, *traffic)
        ranks_of.setdefault(" | ".join(row), []).append(rank)
    sizes = " x ".join(
        f"{name} {axis.size}"
        for name, axis in (("tp", mesh.tp), ("cp", mesh.cp), ("dp", mesh.dp), ("pp", mesh.pp))
    )
    header = [
        *("ranks", "layers", "parameters, M"),
        *("weights, GiB", "gradients, GiB", "optimizer, GiB", "buckets, GiB"),
        "between steps, GiB",
        *("tp, MiB/step", "cp, MiB/step", "pp, MiB/step", "loss, MiB/step", "ZeRO, MiB/step"),
    ]
    lines = [
        f"{mesh.world_size} ranks on {mesh.device.type}: {sizes}, ZeRO-{config.zero.stage}, "
        f"{_num_micro_batches(config, mesh)} micro-batches, {config.train.precision}",
        "",
        " | ".join(header),
        " | ".join("---" for _ in header),
        *(f"{_shown(ranks)} | {row}" for row, ranks in ranks_of.items()),
    ]
    return "\n".join(lines)


class _Traffic:
    """Bytes of one step of one rank, axis by axis."""

    def __init__(self, config: Config, mesh: Mesh, units: range) -> None:
        self.config, self.mesh, self.units = config, mesh, units
        self.num_micro_batches = _num_micro_batches(config, mesh)
        self.local_batch = config.train.global_batch_size // mesh.dp.size
        #: Forward passes over every pair; several micro-batches or stages need two.
        self.forwards = 1 if self.num_micro_batches == mesh.pp.size == 1 else 2
        self.value_bytes = _value_bytes(config)
        vision, text = config.model.vision, config.model.text
        num_tokens = 1 + vision.num_kept_patches_at(config.image_size_at(0))
        held = token_slice(num_tokens, mesh.cp.rank, mesh.cp.size)
        #: Bytes of the tokens of the local batch between two blocks.
        self.image_tokens = self._bytes(held.stop - held.start, vision.width)
        self.text_tokens = self._bytes(text.context_length, text.width)

    def tensor(self) -> int:
        """Sums behind row-parallel layers, and of gradients behind column-parallel ones."""
        image, text = self._num_blocks()
        recomputed = self.config.train.activation_checkpointing == "full"
        sums = 2 * self.forwards + 2 + recomputed
        has_embedding = self.config.model.vision.layers + 2 in self.units
        embedding = self.forwards * self.text_tokens * has_embedding
        return sums * (image * self.image_tokens + text * self.text_tokens) + embedding

    def context(self) -> int:
        """States of the image tower's attention, and the class token, forward and backward."""
        vision = self.config.model.vision
        image, _ = self._num_blocks()
        recomputed = self.config.train.activation_checkpointing == "full"
        heads = vision.heads // self.mesh.tp.size
        state = heads * (num_features(vision) + 1) * (vision.head_width + 1) * _FP32
        states = self.local_batch * image * state * (self.forwards + 1 + recomputed)
        has_head = vision.layers + 1 in self.units
        return states + has_head * self._bytes(1, vision.width) * (self.forwards + 1)

    def pipeline(self) -> int:
        """Activations to the next stage, gradients to the one before."""
        if self.mesh.pp.size == 1:
            return 0
        text_ids = self.local_batch * self.config.model.text.context_length * 8
        total = 0
        if self.units.stop < CLIP.num_units(self.config.model):
            total += self.forwards * (self._boundary(self.units.stop) + text_ids)
        if self.units.start > 0:
            total += self._boundary(self.units.start)
        return total

    def loss(self) -> int:
        """Features of the whole data axis, and for softmax two numbers per pair."""
        per_pair = 2 * self.config.model.embed_dim + 2 * (self.config.loss.kind == "softmax")
        return self.mesh.dp.size * self.local_batch * per_pair * _FP32

    def zero(self, model: CLIP) -> int:
        """Gradients that are averaged, and weights that are gathered, over data x context."""
        stage, replicas = self.config.zero.stage, self.mesh.replicas.size
        trained = [p for p in model.parameters() if p.requires_grad]
        reduced = _gradient_bytes(self.config, self.num_micro_batches) * sum(
            p.numel() for p in trained
        )
        if stage == 1:
            return reduced + self._gathered(trained, 2 * replicas)
        reduced *= self.num_micro_batches
        if stage == 2:
            return reduced + self._gathered(trained, 2 * replicas)
        everything = list(model.parameters())
        large = sum(p.numel() for p in everything if p.numel() > _PERSISTENT_BELOW)
        small = sum(
            -(-p.numel() // replicas) * replicas
            for p in everything
            if p.numel() <= _PERSISTENT_BELOW
        )
        passes = self.num_micro_batches * (self.forwards + 1)
        return reduced + self.value_bytes * (passes * large + small)

    def _gathered(self, trained: Iterable, multiple: int) -> int:
        """Weights after a step: two groups, each filled up to a multiple."""
        decayed, kept = 0, 0
        for parameter in trained:
            if parameter.ndim < 2:
                kept += parameter.numel()
            else:
                decayed += parameter.numel()
        return self.value_bytes * sum(-(-size // multiple) * multiple for size in (decayed, kept))

    def _bytes(self, num_tokens: int, width: int) -> int:
        return self.local_batch * num_tokens * width * self.value_bytes

    def _boundary(self, unit: int) -> int:
        """Activations that enter a unit."""
        vision = self.config.model.vision
        if unit <= vision.layers + 1:
            return self.image_tokens
        image_features = self._bytes(1, self.config.model.embed_dim)
        return image_features + (self.text_tokens if unit > vision.layers + 2 else 0)

    def _num_blocks(self) -> tuple[int, int]:
        layers = self.config.model.vision.layers
        image = sum(1 <= unit <= layers for unit in self.units)
        text = sum(
            layers + 3 <= unit <= layers + 2 + self.config.model.text.layers for unit in self.units
        )
        return image, text


def _memory(config: Config, mesh: Mesh, model: CLIP) -> tuple[dict[str, int], int]:
    """Bytes by kind at the fullest moment of a step, and of all of them between steps.

    As DeepSpeed 0.19.8 allocates. Not counted: activations, what one layer needs for a moment, the
    padding of partitions, and what is offloaded.
    """
    replicas, stage = mesh.replicas.size, config.zero.stage
    zero = deepspeed_config(config, mesh)["zero_optimization"]
    sizes = [p.numel() for p in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = -(-trained // replicas)
    is_accumulated = _num_micro_batches(config, mesh) > 1
    value, gradient = (
        _value_bytes(config),
        _gradient_bytes(config, _num_micro_batches(config, mesh)),
    )
    bucket = zero["reduce_bucket_size"]
    in_bucket = min(bucket, trained)  # flattened once more to be sent
    weights, optimizer = value * sum(sizes), _FP32 * num_state_values(config.optim) * part
    in_fp32 = _FP32 * part  # what the optimizer is given
    if config.zero.offload_optimizer != "none":
        optimizer = in_fp32 = 0
    kept = weights + optimizer
    # Gradients and buckets in the backward, and in the optimizer's step.
    if stage == 3:
        # Gradients of the partition stay, as the bucket does. Small weights are whole but in the
        # step; the limit of live ones is that of the others.
        limit = zero.get("stage3_param_persistence_threshold", _PERSISTENT_BELOW)
        small = sum(size for size in sizes if size <= limit)
        parts = sum(-(-size // replicas) for size in sizes)
        weights = value * (parts * (config.zero.offload_param == "none") + small)
        kept = weights + optimizer + gradient * part + value * bucket
        weights += value * min(zero["stage3_max_live_parameters"], sum(sizes) - small)
        backward = gradient * part, value * (bucket + in_bucket)
        step = gradient * part + in_fp32, value * bucket
    elif stage == 1 and config.train.precision == "bf16" and is_accumulated and optimizer:
        # DeepSpeed's BF16_Optimizer: all gradients in fp32 stay, those in bf16 do until the end of
        # the step; a copy is sent, as bf16.
        kept += _FP32 * trained
        both = (_FP32 + value) * trained
        backward = both, both * (replicas > 1)
        step = both, 0
    else:
        # Averaged gradients of the partition, from the second bucket on.
        compact = stage == 2 and is_accumulated and value < _FP32
        averaged = _FP32 * part if compact else gradient * part
        double = bool(zero.get("overlap_comm"))
        held = averaged * (1 + (stage == 2 and is_accumulated and not compact))
        held *= bucket < trained or is_accumulated
        sent = gradient if stage == 1 else value
        if stage == 1 and not double:  # averaged when all are there; full buckets take their place
            held += gradient * max(0, trained - 2 * bucket)
        backward = held, sent * (bucket * (1 + double) + in_bucket)
        step = averaged * (not compact) + in_fp32, 0
    gradients, buckets = max(backward, step, key=sum)
    memory = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "buckets": buckets,
    }
    return memory, kept


def _num_micro_batches(config: Config, mesh: Mesh) -> int:
    local = config.train.global_batch_size // mesh.dp.size
    return local // (config.train.micro_batch_size or local)


def _value_bytes(config: Config) -> int:
    return 4 if config.train.precision == "fp32" else 2


def _gradient_bytes(config: Config, num_micro_batches: int) -> int:
    return 4 if num_micro_batches > 1 else _value_bytes(config)


def _unit_names(config: Config, units: range) -> str:
    first, last = (_unit_name(config, unit) for unit in (units[0], units[-1]))
    return f"{first} to {last}"


def _unit_name(config: Config, unit: int) -> str:
    name, layers = "image", config.model.vision.layers
    if unit > layers + 1:
        name, unit, layers = "text", unit - layers - 2, config.model.text.layers
    parts = {0: "embedding", layers + 1: "head"}
    return f"{name} {parts.get(unit, f'block {unit - 1}')}"


def _shown(ranks: list[int]) -> str:
    """Ranks, runs of them shortened: 0-3, 8."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g}"
