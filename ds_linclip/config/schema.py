"""The fields of a configuration: typed, documented, with their defaults."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ds_linclip.config.data import DataConfig
from ds_linclip.config.distillation import ContrastiveTerm, LossTerm, TeacherConfig
from ds_linclip.config.monitoring import CheckpointConfig, EvalConfig, LogConfig
from ds_linclip.config.optim import OptimConfig
from ds_linclip.config.paths import PATH
from ds_linclip.config.towers import ModelConfig


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch size and precision of the training."""

    #: Optimizer steps of the whole run. Exactly one of `steps`, `samples` and `epochs` is required;
    #: a later source, such as the command line, replaces the one of an earlier source.
    steps: int = 0
    #: Length of the run in image-text pairs, rounded up to whole steps.
    samples: int | None = None
    #: Length of the run in epochs of `data.train`, rounded up to whole steps; 0.5 is half an epoch.
    #: The number of samples is known once the shards are found. The run folder's config then has
    #: the steps.
    epochs: float | None = None
    #: Image-text pairs per optimizer step, over all ranks; required. Each pair's negatives are all
    #: the others.
    global_batch_size: int = 0
    #: Pairs that a rank runs at once; null: its whole part of the global batch. With smaller
    #: micro-batches gradients are accumulated, and negatives still come from the whole global
    #: batch: the features of all micro-batches are computed twice, first without a graph, then for
    #: the backward pass (GradCache, arXiv 2101.06983).
    micro_batch_size: int | None = None
    #: `bf16` or `fp16` (with dynamic loss scaling): weights and gradients of the model in 16 bits.
    #: `amp_bf16`: weights and gradients in fp32, matrix products and attention in bf16, as in
    #: open_clip's mode of that name; more memory, less rounding. `fp32`. In each, the optimizer's
    #: master weights and state, sums of gradients over micro-batches, and the logit scale and bias
    #: that the loss uses are fp32.
    precision: Literal["bf16", "amp_bf16", "fp16", "fp32"] = "bf16"
    #: Dtype in which gradients are summed over ranks. `bf16` halves the bytes that ranks send, and
    #: rounds every partial sum; for `precision` bf16 and amp_bf16.
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    #: Recompute activations of a block in the backward pass, to save memory. `full`: all but the
    #: block's input. `selective`: all but the outputs of matrix products and attention.
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    #: Part of a step under torch.compile. `blocks`: every block on its own, which compiles fastest.
    #: `towers`: the whole model and the loss, with the largest parts that the layout allows;
    #: the log names them. `true` means `towers`, `false` means `none`.
    compile: Literal["none", "blocks", "towers"] = field(
        default="none", metadata={"once_a_bool": ("none", "towers")}
    )
    #: Replay the compiled towers, and on a single rank the loss, from CUDA graphs. For ZeRO-1 and 2
    #: over the data-parallel axis alone, with one micro-batch; needs `compile: towers`.
    cuda_graphs: bool = False
    #: Seed of the weights, the order of samples, the crops and the dropped patches.
    seed: int = 0


@dataclass(kw_only=True)
class InitConfig:
    """Pretrained weights that a run starts from, and frozen towers (LiT, arXiv 2111.07991).

    The folders hold `open_clip_config.json` and `open_clip_model.safetensors`, written by open_clip
    or by `linclip export`, for the same architecture; positional embeddings are interpolated if
    the image size differs. A run that resumes from a checkpoint does not read them.
    """

    #: Folder with the whole model: both towers, the logit scale and the sigmoid loss's bias.
    pretrained: str | None = field(default=None, metadata=PATH)
    #: Folder with the image tower and its projection; nothing else is taken from it.
    pretrained_image: str | None = field(default=None, metadata=PATH)
    #: Folder with the text tower and its projection; nothing else is taken from it.
    pretrained_text: str | None = field(default=None, metadata=PATH)
    #: Accept weights that were trained with another attention than the model's. Parameters that
    #: only the new attention has begin with its initial values, local parts with zero.
    change_attention: bool = False
    #: Freeze the image tower: no gradients, no optimizer state.
    lock_image: bool = False
    #: Groups at the end of a frozen image tower that are trained nevertheless, counted as in
    #: open_clip. 1: the projection; 2: also the last block and the norm after it; each further
    #: group is one more block; `layers` + 2: everything, with the embedding.
    lock_image_unlocked_groups: int = 0
    #: Freeze the text tower.
    lock_text: bool = False
    #: Groups at the end of a frozen text tower that are trained nevertheless, counted as
    #: `lock_image_unlocked_groups`.
    lock_text_unlocked_layers: int = 0


@dataclass(kw_only=True)
class LossConfig:
    """Loss over the whole global batch: the contrastive one, and terms of a distillation."""

    #: The terms that are added up, such as `[{kind: contrastive}, {kind: features, weight: 10}]`;
    #: those that compare with a teacher need `teacher.model`.
    terms: list[LossTerm] = field(default_factory=lambda: [ContrastiveTerm()])
    #: The contrastive loss. `softmax`: CLIP (arXiv 2103.00020). `sigmoid`: SigLIP (arXiv
    #: 2303.15343), with a bias.
    kind: Literal["softmax", "sigmoid"] = "softmax"
    #: Side of the square tiles of logits that a rank computes one at a time.
    chunk_size: int = 1024


@dataclass(kw_only=True)
class ParallelConfig:
    """Devices and the parallel axes.

    The number of ranks is tp x cp x dp x pp; consecutive ranks form a tensor-parallel group.
    """

    #: Device type of the ranks; `auto`: GPUs if there are any.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    #: Data-parallel size; null: the number of ranks divided by the other sizes.
    dp: int | None = None
    #: Tensor-parallel size: heads and MLPs of every layer are split. Must divide the heads of both
    #: towers.
    tp: int = 1
    #: Pipeline-parallel size: stages of consecutive layers of both towers, balanced by cost. ZeRO-1
    #: only.
    pp: int = 1
    #: Context-parallel size: the tokens of every image are split. For kinds of attention whose keys
    #: can be summed.
    cp: int = 1


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO, which shards training state over the data- and context-parallel ranks."""

    #: 1: shard the optimizer state and the master weights; 2: also gradients; 3: also weights.
    stage: int = 1
    #: Place of the optimizer state and the master weights; `none`: on the device.
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    #: Place of weights while they are not in use; `none`: on the device. Stage 3 only.
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    #: Folder on a fast local disk; required for `nvme`.
    nvme_path: str | None = field(default=None, metadata=PATH)
    #: JSON file with settings that only DeepSpeed has (bucket sizes, overlap); null: its defaults.
    deepspeed_config: str | None = field(default=None, metadata=PATH)


@dataclass(kw_only=True)
class HealthConfig:
    """Diverging training: the limits at which it ends, or rewinds to a checkpoint."""

    #: Steps in a row with a gradient that is not finite after which the run ends. Such steps leave
    #: the weights unchanged. Steps after which fp16 lowers its loss scale do not count.
    max_skipped_steps: int = 20
    #: Rewind to the newest checkpoint, and leave out the batches since, when a logged loss exceeds
    #: this factor times the median of the logged losses before it (PaLM, arXiv 2204.02311, section
    #: 5.1); 0: never.
    spike_factor: float = 0.0
    #: Number of logged losses in that median; no spike is detected before there are as many.
    spike_window: int = 20
    #: Rewinds per run; the next spike ends it.
    max_rewinds: int = 3


@dataclass(kw_only=True)
class WatchdogConfig:
    """Detection of hung and slow ranks."""

    #: Seconds in one phase (a step, a save, an evaluation, ...) after which a rank counts as hung:
    #: the stacks of all ranks are written and the run ends with exit code 76. Must exceed the
    #: longest phase of a healthy run. Collectives time out ten minutes later, after at least 30
    #: minutes. 0: no watchdog.
    timeout_seconds: float = 1200.0
    #: Warn about a rank whose own work per step takes this many times the median rank's; 0: never.
    slow_rank_ratio: float = 2.0


@dataclass(kw_only=True)
class Config:
    """One whole experiment."""

    #: Name of the run. Its folder is `<output_dir>/<name>`.
    name: str = "linclip"
    #: Folder of all runs; must be the same storage for all nodes.
    output_dir: str = field(default="runs", metadata=PATH)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return Path(self.output_dir) / self.name

    def image_size_at(self, step: int) -> tuple[int, int]:
        """Return (height, width) of the training images after ``step`` finished optimizer steps."""
        reached = [stage for stage in self.data.resolutions if stage.from_step <= step]
        return reached[-1].image_size if reached else self.model.vision.image_size

    @property
    def largest_image_size(self) -> tuple[int, int]:
        """(height, width) of the training images with the most pixels."""
        sizes = [stage.image_size for stage in self.data.resolutions]
        return max(sizes or [self.model.vision.image_size], key=math.prod)

    def num_micro_batches(self, dp_size: int) -> int:
        """Return the number of micro-batches that each of ``dp_size`` ranks runs per step."""
        local = self.train.global_batch_size // dp_size
        return local // (self.train.micro_batch_size or local)


def sections(node: Any = Config, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and class of a dataclass, then of those in its fields and lists; where a
    field may have several, of each."""
    yield path, node
    for name, hint in get_type_hints(node).items():
        if get_origin(hint) is list:
            name, (hint,) = f"{name}[*]", get_args(hint)
        for each in get_args(hint) if kinds_of(hint) else (hint,):
            if is_dataclass(each):
                yield from sections(each, f"{path}.{name}".lstrip("."))


def kinds_of(hint: Any) -> dict[str, Any]:
    """Return the dataclasses of a type that is one of several, by the ``kind`` that chooses; empty
    for other types."""
    members = get_args(hint) if get_origin(hint) is UnionType else ()
    if not members or not all(map(is_dataclass, members)):
        return {}
    return {member.kind: member for member in members}
