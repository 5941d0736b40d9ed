"""The parallel plan: the layers, memory and communication of every rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ds_linclip.config import Config
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.model import CLIP
from ds_linclip.model.attention import SelfAttention, attention_class
from ds_linclip.parallel.context_parallel import token_slice
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.planner.activations import meta_model, trace_activations
from ds_linclip.planner.memory_model import (
    PERSISTENT_BELOW,
    StepMemory,
    product_bytes,
    reduced_bytes,
    value_bytes,
)

__all__ = ["RankPlan", "describe", "plan_rank"]

_FP32 = 4
#: Kinds of traffic, with their names in the table.
_AXES = {"tp": "tp", "cp": "cp", "pp": "pp", "dp": "loss", "zero": "ZeRO"}


@dataclass(frozen=True)
class RankPlan:
    """The layers, memory and communication of one rank.

    Attributes:
        units: The first and the last layer.
        num_parameters: Parameters of these layers on this tensor-parallel rank.
        memory: Bytes at the fullest moment of a step by the kinds of
            :class:`~ds_linclip.planner.memory_model.StepMemory`.
        kept: Bytes between steps, all kinds together.
        traffic: Bytes communicated in a step by axis: "tp", "cp", "pp", "dp" (features for the
            loss) and "zero".
    """

    units: str
    num_parameters: int
    memory: dict[str, int]
    kept: int
    traffic: dict[str, int]


def plan_rank(config: Config, mesh: Mesh) -> RankPlan:
    """Return the plan of this rank: traffic at the first step's image size, memory at the largest.

    The mesh may be one of :meth:`~ds_linclip.parallel.mesh.Mesh.planned`.
    """
    model = meta_model(config, mesh)
    units = stage_units(config, mesh.pp)
    traffic = _Traffic(config, mesh, units)
    found = {
        "tp": traffic.tensor(model) if mesh.tp.size > 1 else 0,
        "cp": traffic.context() if mesh.cp.size > 1 else 0,
        "pp": traffic.pipeline(),
        "dp": traffic.loss() if mesh.dp.size > 1 and model.is_last else 0,
        "zero": traffic.zero(model) if mesh.replicas.size > 1 else 0,
    }
    memory = StepMemory(config, mesh, list(model.parameters()))
    return RankPlan(
        units=" to ".join(_unit_name(config, unit) for unit in (units[0], units[-1])),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory=memory.fullest(*trace_activations(config, mesh, model)),
        kept=memory.kept,
        traffic={axis: size for axis, size in found.items() if size},
    )


def describe(config: Config, mesh: Mesh, plans: Sequence[RankPlan]) -> str:
    """Return a Markdown table of the plans of all ranks, with one row for each distinct plan."""
    ranks_of: dict[str, list[int]] = {}
    for rank, each in enumerate(plans):
        row = [each.units, f"{each.num_parameters / 1e6:.1f}"]
        memory = (*each.memory.values(), sum(each.memory.values()), each.kept)
        row += [f"{size / 2**30:.3g}" for size in memory]
        row += [f"{each.traffic.get(axis, 0) / 2**20:.3g}" for axis in _AXES]
        ranks_of.setdefault(" | ".join(row), []).append(rank)
    sizes = " x ".join(f"{axis} {mesh.axis_sizes[axis]}" for axis in ("tp", "cp", "dp", "pp"))
    header = [
        *("ranks", "layers", "parameters, M"),
        *(f"{kind}, GiB" for kind in plans[0].memory),
        *("together, GiB", "between steps, GiB"),
        *(f"{name}, MiB/step" for name in _AXES.values()),
    ]
    lines = [
        f"{mesh.world_size} ranks on {mesh.device.type}: {sizes}, ZeRO-{config.zero.stage}, "
        f"{config.num_micro_batches(mesh.dp.size)} micro-batches, {config.train.precision}",
        "",
        " | ".join(header),
        " | ".join("---" for _ in header),
        *(f"{_shown(ranks)} | {row}" for row, ranks in ranks_of.items()),
    ]
    return "\n".join(lines)


class _Traffic:
    """The bytes that one rank communicates in a step, axis by axis."""

    def __init__(self, config: Config, mesh: Mesh, units: range) -> None:
        self.config, self.mesh, self.units = config, mesh, units
        self.num_micro_batches = config.num_micro_batches(mesh.dp.size)
        self.local_batch = config.train.global_batch_size // mesh.dp.size
        #: Forward passes over every pair; several micro-batches or stages need two.
        self.forwards = 1 if self.num_micro_batches == mesh.pp.size == 1 else 2
        self.recomputed = config.train.activation_checkpointing == "full"
        self.value_bytes, self.product_bytes = value_bytes(config), product_bytes(config)
        vision, text = config.model.vision, config.model.text
        self.image_layers = vision.layers
        num_tokens = vision.num_kept_tokens_at(config.image_size_at(0))
        held = token_slice(num_tokens, mesh.cp.rank, mesh.cp.size)
        self.num_image_tokens = held.stop - held.start
        #: Elements of the tokens of the local batch between two blocks.
        self.image_tokens = self.local_batch * self.num_image_tokens * vision.width
        self.text_tokens = self.local_batch * text.context_length * text.width
        first_text = vision.layers + 3
        #: The attention of the blocks held here.
        self.image_blocks = [
            each for unit, each in enumerate(vision.attentions, start=1) if unit in units
        ]
        self.text_blocks = [
            each for unit, each in enumerate(text.attentions, start=first_text) if unit in units
        ]

    def tensor(self, model: CLIP) -> int:
        """All-reduces after row-parallel layers, and of gradients before column-parallel ones and
        of what heads share."""
        vision = self.config.model.vision
        sums = 2 * self.forwards + 2 + self.recomputed
        image, text = len(self.image_blocks), len(self.text_blocks)
        products = sums * (image * self.image_tokens + text * self.text_tokens)
        products += self.local_batch * self._num_summed()
        if vision.pool_type == "map" and self.image_layers + 1 in self.units:
            # The attention and the MLP of one token; the gradient of all tokens of the keys.
            products += (2 * self.forwards + 2) * self.local_batch * vision.width
            products += self.image_tokens
        embedding = self.forwards * self.text_tokens * (self.image_layers + 2 in self.units)
        layers = (each for each in model.modules() if isinstance(each, SelfAttention))
        shared = self.num_micro_batches * sum(each.num_shared for each in layers)
        return products * self.product_bytes + (embedding + shared) * self.value_bytes

    def _num_summed(self) -> int:
        vision, text = self.config.model.vision, self.config.model.text
        towers = (
            (self.image_blocks, vision.width, self.num_image_tokens, False),
            (self.text_blocks, text.width, text.context_length, text.causal),
        )
        return sum(
            attention_class(each).num_summed(each, width, num_tokens, causal=causal)
            for blocks, width, num_tokens, causal in towers
            for each in blocks
        )

    def context(self) -> int:
        """States of the image tower's attention, and the pooled token, forward and backward."""
        vision = self.config.model.vision
        heads = vision.heads // self.mesh.tp.size
        num_values = heads * sum(
            attention_class(each).num_state_values(each, vision.head_width)
            for each in self.image_blocks
        )
        passes = self.forwards + 1 + self.recomputed
        states = self.local_batch * num_values * _FP32 * passes
        has_head = self.image_layers + 1 in self.units
        pooled = self.local_batch * vision.width * self.value_bytes
        if vision.pool_type == "avg":  # sums in fp32, and the number of patches
            pooled = self.local_batch * (vision.width + 1) * _FP32
        return states + has_head * pooled * (self.forwards + 1)

    def pipeline(self) -> int:
        """Activations sent to the next stage, gradients sent to the previous one."""
        if self.mesh.pp.size == 1:
            return 0
        text_ids = self.local_batch * self.config.model.text.context_length * 8
        total = 0
        if self.units.stop < CLIP.num_units(self.config.model):
            stop = self.units.stop
            total += self.forwards * (self._boundary(stop) + self._grid(stop) + text_ids)
        if self.units.start > 0:
            total += self._boundary(self.units.start)
        return total

    def loss(self) -> int:
        """Features of the whole data axis, and two numbers per pair for the softmax loss."""
        per_pair = 2 * self.config.model.embed_dim + 2 * (self.config.loss.kind == "softmax")
        return self.mesh.dp.size * self.local_batch * per_pair * _FP32

    def zero(self, model: CLIP) -> int:
        """Gradients averaged and weights gathered over the data x context axis."""
        stage, replicas = self.config.zero.stage, self.mesh.replicas.size
        trained = [p for p in model.parameters() if p.requires_grad]
        reduced = reduced_bytes(self.config) * sum(p.numel() for p in trained)
        reduced *= 1 if stage == 1 else self.num_micro_batches
        if stage < 3:
            # Weights gathered after a step: two parameter groups, each padded to a multiple.
            matrices = sum(p.numel() for p in trained if p.ndim >= 2)
            others = sum(p.numel() for p in trained if p.ndim < 2)
            padded = _padded(matrices, 2 * replicas) + _padded(others, 2 * replicas)
            return reduced + self.value_bytes * padded
        everything = [p.numel() for p in model.parameters()]
        large = sum(size for size in everything if size > PERSISTENT_BELOW)
        small = sum(_padded(size, replicas) for size in everything if size <= PERSISTENT_BELOW)
        passes = self.num_micro_batches * (self.forwards + 1)
        return reduced + self.value_bytes * (passes * large + small)

    def _boundary(self, unit: int) -> int:
        """Bytes of the activations that enter a unit."""
        if unit <= self.image_layers + 1:
            return self.image_tokens * self.value_bytes
        image_features = self.local_batch * self.config.model.embed_dim * self.product_bytes
        words = self.text_tokens if unit > self.image_layers + 2 else 0
        return image_features + words * self.value_bytes

    def _grid(self, unit: int) -> int:
        """Bytes of the places of the patches that enter a unit."""
        vision = self.config.model.vision
        needs_grid = any(each.needs_grid for each in vision.attentions)
        if not needs_grid or unit > self.image_layers + 1:
            return 0
        image_size = self.config.image_size_at(0)
        grid = self.num_micro_batches * vision.num_patches_at(image_size)
        num_kept = vision.num_kept_patches_at(image_size) if vision.patch_dropout else 0
        return grid + self.local_batch * num_kept * 8


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _unit_name(config: Config, unit: int) -> str:
    name, layers = "image", config.model.vision.layers
    if unit > layers + 1:
        name, unit, layers = "text", unit - layers - 2, config.model.text.layers
    parts = {0: "embedding", layers + 1: "head"}
    return f"{name} {parts.get(unit, f'block {unit - 1}')}"


def _shown(ranks: list[int]) -> str:
    """Return ranks as text, with consecutive ones shortened: 0-3, 8."""
    # Consecutive ranks differ from their places by the same number.
    groups = groupby(enumerate(ranks), lambda place: place[1] - place[0])
    runs = [[rank for _, rank in group] for _, group in groups]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
