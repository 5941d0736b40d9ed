"""The fields of a configuration that are about evaluation, logs and checkpoints."""

from dataclasses import dataclass, field
from typing import Literal

from ds_linclip.config.paths import PATH

_CLASS_LISTS = (
    *("imagenet-22k", "imagenet-21k-goog", "imagenet-21k-miil", "imagenet-21k-miil-w21"),
    *("imagenet-12k", "imagenet-1k"),
)
_TEMPLATE_SETS = ("one", "simple", "openai")


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
    #: Score whose best checkpoint is kept besides, such as `eval/zeroshot_top1` or
    #: `eval/validation/loss`; null: none. Whenever an evaluation is better than all before it, its
    #: step is saved and `checkpoints/best.json` names it, for `linclip export --best`.
    keep_best: str | None = None
    #: Write checkpoints in the background; training waits only for the copy to host memory. Needs
    #: host memory for a rank's part of weights and optimizer state.
    asynchronous: bool = True
    #: `latest`: resume from the newest checkpoint of the run folder, if there is one. `never`:
    #: refuse a run folder that has checkpoints.
    resume: Literal["latest", "never"] = "latest"
    #: Checkpoint of another run, such as `runs/long/checkpoints/step-00090000`, that this run
    #: continues, with the optimizer's state and the position in the data; only `optim.schedule` and
    #: the length may differ. Once this run has checkpoints of its own, it resumes from these.
    branch_from: str | None = field(default=None, metadata=PATH)


@dataclass(kw_only=True)
class HeldOutSet:
    """Held-out images with their classes, for zero-shot classification."""

    #: Folder in clip_benchmark's webdataset layout (`test/*.tar`, `classnames.txt`,
    #: `zeroshot_classification_templates.txt`), or a folder whose classes `classes` lists; null:
    #: none.
    data: str | None = field(default=None, metadata=PATH)
    #: The folder's classes: an ImageNet list (`imagenet-22k`, `imagenet-21k-goog`,
    #: `imagenet-21k-miil`, `imagenet-21k-miil-w21`, `imagenet-12k`, `imagenet-1k`) or a file with
    #: one synset per line; null: the folder names its classes.
    classes: str | None = field(default=None, metadata=PATH | {"names": _CLASS_LISTS})
    #: Class names in the prompts for such a list: `lemma`, `aliases`, `definition`, or `open_clip`
    #: (imagenet-1k only).
    names: Literal["lemma", "aliases", "definition", "open_clip"] = "lemma"
    #: Prompt templates for such a list: `one`, `simple` (open_clip's 7), `openai` (its 80), or a
    #: file with one template per line.
    templates: str = field(default="one", metadata=PATH | {"names": _TEMPLATE_SETS})
    #: Held-out images that may be unreadable; they are counted and are wrong. More are an error.
    max_bad_samples: int = 0


@dataclass(kw_only=True)
class NamedSet(HeldOutSet):
    """A further held-out set of a run, which scores as `eval/<name>/top1` and `top5`."""

    #: Name of the set in tags and messages: letters, digits, `.`, `-` and `_`. Required.
    name: str = ""


@dataclass(kw_only=True)
class ValidationConfig:
    """Held-out image-text pairs, read as in evaluation, without augmentation.

    They score as `eval/validation/...`: the loss, over global batches of `train.global_batch_size`
    (fewer if there are fewer samples), and recall and median rank of retrieval among all of them. A
    larger part of bad samples than `data.max_bad_samples` is an error.
    """

    #: Brace pattern of shards as those of `data.train`, but held out from it; null: none.
    shards: str | None = field(default=None, metadata=PATH)
    #: Number of samples that are taken, from the first shard on; every rank holds all features.
    num_samples: int = 10_000


@dataclass(kw_only=True)
class EvalConfig(HeldOutSet):
    """Scores of held-out data, during training and at its end.

    `data` and the keys that describe it are one zero-shot set, which scores as
    `eval/zeroshot_top1` and `eval/zeroshot_top5`.
    """

    #: Further zero-shot sets, such as `[{name: imagenet_v2, data: /data/imagenet_v2}]`.
    sets: list[NamedSet] = field(default_factory=list)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    #: Steps between evaluations; 0: only at the end.
    every_steps: int = 0
    #: Images per forward pass and rank.
    batch_size: int = 256
    #: Decode every held-out image of the zero-shot sets once before the first step, on all ranks
    #: and data workers (each about 100 images of ImageNet per second); `<run folder>/held_out.json`
    #: keeps the result until a file changes. `false`: an unreadable image ends the run at its first
    #: evaluation.
    check_images: bool = True


@dataclass(kw_only=True)
class ProfileConfig:
    """Traces of some steps by torch's profiler, for TensorBoard or Perfetto.

    Every chosen rank writes CPU and GPU activities to `<run folder>/profile`, once per run.
    """

    #: First step that is traced, counted from 1.
    first_step: int = 20
    #: Steps that are traced, which makes them slower; 0: none.
    steps: int = 0
    #: Ranks that trace.
    ranks: list[int] = field(default_factory=lambda: [0])


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
    #: Place of a copy of the run folder, `<sync_to>/<name>`: a URL that fsspec knows, such as
    #: `s3://bucket/runs`, or a folder; null: none. Rank 0 copies in the background, checkpoints
    #: once they are complete. What is removed from the run folder stays there.
    sync_to: str | None = field(default=None, metadata=PATH)
    #: Minutes between two such copies; the last one follows the end of the run.
    sync_minutes: float = 10.0
    profile: ProfileConfig = field(default_factory=ProfileConfig)
