"""The fields of a configuration: typed, documented, with their defaults."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = [
    "Attention",
    "CacheConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "HealthConfig",
    "InitConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimConfig",
    "ParallelConfig",
    "Resolution",
    "Source",
    "TextTower",
    "TrainConfig",
    "VisionTower",
    "ZeroConfig",
]


@dataclass(kw_only=True, frozen=True)
class Attention:
    """How the tokens of one tower attend to each other.

    With ``kind="softmax"`` (torch SDPA) the other fields have no effect. With ``kind="linear"`` q
    and k are L2-normalised per head, and the feature map gives the score of their product x.
    """

    #: "linear", in O(N), or "softmax", in O(N^2).
    kind: Literal["linear", "softmax"] = "linear"
    #: "affine": 1 + x (arXiv 2604.10064); "quadratic": 1 + x + x^2 / 2, slower; "relu", "softplus":
    #: phi(q).phi(k), entry by entry.
    feature_map: Literal["affine", "quadratic", "relu", "softplus"] = "affine"
    #: Divide by the sum of scores (Eq. 4); without it the output is the plain weighted sum (Eq. 7).
    normalized: bool = False
    #: Factor on the unnormalised score; 1/2 brings 1 + q.k into [0, 1]. No effect on Eq. 4.
    score_scale: float = 0.5
    #: alpha: the unnormalised output is multiplied by (number of keys)^-alpha. No effect on Eq. 4.
    length_exponent: float = 0.0
    #: RMSNorm with a learned gain on every head's output, before the output projection.
    head_norm: bool = False


@dataclass(kw_only=True)
class VisionTower:
    """Image tower (ViT), named as in open_clip's ``vision_cfg``."""

    #: (height, width) in pixels; in a file or on the command line one number stands for a square.
    image_size: tuple[int, int] = (224, 224)
    #: Side of a patch in pixels.
    patch_size: int = 16
    #: Features of a token.
    width: int = 768
    #: Blocks.
    layers: int = 12
    #: Features of a head; must divide ``width``.
    head_width: int = 64
    #: Hidden features of the MLP over ``width``.
    mlp_ratio: float = 4.0
    #: Share of the patches of every training image that is left out (FLIP, arXiv 2212.00794).
    patch_dropout: float = 0.0
    attention: Attention = field(default_factory=Attention)

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def num_tokens(self) -> int:
        """Patches of an image of the configured size, and the class token."""
        return self.num_tokens_at(self.image_size)

    def num_tokens_at(self, image_size: tuple[int, int]) -> int:
        """Patches of an image of that (height, width), and the class token."""
        height, width = image_size
        return (height // self.patch_size) * (width // self.patch_size) + 1

    def num_kept_patches_at(self, image_size: tuple[int, int]) -> int:
        """Patches of a training image of that (height, width) that ``patch_dropout`` leaves."""
        return max(1, int((self.num_tokens_at(image_size) - 1) * (1 - self.patch_dropout)))


@dataclass(kw_only=True)
class TextTower:
    """Causal text tower, named as in open_clip's ``text_cfg``."""

    #: Tokens of a caption, longer ones are cut off.
    context_length: int = 77
    #: Of open_clip's tokenizer.
    vocab_size: int = 49408
    #: Features of a token.
    width: int = 512
    #: Must divide ``width``.
    heads: int = 8
    #: Blocks.
    layers: int = 12
    #: Hidden features of the MLP over ``width``.
    mlp_ratio: float = 4.0
    attention: Attention = field(default_factory=Attention)


@dataclass(kw_only=True)
class ModelConfig:
    """Both towers and the width of the space they share."""

    #: Features of an image and of a text, in the space that they share.
    embed_dim: int = 512
    vision: VisionTower = field(default_factory=VisionTower)
    text: TextTower = field(default_factory=TextTower)


@dataclass(kw_only=True)
class Source:
    """Training shards that belong together.

    In ``data.train`` a plain string stands for a source with that pattern and these defaults.
    """

    #: Brace pattern of tars, ``/data/laion400m/{00000..41455}.tar``: a local path, ``http(s)://``,
    #: ``s3://``, ``gs://`` or another URL that fsspec knows.
    shards: str = ""
    #: Share of the stream, relative to the other sources; all sources have one or none has.
    weight: float | None = None
    #: How often every sample comes per epoch; with 0.5, half of the samples in every epoch.
    upsampling: float = 1.0
    #: Samples in all shards of the source, where nothing beside the shards tells.
    num_samples: int | None = None


@dataclass(kw_only=True)
class Resolution:
    """Size of the training images from one step on."""

    #: Steps that are finished when the first batch of this size comes.
    from_step: int = 0
    #: As ``model.vision.image_size``; positions are interpolated.
    image_size: tuple[int, int] = (224, 224)


@dataclass(kw_only=True)
class CacheConfig:
    """Local copies of remote shards, shared by all processes of a node."""

    #: Folder on a local disk; must be set when a source is remote.
    dir: str | None = None
    #: Largest total size. Shards in use are never dropped: it must hold about three pools
    #: (``data.shuffle_shards``) per lane that the node reads.
    max_gib: float = 100.0


@dataclass(kw_only=True)
class NetworkConfig:
    """How remote shards are fetched."""

    #: Seconds until a connection must stand.
    connect_timeout: float = 10.0
    #: Seconds without a byte after which a transfer counts as stalled.
    read_timeout: float = 30.0
    #: Failed tries after which a shard counts as unreachable, which ends the run.
    max_tries: int = 10
    #: Upper bound of the pause before the second try, in seconds; every further try doubles it.
    backoff: float = 0.5
    #: Largest pause in seconds.
    max_backoff: float = 60.0
    #: Shards fetched at once by every worker.
    downloads: int = 2


@dataclass(kw_only=True)
class DataConfig:
    """Training shards in the LAION-400M / img2dataset layout."""

    #: Sources, or patterns: ``data.train=['/data/laion400m/{00000..41455}.tar']``; a single
    #: pattern needs no list.
    train: list[Source] = field(default_factory=list)
    #: "shuffled": every sample once per epoch (times ``upsampling``); "replacement": shards are
    #: drawn with replacement.
    sampling: Literal["shuffled", "replacement"] = "shuffled"
    #: Independent streams the shards of a source are dealt to. A multiple of ranks x workers lets
    #: every worker read shards of its own. Part of the order: change it and the order changes.
    num_lanes: int = 1
    #: Shards of one lane whose samples are shuffled together.
    shuffle_shards: int = 8
    #: Decoding processes per rank; has no influence on the order.
    num_workers: int = 2
    #: Batches per rank that are decoded ahead.
    prefetch_batches: int = 4
    #: Area range of the random resized crop.
    crop_scale: tuple[float, float] = (0.9, 1.0)
    #: Image sizes over the run, by rising ``from_step``; empty: ``model.vision.image_size``.
    resolutions: list[Resolution] = field(default_factory=list)
    cache: CacheConfig = field(default_factory=CacheConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    #: Largest share of samples that may be bad and replaced before the run ends with an error;
    #: every sample of a lost shard counts.
    max_bad_samples: float = 0.1
    #: Bad samples (a lost shard counts as one) in a row before the run ends with an error.
    max_bad_in_a_row: int = 100


@dataclass(kw_only=True)
class TrainConfig:
    """How long, how many at once, how precise."""

    #: Optimizer steps of the whole run.
    steps: int = 0
    #: Image-text pairs per optimizer step, over all ranks; each is the others' negative.
    global_batch_size: int = 0
    #: Pairs that a rank runs at once; None: its whole part of the global batch. With smaller ones
    #: gradients are accumulated, and negatives still come from the whole global batch: features of
    #: all micro-batches are computed first, without graph, and once more for the backward.
    micro_batch_size: int | None = None
    #: "bf16", "fp16" (with dynamic loss scaling) or "fp32"; master weights and accumulated
    #: gradients are fp32 in all of them.
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    #: What of a block's activations is computed again in the backward: "full", all but its input;
    #: "selective", all but its matrix products and attention.
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    #: torch.compile every block.
    compile: bool = False
    #: Of the weights, the order of samples, crops and dropped patches.
    seed: int = 0


@dataclass(kw_only=True)
class InitConfig:
    """What a run starts from, and what of it stays as it is (LiT, arXiv 2111.07991).

    Folders hold ``open_clip_config.json`` and ``open_clip_model.safetensors``, from open_clip or
    from here, of the same architecture; positions are interpolated where the image size differs. A
    run that goes on from a checkpoint does not read them.
    """

    #: Folder for the whole model: both towers, the logit scale and the sigmoid loss's bias.
    pretrained: str | None = None
    #: Folder for the image tower alone, with its projection.
    pretrained_image: str | None = None
    #: Folder for the text tower alone, with its projection.
    pretrained_text: str | None = None
    #: Take the weights also where they were trained with another attention than the model's; gains
    #: of head norms that the folder lacks start at one.
    change_attention: bool = False
    #: Keep the image tower as it was loaded: no gradients, no optimizer state.
    lock_image: bool = False
    #: Groups at the end of a locked image tower that are trained all the same, counted as in
    #: open_clip: 1, the projection; 2, also the last block and the norm after it; then block by
    #: block; all ``layers`` + 2 with the embedding.
    lock_image_unlocked_groups: int = 0
    #: Keep the text tower as it was loaded.
    lock_text: bool = False
    #: As ``lock_image_unlocked_groups``.
    lock_text_unlocked_layers: int = 0


@dataclass(kw_only=True)
class LossConfig:
    """Contrastive loss over the whole global batch."""

    #: "softmax": CLIP (arXiv 2103.00020); "sigmoid": SigLIP (arXiv 2303.15343), with a bias.
    kind: Literal["softmax", "sigmoid"] = "softmax"
    #: Rows of logits a rank holds at once.
    chunk_size: int = 1024


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer, cosine to zero after a linear warm-up; defaults are open_clip's for ViT."""

    #: "adamw": torch's. "lion" (arXiv 2302.06675): a tenth of AdamW's lr, ten times its decay; no
    #: eps. "lamb" (arXiv 1904.00962): one trust ratio per matrix, for very large batches.
    kind: Literal["adamw", "lion", "lamb"] = "adamw"
    #: Largest learning rate, at the end of the warm-up.
    lr: float = 5e-4
    #: Share of the old first moment that a step keeps.
    beta1: float = 0.9
    #: Share of the old second moment that a step keeps.
    beta2: float = 0.98
    #: Added to the root of the second moment.
    eps: float = 1e-6
    #: Decoupled; of matrices alone, not of gains, biases and the logit scale.
    weight_decay: float = 0.2
    #: Steps of the linear warm-up.
    warmup_steps: int = 10_000
    #: Largest gradient norm over all parameters; 0 switches clipping off.
    clip_grad_norm: float = 1.0
    #: Share of the old average that each step keeps, once warm, in a running average of the weights
    #: that evaluation sees; 0: none. Costs 4 bytes per parameter, shared by the data ranks.
    ema_decay: float = 0.0


@dataclass(kw_only=True)
class ParallelConfig:
    """Ranks and devices: world size = tp x cp x dp x pp, tensor innermost."""

    #: Where ranks compute; "auto": on GPUs if there are any.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    #: Data-parallel size; None: what the other axes leave of the ranks that were started.
    dp: int | None = None
    #: Tensor-parallel size: heads and MLPs of every layer are split. Must divide the heads of both
    #: towers.
    tp: int = 1
    #: Pipeline stages: consecutive layers of both towers, balanced by their cost. ZeRO-1 only.
    pp: int = 1
    #: Context-parallel size: the tokens of every image are split. Linear attention only.
    cp: int = 1


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO: what is split over the data- and context-parallel ranks."""

    #: 1: optimizer state and master weights; 2: gradients too; 3: weights too.
    stage: int = 1
    #: Where the optimizer state and the master weights live.
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    #: Where the weights live between their uses; stage 3.
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    #: Folder on a fast local disk, for "nvme".
    nvme_path: str | None = None
    #: JSON file with what is DeepSpeed's alone (bucket sizes, overlap); None: its defaults.
    deepspeed_config: str | None = None


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is saved into ``<run folder>/checkpoints``, and when."""

    #: Steps between saves; 0: none by steps. The last step is always saved.
    every_steps: int = 1000
    #: Minutes between saves, whatever made the last one; 0: none by the clock.
    every_minutes: float = 0.0
    #: Newest checkpoints kept.
    keep_last: int = 3
    #: Checkpoints at multiples of so many steps are never removed; 0: none.
    keep_every_steps: int = 0
    #: Training waits for the copy to the host only; writing goes on beside it. Costs host memory
    #: for weights and optimizer state, shared by the ranks as these are.
    asynchronous: bool = True
    #: ``latest`` goes on from the newest checkpoint of the run folder, if it has one; ``never``
    #: refuses a run folder that holds checkpoints.
    resume: Literal["latest", "never"] = "latest"


@dataclass(kw_only=True)
class EvalConfig:
    """Zero-shot classification on a held-out folder, during and after training."""

    #: Folder in clip_benchmark's webdataset layout (``test/*.tar``, ``classnames.txt``,
    #: ``zeroshot_classification_templates.txt``), or one whose classes ``classes`` lists; None: no
    #: evaluation.
    data: str | None = None
    #: ImageNet's list of the folder's classes (``imagenet-22k``, ``imagenet-21k-goog``,
    #: ``imagenet-21k-miil``, ``imagenet-21k-miil-w21``, ``imagenet-12k``, ``imagenet-1k``), or a
    #: file with a synset a line; None: the folder names them itself.
    classes: str | None = None
    #: What prompts call the classes of such a list: ``lemma``, ``aliases``, ``definition``, or
    #: ``open_clip`` (imagenet-1k).
    names: Literal["lemma", "aliases", "definition", "open_clip"] = "lemma"
    #: Prompts for such a list: ``one``, ``simple`` (open_clip's 7), ``openai`` (its 80), or a file
    #: with a template a line.
    templates: str = "one"
    #: Steps between evaluations; 0: only at the end.
    every_steps: int = 0
    #: Images that a rank embeds at once.
    batch_size: int = 256


@dataclass(kw_only=True)
class HealthConfig:
    """When training that goes wrong ends, or goes back."""

    #: Steps in a row whose gradient is not finite, each of which leaves the weights as they were,
    #: after which the run ends. Those for which fp16 lowers its loss scale are not counted.
    max_skipped_steps: int = 20
    #: A logged loss of more than this factor times the median of those before it takes training
    #: back to the newest checkpoint, and the batches since are left out (PaLM, arXiv 2204.02311,
    #: 5.1); 0: never.
    spike_factor: float = 0.0
    #: Logged losses in that median; with fewer there are no spikes yet.
    spike_window: int = 20
    #: Rewinds in a run; the next spike ends it.
    max_rewinds: int = 3


@dataclass(kw_only=True)
class LogConfig:
    """Progress, and who is told of it; ``<run folder>/metrics.jsonl`` is written in any case."""

    #: Steps between records of loss and throughput.
    every_steps: int = 10
    #: Write TensorBoard events into ``<run folder>/tensorboard``.
    tensorboard: bool = True
    #: Port on which rank 0 answers Prometheus, on all addresses of its host; None: none.
    prometheus_port: int | None = None
    #: Project of Weights & Biases (``pip install wandb``); None: none.
    wandb: str | None = None
    #: Project of Trackio (``pip install trackio``), kept in its folder on this machine; None: none.
    trackio: str | None = None
    #: Largest rate of one device in TFLOP/s, for ``perf/mfu``; None: that of the data sheet for
    #: bf16 and fp16 on a known GPU (``ds_linclip/planner/device_specs.py``), else there is no
    #: ``perf/mfu``.
    peak_tflops: float | None = None
    #: Held-out images drawn with their captions and top-5 classes at every evaluation.
    num_images: int = 8
    #: Write the keys of every batch into ``<run folder>/samples/rank-N.jsonl``.
    sample_keys: bool = False


@dataclass(kw_only=True)
class WatchdogConfig:
    """Ranks that hang, ranks that are slow."""

    #: Seconds in one phase (a step, a save, an evaluation, ...) after which a rank counts as hung:
    #: stacks of all ranks are written and the run ends with exit code 76. Must exceed the longest
    #: phase of a healthy run; process groups give up after 1800. 0: no watch.
    timeout_seconds: float = 1200.0
    #: Name a rank whose own part of a step takes so many times that of the median rank; 0: never.
    slow_rank_ratio: float = 2.0


@dataclass(kw_only=True)
class Config:
    """One whole experiment."""

    #: Name of the run; its folder is ``<output_dir>/<name>``.
    name: str = "linclip"
    #: Folder of all runs; must be the same for all nodes.
    output_dir: str = "runs"
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
        return Path(self.output_dir) / self.name

    def image_size_at(self, step: int) -> tuple[int, int]:
        """(height, width) of the training images in the batch that follows ``step`` finished
        optimizer steps (0: the first batch of the run)."""
        begun = [stage for stage in self.data.resolutions if stage.from_step <= step]
        return begun[-1].image_size if begun else self.model.vision.image_size

    @property
    def largest_image_size(self) -> tuple[int, int]:
        """(height, width) of the training images with the most pixels."""
        sizes = [stage.image_size for stage in self.data.resolutions]
        return max(sizes or [self.model.vision.image_size], key=math.prod)

    def num_micro_batches(self, dp_size: int) -> int:
        """Of a rank in a step, given the data-parallel size."""
        local = self.train.global_batch_size // dp_size
        return local // (self.train.micro_batch_size or local)
