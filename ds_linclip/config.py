"""The configuration: typed dataclasses, loaded in three merges, checked once.

Structured defaults <- YAML file (and the files its ``base:`` key names) <- ``key=value`` from the
command line. Only the typed :class:`Config` travels further; nothing else reads YAML.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

__all__ = [
    "Attention",
    "CacheConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
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
    "as_image_size",
    "load_config",
    "save_config",
    "validate",
]


_TOKENIZER_VOCABULARY = 49408  # open_clip's SimpleTokenizer


@dataclass(kw_only=True, frozen=True)
class Attention:
    """How the tokens of one tower attend to each other.

    With ``kind="softmax"`` (torch SDPA) the other fields have no effect. With ``kind="linear"`` q
    and k are L2-normalised per head, and the feature map gives the score of their product x.
    """

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
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
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


@dataclass(kw_only=True)
class TextTower:
    """Causal text tower, named as in open_clip's ``text_cfg``."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    attention: Attention = field(default_factory=Attention)


@dataclass(kw_only=True)
class ModelConfig:
    """Both towers and the width of the space they share."""

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
    #: Largest total size. Shards in use are never dropped: it must hold at least two pools
    #: (``data.shuffle_shards``) per lane that the node reads.
    max_gib: float = 100.0


@dataclass(kw_only=True)
class NetworkConfig:
    """How remote shards are fetched."""

    #: Seconds until a connection must stand.
    connect_timeout: float = 10.0
    #: Seconds without a byte after which a transfer counts as stalled.
    read_timeout: float = 30.0
    #: Tries without any progress before a shard counts as unreachable, which ends the run.
    max_tries: int = 10
    #: Upper bound of the pause before the second try, in seconds; every further try doubles it.
    backoff: float = 0.5
    #: Largest pause in seconds.
    max_backoff: float = 60.0
    #: Shards fetched at once by every worker.
    downloads: int = 4


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

    steps: int = 0
    #: Image-text pairs per optimizer step, over all ranks; each is the others' negative.
    global_batch_size: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW, cosine to zero after a linear warm-up; defaults are open_clip's for ViT."""

    lr: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup_steps: int = 10_000
    #: Largest gradient norm over all parameters; 0 switches clipping off.
    clip_grad_norm: float = 1.0


@dataclass(kw_only=True)
class ParallelConfig:
    """Ranks and devices. The data-parallel size is the number of ranks that were started."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    #: Data-parallel ranks the run must have; None takes what was started.
    dp: int | None = None
    tp: int = 1


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: int = 1
    #: JSON file with what is DeepSpeed's alone (bucket sizes, overlap); None: its defaults.
    deepspeed_config: str | None = None


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is saved into ``<run folder>/checkpoints``, and when."""

    #: Steps between saves; the last step is always saved.
    every_steps: int = 1000
    #: Newest checkpoints kept.
    keep_last: int = 3
    #: ``latest`` goes on from the newest checkpoint of the run folder, if it has one; ``never``
    #: refuses a run folder that holds checkpoints.
    resume: Literal["latest", "never"] = "latest"


@dataclass(kw_only=True)
class EvalConfig:
    """Zero-shot classification on a held-out folder, during and after training."""

    #: Folder in clip_benchmark's webdataset layout (``test/*.tar``, ``classnames.txt``,
    #: ``zeroshot_classification_templates.txt``); None: no evaluation.
    data: str | None = None
    #: Steps between evaluations; 0: only at the end.
    every_steps: int = 0
    batch_size: int = 256


@dataclass(kw_only=True)
class LogConfig:
    """Progress, TensorBoard."""

    every_steps: int = 10
    tensorboard: bool = True
    #: Held-out images drawn with their captions and top-5 classes at every evaluation.
    num_images: int = 8


@dataclass(kw_only=True)
class Config:
    """One whole experiment."""

    #: Name of the run; its folder is ``<output_dir>/<name>``.
    name: str = "linclip"
    output_dir: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def image_size_at(self, step: int) -> tuple[int, int]:
        """(height, width) of the training images in the batch that follows ``step`` finished
        optimizer steps (0: the first batch of the run)."""
        begun = [stage for stage in self.data.resolutions if stage.from_step <= step]
        return begun[-1].image_size if begun else self.model.vision.image_size


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML experiment, apply ``key=value`` overrides, return the checked config.

    Args:
        path: YAML file. A top-level ``base:`` names another file, relative to this one, that is
            merged first.
        overrides: Dotted assignments such as ``optim.lr=1e-3``; later ones win.

    Raises:
        ValueError: for a missing or malformed file, an unknown key (with the nearest known ones), a
            value of the wrong type, or a value that breaks a rule of :func:`validate`.
    """
    merged = OmegaConf.structured(Config)
    sources = [(str(file), content) for file, content in _read_with_bases(Path(path))]
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override ({override}) must have the form key=value")
        try:
            sources.append(("command line", OmegaConf.from_dotlist([override])))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(
                f"override ({override}) must have a YAML value; quote a pattern within a list: "
                "data.train=['{00..99}.tar']"
            ) from error
    for source, content in sources:
        try:
            merged = OmegaConf.merge(merged, _write_out_shorthands(content))
        except ConfigKeyError as error:
            raise ValueError(f"{source}: {_unknown_key_message(error.full_key or '')}") from error
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list and a mapping
            reason, key = str(error).splitlines()[0], getattr(error, "full_key", None)
            raise ValueError(f"{source}: {key or 'config'}: {reason}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    validate(config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML; :func:`load_config` reads it back equal."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def validate(config: Config) -> None:
    """Check every rule that needs neither data nor processes.

    Raises:
        ValueError: naming the field, its value and the rule.
    """
    vision, text = config.model.vision, config.model.text
    for prefix, tower in (("model.vision", vision), ("model.text", text)):
        _require_positive(f"{prefix}.width", tower.width)
        _require_positive(f"{prefix}.layers", tower.layers)
        _require_positive(f"{prefix}.mlp_ratio", tower.mlp_ratio)
    _require_positive("model.embed_dim", config.model.embed_dim)
    _require_patches("model.vision.image_size", vision.image_size, vision.patch_size)
    _require_divisible("model.vision.width", vision.width, "head_width", vision.head_width)
    _require_divisible("model.text.width", text.width, "heads", text.heads)
    _require_divisible("model.text.vocab_size", text.vocab_size, "parallel.tp", config.parallel.tp)
    if text.vocab_size < _TOKENIZER_VOCABULARY:
        raise ValueError(
            f"model.text.vocab_size ({text.vocab_size}) must be at least {_TOKENIZER_VOCABULARY}, "
            "the size of the tokenizer's vocabulary"
        )
    if text.context_length < 3:
        raise ValueError(
            f"model.text.context_length ({text.context_length}) must be at least 3: start, one "
            "token, end"
        )
    for prefix, tower in (("model.vision", vision), ("model.text", text)):
        head_dim = tower.width // tower.heads
        if tower.attention.kind == "linear" and not 16 <= head_dim <= 256:
            raise ValueError(
                f"{prefix}: head dimension ({head_dim}) must be in 16..256 for linear attention"
            )

    _require_positive("train.steps", config.train.steps)
    _require_positive("train.global_batch_size", config.train.global_batch_size)
    if config.train.seed < 0:
        raise ValueError(f"train.seed ({config.train.seed}) must not be negative")
    if config.parallel.dp is not None:
        _require_divisible(
            "train.global_batch_size",
            config.train.global_batch_size,
            "parallel.dp",
            config.parallel.dp,
        )
    if config.parallel.tp != 1:
        raise ValueError(f"parallel.tp ({config.parallel.tp}) must be 1 in this version")
    if config.zero.stage not in (1, 2):
        raise ValueError(f"zero.stage ({config.zero.stage}) must be 1 or 2 in this version")

    _validate_data(config.data)
    _validate_sources(config.data.train)
    _validate_resolutions(config)

    optim = config.optim
    for name in ("lr", "eps"):
        _require_positive(f"optim.{name}", getattr(optim, name))
    for name in ("weight_decay", "warmup_steps", "clip_grad_norm"):
        if not 0 <= getattr(optim, name) < math.inf:
            raise ValueError(f"optim.{name} ({getattr(optim, name)}) must not be negative")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            raise ValueError(f"optim.{name} ({getattr(optim, name)}) must be in [0, 1)")
    if optim.warmup_steps >= config.train.steps:
        raise ValueError(
            f"optim.warmup_steps ({optim.warmup_steps}) must be less than train.steps "
            f"({config.train.steps})"
        )
    _require_positive("checkpoint.every_steps", config.checkpoint.every_steps)
    _require_positive("checkpoint.keep_last", config.checkpoint.keep_last)
    _require_positive("log.every_steps", config.log.every_steps)
    _require_positive("eval.batch_size", config.eval.batch_size)
    for name, value in (
        ("eval.every_steps", config.eval.every_steps),
        ("log.num_images", config.log.num_images),
    ):
        if value < 0:
            raise ValueError(f"{name} ({value}) must not be negative")
    if not config.name or Path(config.name).name != config.name:
        raise ValueError(f"name ({config.name!r}) must be a plain folder name")


def _validate_data(data: DataConfig) -> None:
    for name in ("num_lanes", "shuffle_shards", "prefetch_batches", "max_bad_in_a_row"):
        _require_positive(f"data.{name}", getattr(data, name))
    if data.num_workers < 0:
        raise ValueError(f"data.num_workers ({data.num_workers}) must not be negative")
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"data.crop_scale ({low}, {high}) must satisfy 0 < low <= high <= 1")
    if not 0 < data.max_bad_samples <= 1:
        raise ValueError(f"data.max_bad_samples ({data.max_bad_samples}) must be in (0, 1]")
    _require_positive("data.cache.max_gib", data.cache.max_gib)
    for item in fields(data.network):
        _require_positive(f"data.network.{item.name}", getattr(data.network, item.name))


def _validate_sources(sources: Sequence[Source]) -> None:
    if not sources:
        raise ValueError("data.train ([]) must name at least one shard")
    weighted = any(source.weight is not None for source in sources)
    for index, source in enumerate(sources):
        name = f"data.train[{index}]"
        if not source.shards:
            raise ValueError(f"{name}.shards ({source.shards!r}) must name shards")
        _require_positive(f"{name}.upsampling", source.upsampling)
        if source.num_samples is not None:
            _require_positive(f"{name}.num_samples", source.num_samples)
        if not weighted:
            continue
        if source.weight is None:
            raise ValueError(f"{name}.weight (None) must be set: all sources have one or none has")
        if source.weight == 0:
            raise ValueError(f"{name}.weight ({source.weight}) must not be 0: leave the source out")
        _require_positive(f"{name}.weight", source.weight)
        if source.upsampling != 1:
            raise ValueError(
                f"{name}.upsampling ({source.upsampling}) must be 1 with a weight "
                f"({source.weight}): both say how often a sample comes"
            )


def _validate_resolutions(config: Config) -> None:
    before = -1
    for index, stage in enumerate(config.data.resolutions):
        name, step = f"data.resolutions[{index}]", stage.from_step
        if index == 0 and step != 0:
            raise ValueError(f"{name}.from_step ({step}) must be 0: it is the size of the start")
        if step <= before:
            raise ValueError(f"{name}.from_step ({step}) must be greater than {before}, the last")
        if step >= config.train.steps:
            raise ValueError(
                f"{name}.from_step ({step}) must be less than train.steps ({config.train.steps})"
            )
        _require_patches(f"{name}.image_size", stage.image_size, config.model.vision.patch_size)
        before = step


def _read_with_bases(path: Path) -> list[tuple[Path, DictConfig]]:
    """The file and its bases, furthest base first."""
    chain: list[tuple[Path, DictConfig]] = []
    while True:
        if any(path.samefile(seen) for seen, _ in chain if path.exists()):
            raise ValueError(f"{path}: base files form a circle")
        try:
            content = OmegaConf.load(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"config ({path}) cannot be read: {error}") from error
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"config ({path}) is not valid YAML: {error}") from error
        if not isinstance(content, DictConfig):
            raise ValueError(f"config ({path}) must hold keys and values")
        base = content.pop("base", None)
        chain.insert(0, (path, content))
        if base is None:
            return chain
        path = path.parent / base


def as_image_size(name: str, value: object) -> tuple[int, int]:
    """(height, width) as written in a file: a pair, or one number that stands for a square.

    Args:
        name: The field, for the message.
        value: What stands there.

    Raises:
        ValueError: naming the field, for anything else.
    """
    sides = [value, value] if type(value) is int else value
    if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int]:
        raise ValueError(f"{name} ({value}) must be an integer or [height, width], in pixels")
    return sides[0], sides[1]


def _write_out_shorthands(content: DictConfig) -> dict[str, Any]:
    """``content`` as plain containers: numbers for squares and patterns for sources written out."""
    whole: Any = OmegaConf.to_container(content)
    vision, data = _section(_section(whole, "model"), "vision"), _section(whole, "data")
    if "image_size" in vision:
        vision["image_size"] = as_image_size("model.vision.image_size", vision["image_size"])
    if "train" in data:
        given = data["train"]
        if not isinstance(given, str | list):
            raise ValueError(f"data.train ({given}) must be a pattern or a list of sources")
        sources = [given] if isinstance(given, str) else given
        data["train"] = [{"shards": s} if isinstance(s, str) else s for s in sources]
    if not isinstance(data.get("resolutions", []), list):
        raise ValueError(f"data.resolutions ({data['resolutions']}) must be a list")
    for index, stage in enumerate(data.get("resolutions", [])):
        if isinstance(stage, dict) and "image_size" in stage:
            name = f"data.resolutions[{index}].image_size"
            stage["image_size"] = as_image_size(name, stage["image_size"])
    return cast(dict[str, Any], whole)


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """The mapping under ``name``; an empty one where there is none."""
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _unknown_key_message(key: str) -> str:
    known = _known_keys(Config)
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    # The key alone may be all that is told: in lists OmegaConf does not say where it stands.
    leaves = [k.rsplit(".", 1)[-1] for k in known]
    alike = difflib.get_close_matches(key.rsplit(".", 1)[-1], set(leaves), n=3, cutoff=0.8)
    near += [k for k, leaf in zip(known, leaves, strict=True) if leaf in alike and k not in near]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
    return f"unknown key ({key}){hint}"


def _known_keys(node: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(node).items():
        keys.append(prefix + name)
        if get_origin(hint) is list:
            name, (hint,) = f"{name}[*]", get_args(hint)
        if is_dataclass(hint):
            keys += _known_keys(cast(type, hint), f"{prefix}{name}.")
    return keys


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} ({value}) must be greater than 0 and finite")


def _require_divisible(name: str, value: int, by_name: str, by: int) -> None:
    if value <= 0 or by <= 0 or value % by:
        raise ValueError(f"{name} ({value}) must be a positive multiple of {by_name} ({by})")


def _require_patches(name: str, image_size: tuple[int, int], patch_size: int) -> None:
    if patch_size <= 0 or any(side <= 0 or side % patch_size for side in image_size):
        raise ValueError(
            f"{name} {image_size} must be a height and a width that are both a positive multiple "
            f"of patch_size ({patch_size})"
        )
