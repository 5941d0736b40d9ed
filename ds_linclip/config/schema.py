"""The fields of a configuration: typed, documented, with their defaults."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from itertools import accumulate, groupby
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ds_linclip.config.attention import Attention, LayerAttention, LinearAttention
from ds_linclip.config.optim import OptimConfig

#: Marks a field that holds a path, which is made absolute. Its ``names`` are no paths.
_PATH = {"path": True}
_CLASS_LISTS = (
    *("imagenet-22k", "imagenet-21k-goog", "imagenet-21k-miil", "imagenet-21k-miil-w21"),
    *("imagenet-12k", "imagenet-1k"),
)
_TEMPLATE_SETS = ("one", "simple", "openai")


class _Layers:
    """The attention of a tower's layers."""

    attention: Attention
    attention_by_layer: list[LayerAttention]
    layers: int

    @property
    def attentions(self) -> list[Attention]:
        """The attention of every layer."""
        found = [self.attention] * self.layers
        for each in self.attention_by_layer:
            for number in each.numbers(self.layers):
                found[number] = each.attention
        return found

    @property
    def attention_text(self) -> str:
        """The attention of all layers, in words."""
        runs = [(str(each), len(list(same))) for each, same in groupby(self.attentions)]
        if len(runs) == 1:
            return runs[0][0]
        stops = accumulate(length for _, length in runs)
        return "; ".join(
            f"{_numbered(stop - length, stop - 1)}: {text}"
            for (text, length), stop in zip(runs, stops, strict=True)
        )


@dataclass(kw_only=True)
class VisionTower(_Layers):
    """The image tower, a ViT. Field names are those of open_clip's `vision_cfg`."""

    #: (height, width) in pixels. In a file or on the command line a single number means a square.
    image_size: tuple[int, int] = (224, 224)
    #: Side of a square patch in pixels.
    patch_size: int = 16
    #: Size of a token's embedding.
    width: int = 768
    #: Number of transformer blocks.
    layers: int = 12
    #: Size of one attention head; must divide `width`.
    head_width: int = 64
    #: Hidden size of the MLP, as a multiple of `width`.
    mlp_ratio: float = 4.0
    #: Fraction of the patches of every training image that is dropped (FLIP, arXiv 2212.00794).
    patch_dropout: float = 0.0
    #: The attention of every layer; `kind` chooses one of the kinds below.
    attention: Attention = field(default_factory=LinearAttention)
    #: Layers with another attention, such as `[{layers: '-2:', attention: {kind: softmax}}]`; the
    #: last entry that names a layer counts.
    attention_by_layer: list[LayerAttention] = field(default_factory=list)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_width

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image of the configured size: its patches and the class token."""
        return self.num_tokens_at(self.image_size)

    def num_tokens_at(self, image_size: tuple[int, int]) -> int:
        """Return the number of tokens of an image of that (height, width)."""
        height, width = image_size
        return (height // self.patch_size) * (width // self.patch_size) + 1

    def num_kept_patches_at(self, image_size: tuple[int, int]) -> int:
        """Return how many patches of a training image `patch_dropout` keeps."""
        return max(1, int((self.num_tokens_at(image_size) - 1) * (1 - self.patch_dropout)))


@dataclass(kw_only=True)
class TextTower(_Layers):
    """The text tower, a causal transformer. Field names are those of open_clip's `text_cfg`."""

    #: Tokens per caption; longer captions are cut off.
    context_length: int = 77
    #: Vocabulary size of open_clip's tokenizer.
    vocab_size: int = 49408
    #: Size of a token's embedding.
    width: int = 512
    #: Number of attention heads; must divide `width`.
    heads: int = 8
    #: Number of transformer blocks.
    layers: int = 12
    #: Hidden size of the MLP, as a multiple of `width`.
    mlp_ratio: float = 4.0
    #: The attention of every layer; `kind` chooses one of the kinds below.
    attention: Attention = field(default_factory=LinearAttention)
    #: Layers with another attention, such as `[{layers: '-2:', attention: {kind: softmax}}]`; the
    #: last entry that names a layer counts.
    attention_by_layer: list[LayerAttention] = field(default_factory=list)


@dataclass(kw_only=True)
class ModelConfig:
    """Both towers and their shared embedding space."""

    #: Size of the image and text features, in the space that both towers share.
    embed_dim: int = 512
    vision: VisionTower = field(default_factory=VisionTower)
    text: TextTower = field(default_factory=TextTower)


@dataclass(kw_only=True)
class Source:
    """One set of training shards.

    In `data.train` a plain string means a source with that pattern and the defaults below.
    """

    #: Required. Brace pattern of tar files, such as `/data/laion400m/{00000..41455}.tar`: a local
    #: path, `http(s)://`, `s3://`, `gs://` or another URL that fsspec knows.
    shards: str = field(default="", metadata=_PATH)
    #: Share of the training samples, relative to the other sources. Set it for all sources or for
    #: none.
    weight: float | None = None
    #: Times that every sample comes per epoch; 0.5 takes half of the samples in every epoch.
    upsampling: float = 1.0
    #: Number of samples in all shards of the source; required if no file beside the shards has it.
    num_samples: int | None = None


@dataclass(kw_only=True)
class Resolution:
    """Size of the training images from one step on."""

    #: First step that trains at this size, counted from 0.
    from_step: int = 0
    #: (height, width) in pixels, or a single number for a square; positional embeddings are
    #: interpolated.
    image_size: tuple[int, int] = (224, 224)


@dataclass(kw_only=True)
class CacheConfig:
    """Local copies of remote shards, shared by all processes of a node."""

    #: Folder on a local disk; required when a source is remote.
    dir: str | None = field(default=None, metadata=_PATH)
    #: Maximum total size in GiB. Shards in use are never evicted, so it must hold about three pools
    #: (`data.shuffle_shards`) for every lane that the node reads.
    max_gib: float = 100.0


@dataclass(kw_only=True)
class NetworkConfig:
    """Downloads of remote shards."""

    #: Timeout in seconds for opening a connection.
    connect_timeout: float = 10.0
    #: Seconds without a byte after which a transfer counts as stalled.
    read_timeout: float = 30.0
    #: Failed tries after which a shard counts as unreachable, which ends the run.
    max_tries: int = 10
    #: Upper bound of the pause before the second try, in seconds; it doubles with every further
    #: try.
    backoff: float = 0.5
    #: Longest pause between two tries, in seconds.
    max_backoff: float = 60.0
    #: Parallel downloads per worker.
    downloads: int = 2


@dataclass(kw_only=True)
class DataConfig:
    """Training shards in the img2dataset layout of LAION-400M."""

    #: Sources or patterns, such as `data.train=['/data/laion400m/{00000..41455}.tar']`; a single
    #: pattern needs no list. Required.
    train: list[Source] = field(default_factory=list)
    #: `shuffled`: every sample once per epoch (times `upsampling`). `replacement`: shards are drawn
    #: with replacement.
    sampling: Literal["shuffled", "replacement"] = "shuffled"
    #: Number of independent lanes (streams) that the shards of a source are distributed over. With
    #: a multiple of ranks x workers every worker reads its own shards. Changing it changes the
    #: order of the samples.
    num_lanes: int = 1
    #: Shards of one lane whose samples are shuffled together. Changing it changes the order.
    shuffle_shards: int = 8
    #: Decoding processes per rank. The order does not depend on it.
    num_workers: int = 2
    #: Batches per rank that are decoded ahead.
    prefetch_batches: int = 4
    #: Area of the random resized crop as a (smallest, largest) fraction of the image.
    crop_scale: tuple[float, float] = (0.9, 1.0)
    #: Image sizes over the run, by increasing `from_step`; empty: always `model.vision.image_size`.
    resolutions: list[Resolution] = field(default_factory=list)
    cache: CacheConfig = field(default_factory=CacheConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    #: Fraction of bad samples (they are replaced) above which the run ends with an error. All
    #: samples of a lost shard count.
    max_bad_samples: float = 0.1
    #: Number of bad samples in a row that ends the run with an error. A lost shard counts as one.
    max_bad_in_a_row: int = 100


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
    pretrained: str | None = field(default=None, metadata=_PATH)
    #: Folder with the image tower and its projection; nothing else is taken from it.
    pretrained_image: str | None = field(default=None, metadata=_PATH)
    #: Folder with the text tower and its projection; nothing else is taken from it.
    pretrained_text: str | None = field(default=None, metadata=_PATH)
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
    """Contrastive loss over the whole global batch."""

    #: `softmax`: CLIP (arXiv 2103.00020). `sigmoid`: SigLIP (arXiv 2303.15343), with a bias.
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
    nvme_path: str | None = field(default=None, metadata=_PATH)
    #: JSON file with settings that only DeepSpeed has (bucket sizes, overlap); null: its defaults.
    deepspeed_config: str | None = field(default=None, metadata=_PATH)


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving of checkpoints to `<run folder>/checkpoints`, and removal of old ones."""

    #: Steps between checkpoints; 0: none by step. The last step is always saved.
    every_steps: int = 1000
    #: Minutes between checkpoints, counted from the last one of any kind; 0: none by time.
    every_minutes: float = 0.0
    #: Number of newest checkpoints that are kept.
    keep_last: int = 3
    #: Checkpoints at multiples of this number of steps are kept permanently; 0: none.
    keep_every_steps: int = 0
    #: Write checkpoints in the background; training waits only for the copy to host memory. Needs
    #: host memory for a rank's part of weights and optimizer state.
    asynchronous: bool = True
    #: `latest`: resume from the newest checkpoint of the run folder, if there is one. `never`:
    #: refuse a run folder that has checkpoints.
    resume: Literal["latest", "never"] = "latest"
    #: Checkpoint of another run, such as `runs/long/checkpoints/step-00090000`, that this run goes
    #: on from, with the optimizer's state and the position in the data; only `optim.schedule` and
    #: the length may differ. Once this run has checkpoints of its own, it resumes from these.
    branch_from: str | None = field(default=None, metadata=_PATH)


@dataclass(kw_only=True)
class EvalConfig:
    """Zero-shot classification of held-out images, during training and at its end."""

    #: Folder in clip_benchmark's webdataset layout (`test/*.tar`, `classnames.txt`,
    #: `zeroshot_classification_templates.txt`), or a folder whose classes `classes` lists; null: no
    #: evaluation.
    data: str | None = field(default=None, metadata=_PATH)
    #: The folder's classes: an ImageNet list (`imagenet-22k`, `imagenet-21k-goog`,
    #: `imagenet-21k-miil`, `imagenet-21k-miil-w21`, `imagenet-12k`, `imagenet-1k`) or a file with
    #: one synset per line; null: the folder names its classes.
    classes: str | None = field(default=None, metadata=_PATH | {"names": _CLASS_LISTS})
    #: Class names in the prompts for such a list: `lemma`, `aliases`, `definition`, or `open_clip`
    #: (imagenet-1k only).
    names: Literal["lemma", "aliases", "definition", "open_clip"] = "lemma"
    #: Prompt templates for such a list: `one`, `simple` (open_clip's 7), `openai` (its 80), or a
    #: file with one template per line.
    templates: str = field(default="one", metadata=_PATH | {"names": _TEMPLATE_SETS})
    #: Steps between evaluations; 0: only at the end.
    every_steps: int = 0
    #: Images per forward pass and rank.
    batch_size: int = 256
    #: Held-out images that may be unreadable; they are counted and are wrong. More are an error.
    max_bad_samples: int = 0
    #: Decode every held-out image once before the first step, on all ranks and data workers (each
    #: about 100 images of ImageNet per second); `<run folder>/held_out.json` keeps the result until
    #: a file changes. `false`: an unreadable image ends the run at its first evaluation.
    check_images: bool = True


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
class LogConfig:
    """Logging; `<run folder>/metrics.jsonl` is always written."""

    #: Steps between log records of loss and throughput.
    every_steps: int = 10
    #: Write TensorBoard events to `<run folder>/tensorboard`.
    tensorboard: bool = True
    #: Port on which rank 0 serves Prometheus metrics, on all addresses of its host; null: none.
    prometheus_port: int | None = None
    #: Project in Weights & Biases (`pip install wandb`); null: none.
    wandb: str | None = None
    #: Project in Trackio (`pip install trackio`), stored on this machine; null: none.
    trackio: str | None = None
    #: Peak rate of one device in TFLOP/s, for `perf/mfu`; null: the data sheet's for bf16 and fp16
    #: on a known GPU (`ds_linclip/planner/device_specs.py`), otherwise no `perf/mfu`.
    peak_tflops: float | None = None
    #: Held-out images that every evaluation draws with their captions and top-5 classes.
    num_images: int = 8
    #: Write the sample keys of every batch to `<run folder>/samples/rank-N.jsonl`.
    sample_keys: bool = False


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
    output_dir: str = field(default="runs", metadata=_PATH)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
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


def _numbered(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"


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
