"""The rules that a configuration must satisfy before anything starts."""

import math
import re
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter

from ds_linclip.config.compilation import graph_break
from ds_linclip.config.data import CaptionSource, NetworkConfig, Source
from ds_linclip.config.length import check_length
from ds_linclip.config.model_rules import (
    Rule,
    check_fields,
    check_model,
    named_attentions,
    positive,
    require_patches,
)
from ds_linclip.config.monitoring import EvalConfig
from ds_linclip.config.schema import (
    Config,
    ParallelConfig,
)

__all__ = [
    "check_batch",
    "check_captions",
    "check_ranks",
    "check_steps",
    "validate",
]

_NO_CAPTIONS = ("jpg", "jpeg", "png", "webp", "gif", "cls")

_RULES: list[Rule] = [
    positive(
        *("train.global_batch_size", "loss.chunk_size", "optim.lr", "optim.eps"),
        *("parallel.dp", "parallel.tp", "parallel.pp", "parallel.cp", "data.num_lanes"),
        *("data.shuffle_shards", "data.prefetch_batches", "data.max_bad_in_a_row"),
        *("data.cache.max_gib", *(f"data.network.{each.name}" for each in fields(NetworkConfig))),
        *("checkpoint.keep_last", "eval.batch_size", "log.every_steps", "log.peak_tflops"),
        *("health.max_skipped_steps", "health.spike_window", "log.profile.first_step"),
        *("eval.validation.num_samples", "log.sync_minutes"),
    ),
    (
        lambda value: 0 <= value < math.inf,
        "not be negative",
        (
            *("train.seed", "optim.weight_decay", "optim.warmup_steps", "optim.clip_grad_norm"),
            *("data.num_workers", "checkpoint.every_steps", "checkpoint.every_minutes"),
            *("checkpoint.keep_every_steps", "eval.every_steps", "health.max_rewinds"),
            "eval.max_bad_samples",
            *("log.num_images", "watchdog.timeout_seconds", "log.profile.steps"),
        ),
    ),
    (
        lambda value: 0 <= value < 1,
        "be in [0, 1)",
        ["optim.beta1", "optim.beta2", "optim.ema_decay", "model.vision.patch_dropout"],
    ),
    (lambda value: 0 < value <= 1, "be in (0, 1]", ["data.max_bad_samples"]),
    (lambda stage: stage in (1, 2, 3), "be 1, 2 or 3", ["zero.stage"]),
    (
        lambda factor: factor == 0 or 1 < factor < math.inf,
        "be greater than 1 and finite, or 0: no rewinds",
        ["health.spike_factor"],
    ),
    (
        lambda ratio: ratio == 0 or ratio > 1,
        "be greater than 1, or 0 for no warnings",
        ["watchdog.slow_rank_ratio"],
    ),
    (lambda ranks: min(ranks, default=0) >= 0, "be numbers from 0 on", ["log.profile.ranks"]),
    (lambda port: 0 < port < 2**16, "be in 1..65535", ["log.prometheus_port"]),
    (lambda name: name != "", "be the name of a project, or null", ["log.wandb", "log.trackio"]),
    (
        lambda name: name.isprintable() and name not in ("", ".", "..") and "/" not in name,
        "be a plain folder name, of printable characters",
        ["name"],
    ),
    (
        lambda name: len(name.encode()) <= 255,
        "be at most 255 bytes long, as file systems require",
        ["name"],
    ),
]
#: Names of other parts of ``eval``.
_TAKEN_NAMES = ("validation",)
_SOURCE_RULES: list[Rule] = [
    (lambda shards: shards != "", "name shards", ["shards"]),
    (lambda weight: weight != 0, "not be 0: leave the source out", ["weight"]),
    positive("upsampling", "num_samples", "weight"),
]
_CAPTION_RULES: list[Rule] = [
    (
        lambda member: re.fullmatch(r"[^./\s][^/\s]*", member) is not None,
        "be what follows the key in a member's name, such as txt or syn.txt",
        ["member"],
    ),
    (
        lambda member: member.lower().rpartition(".")[2] not in _NO_CAPTIONS,
        f"be no image and no class ({', '.join(_NO_CAPTIONS)})",
        ["member"],
    ),
    (
        lambda path: all(path.split(".")),
        "be names of entries with dots between them",
        ["field"],
    ),
    (
        lambda text: re.fullmatch(r"(?:[^{}]|\{\{|\}\}|\{[^{}]+\})*", text) is not None,
        "have names in braces, such as {caption}, and other braces twice",
        ["template"],
    ),
    (lambda text: text.strip() != "", "not be empty", ["template"]),
    positive("weight"),
]


def validate(config: Config) -> None:
    """Check every rule that needs neither data nor processes.

    Raises:
        ValueError: naming the field, its value and the rule.
    """
    check_model(config.model)
    check_fields(config, _RULES)
    _validate_tokenizer(config)
    _validate_train(config)
    _validate_loss(config)
    _validate_init(config)
    _validate_parallel(config)
    _validate_zero(config)
    if config.parallel.dp is not None:
        check_batch(config, config.parallel.dp)
    _validate_data(config)
    _validate_sources(config.data.train)
    check_captions(config.data.captions)
    _validate_eval(config.eval)
    check_length(config.train)
    if config.train.epochs is None:
        check_steps(config)


def check_captions(sources: Sequence[CaptionSource]) -> None:
    """Check the rules of ``data.captions``.

    Raises:
        ValueError: naming the field, its value and the rule.
    """
    for index, source in enumerate(sources):
        name, member = f"data.captions[{index}]", source.member.lower()
        check_fields(source, _CAPTION_RULES, f"{name}.")
        is_json = member.endswith("json")
        if source.field is not None and not is_json:
            raise ValueError(
                f"{name}.field ({source.field}) needs a member that ends in json, not "
                f"({source.member})"
            )
        if not is_json and "{caption}" not in source.template:
            raise ValueError(
                f"{name}.template ({source.template}) must have {{caption}}, which is the text of "
                f"{source.member}"
            )


def _validate_tokenizer(config: Config) -> None:
    if (name := config.model.text.hf_tokenizer_name) is not None:
        raise ValueError(
            f"model.text.hf_tokenizer_name ({name}) must be null in training, whose captions are "
            "read by CLIP's own tokenizer"
        )


def check_batch(config: Config, dp_size: int) -> None:
    """Check that the batch divides over the data-parallel ranks and into micro-batches.

    Raises:
        ValueError: naming the fields and the nearest values that would fit.
    """
    batch, micro_batch = config.train.global_batch_size, config.train.micro_batch_size
    if batch % dp_size:
        below = batch - batch % dp_size
        fitting = " or ".join(str(size) for size in (below, below + dp_size) if size > 0)
        raise ValueError(
            f"train.global_batch_size ({batch}) must be a positive multiple of the data-parallel "
            f"size ({dp_size}): {fitting} would do"
        )
    local = batch // dp_size
    if micro_batch is not None and (micro_batch < 1 or local % micro_batch):
        sizes = range(1, min(local, micro_batch) + 1)
        largest = max((size for size in sizes if local % size == 0), default=1)
        raise ValueError(
            f"train.micro_batch_size ({micro_batch}) must divide a rank's part of the batch "
            f"({batch} / {dp_size} = {local}): {largest} would do"
        )


def check_ranks(parallel: ParallelConfig, world_size: int) -> int:
    """Check that the sizes of the axes multiply to the number of ranks.

    Returns:
        The data-parallel size.

    Raises:
        ValueError: naming the fields and values that would fit.
    """
    others = parallel.tp * parallel.cp * parallel.pp
    fields = (
        f"parallel.tp ({parallel.tp}) x parallel.cp ({parallel.cp}) x parallel.pp ({parallel.pp})"
    )
    if world_size % others:
        raise ValueError(
            f"{fields} = {others} must divide the number of ranks ({world_size}): start a multiple "
            f"of {others} ranks, or choose sizes whose product divides {world_size}"
        )
    dp_size = world_size // others
    if parallel.dp is not None and parallel.dp != dp_size:
        raise ValueError(
            f"parallel.dp ({parallel.dp}) x {fields} must equal the number of ranks "
            f"({world_size}): parallel.dp={dp_size} would do, or {parallel.dp * others} ranks"
        )
    return dp_size


def _validate_train(config: Config) -> None:
    _validate_compile(config)
    if config.train.reduce_dtype == "bf16" and "bf16" not in config.train.precision:
        raise ValueError(
            f"train.reduce_dtype (bf16) needs train.precision bf16 or amp_bf16, not "
            f"({config.train.precision}): take train.reduce_dtype=fp32"
        )
    if config.health.spike_factor and config.checkpoint.resume == "never":
        raise ValueError(
            f"health.spike_factor ({config.health.spike_factor}) needs checkpoint.resume latest, "
            "not (never): a rewind resumes from a checkpoint of this run"
        )


def check_steps(config: Config) -> None:
    """Check what must fit into the steps of the run, once their number is known.

    Raises:
        ValueError: naming the field, its value and the rule.
    """
    warmup, steps = config.optim.warmup_steps, config.train.steps
    if warmup >= steps:
        raise ValueError(f"optim.warmup_steps ({warmup}) must be less than train.steps ({steps})")
    schedule = config.optim.schedule
    for field, rule in schedule.problems(steps - warmup):
        raise ValueError(f"optim.schedule.{field} ({getattr(schedule, field)}) must {rule}")
    for index, stage in enumerate(config.data.resolutions):
        if stage.from_step >= steps:
            raise ValueError(
                f"data.resolutions[{index}].from_step ({stage.from_step}) must be less than "
                f"train.steps ({steps})"
            )


def _validate_compile(config: Config) -> None:
    train, why = config.train, graph_break(config)
    are_blocks = train.compile == "blocks" or (train.compile == "towers" and why is not None)
    if are_blocks and train.activation_checkpointing == "selective":
        reason = f", which means blocks because {why}," if train.compile == "towers" else ""
        raise ValueError(
            f"train.compile ({train.compile}){reason} needs train.activation_checkpointing none or "
            "full, not (selective), which cannot see the operators inside compiled blocks"
        )
    if not train.cuda_graphs:
        return
    needed = "train.cuda_graphs (true) needs"
    instead = "take train.cuda_graphs=false"
    if train.compile != "towers":
        raise ValueError(f"{needed} train.compile towers, not ({train.compile}): {instead}")
    if why is not None:
        raise ValueError(f"{needed} towers that are one graph, but {why}: {instead}")
    if config.parallel.device == "cpu":
        raise ValueError(f"{needed} parallel.device cuda, not (cpu): {instead}")
    for axis in ("tp", "cp", "pp"):
        if (size := getattr(config.parallel, axis)) > 1:
            raise ValueError(
                f"{needed} parallel.{axis} 1, not ({size}): communication inside the towers is not "
                f"captured; {instead}"
            )


def _validate_loss(config: Config) -> None:
    terms, teacher = config.loss.terms, config.teacher.model
    if not terms:
        raise ValueError("loss.terms ([]) must name at least one term: take [{kind: contrastive}]")
    kinds = [term.kind for term in terms]
    for number, term in enumerate(terms):
        name = f"loss.terms[{number}]"
        if term.kind in kinds[:number]:
            raise ValueError(f"{name}.kind ({term.kind}) must come once")
        for key in ("weight", "final_weight"):
            if (value := getattr(term, key)) is not None and value < 0:
                raise ValueError(f"{name}.{key} ({value}) must not be negative")
        temperature = getattr(term, "temperature", None)
        if temperature is not None and temperature <= 0:
            raise ValueError(f"{name}.temperature ({temperature}) must be greater than 0, or null")
        if term.needs_teacher and teacher is None:
            raise ValueError(
                f"{name}.kind ({term.kind}) compares with a teacher: set teacher.model"
            )
    if "layers" in kinds:
        for name, value, is_allowed, rule in (
            ("loss.terms", ", ".join(kinds), len(kinds) == 1, "be layers alone"),
            ("train.compile", config.train.compile, config.train.compile == "none", "be none"),
            ("parallel.pp", config.parallel.pp, config.parallel.pp == 1, "be 1"),
            ("parallel.cp", config.parallel.cp, config.parallel.cp == 1, "be 1"),
        ):
            if not is_allowed:
                raise ValueError(f"{name} ({value}) must {rule} where the loss is of kind layers")
    if not any(term.weight or term.final_weight for term in terms):
        raise ValueError("loss.terms must have a weight above 0")
    if teacher is not None and not any(term.needs_teacher for term in terms):
        raise ValueError(
            f"teacher.model ({teacher}) is used by no term of the loss: add {{kind: features}} or "
            "{kind: similarity} to loss.terms"
        )


def _validate_init(config: Config) -> None:
    init, model = config.init, config.model
    towers = (
        ("image", init.lock_image, "groups", init.lock_image_unlocked_groups, model.vision.layers),
        ("text", init.lock_text, "layers", init.lock_text_unlocked_layers, model.text.layers),
    )
    for side, is_locked, noun, unlocked, layers in towers:
        pretrained = getattr(init, f"pretrained_{side}")
        if init.pretrained is not None and pretrained is not None:
            raise ValueError(
                f"init.pretrained_{side} ({pretrained}) must not be set with init.pretrained "
                f"({init.pretrained}), which is the whole model"
            )
        name = f"init.lock_{side}_unlocked_{noun}"
        if not 0 <= unlocked <= layers + 2:
            raise ValueError(
                f"{name} ({unlocked}) must be in 0..{layers + 2}: the blocks, the embedding "
                "and the projection"
            )
        if unlocked and not is_locked:
            raise ValueError(f"{name} ({unlocked}) needs init.lock_{side}=true")
        if is_locked and init.pretrained is None and pretrained is None:
            raise ValueError(
                f"init.lock_{side} (true) would freeze random weights: set init.pretrained or "
                f"init.pretrained_{side}"
            )
    if all(is_locked and unlocked == 0 for _, is_locked, _, unlocked, _ in towers):
        raise ValueError(
            "init.lock_image (true) and init.lock_text (true) must leave something to train: "
            "unlock one, or set init.lock_image_unlocked_groups or init.lock_text_unlocked_layers"
        )


def _validate_parallel(config: Config) -> None:
    """Check what the parallel axes require of the model, for any number of ranks."""
    vision, text, parallel = config.model.vision, config.model.text, config.parallel
    split = {
        "model.vision heads": vision.heads,
        "model.text.heads": text.heads,
        "model.vision.width * mlp_ratio": int(vision.width * vision.mlp_ratio),
        "model.text.width * mlp_ratio": int(text.width * text.mlp_ratio),
        "model.text.vocab_size": text.vocab_size,
    }
    for name, size in split.items():
        if size % parallel.tp:
            possible = [n for n in range(1, 129) if all(s % n == 0 for s in split.values())]
            raise ValueError(
                f"parallel.tp ({parallel.tp}) must divide {name} ({size}): "
                f"{' or '.join(map(str, possible))} would do for this model"
            )
    num_blocks = vision.layers + text.layers
    if parallel.pp > num_blocks:
        raise ValueError(
            f"parallel.pp ({parallel.pp}) must be at most model.vision.layers + model.text.layers "
            f"({num_blocks}): a stage holds at least one block"
        )
    for path, attention in named_attentions("model.vision", vision):
        if parallel.cp > 1 and not attention.splits_tokens:
            raise ValueError(
                f"parallel.cp ({parallel.cp}) needs a {path}.kind whose keys and values can be "
                f"summed over ranks, not ({attention.kind}); take parallel.cp=1, or parallel.tp"
            )
        for field, rule in attention.problems_when_split() if parallel.cp > 1 else ():
            raise ValueError(
                f"{path}.{field} ({attrgetter(field)(attention)}) with parallel.cp "
                f"({parallel.cp}) must {rule}"
            )
    if parallel.cp > 1 and vision.pool_type == "map":
        raise ValueError(
            f"parallel.cp ({parallel.cp}) needs model.vision.pool_type tok or avg, not (map), "
            "whose query sees the tokens of all ranks; take parallel.cp=1, or parallel.tp"
        )
    sizes = [vision.image_size, *(stage.image_size for stage in config.data.resolutions)]
    fewest = min(vision.num_kept_tokens_at(size) for size in sizes)
    if parallel.cp > fewest:
        raise ValueError(
            f"parallel.cp ({parallel.cp}) must be at most the number of tokens of an image "
            f"({fewest})"
        )


def _validate_zero(config: Config) -> None:
    zero, pp, optim = config.zero, config.parallel.pp, config.optim
    if zero.stage > 1 and pp > 1:
        raise ValueError(
            f"zero.stage ({zero.stage}) must be 1 with parallel.pp ({pp}): a pipeline holds the "
            "gradients of all micro-batches; take zero.stage=1, or parallel.pp=1"
        )
    if zero.offload_param != "none" and zero.stage != 3:
        raise ValueError(
            f"zero.offload_param ({zero.offload_param}) needs zero.stage 3, not ({zero.stage}): "
            "other stages keep all weights on every rank"
        )
    for name in ("offload_optimizer", "offload_param"):
        if getattr(zero, name) != "nvme":
            continue
        if zero.stage != 3:
            raise ValueError(
                f"zero.{name} (nvme) needs zero.stage 3, not ({zero.stage}): take zero.stage=3, or "
                f"zero.{name}=cpu"
            )
        if zero.nvme_path is None:
            raise ValueError(f"zero.{name} (nvme) needs a folder in zero.nvme_path")
    if zero.offload_optimizer == "nvme" and (optim.kind == "lamb" or optim.ema_decay > 0):
        field = "kind (lamb)" if optim.kind == "lamb" else f"ema_decay ({optim.ema_decay})"
        raise ValueError(
            f"optim.{field} does not go with zero.offload_optimizer (nvme): it needs all of "
            "the optimizer's state at once; take zero.offload_optimizer=cpu"
        )


def _validate_data(config: Config) -> None:
    (low, high), network = config.data.crop_scale, config.data.network
    if not 0 < low <= high <= 1:
        raise ValueError(f"data.crop_scale ({low}, {high}) must satisfy 0 < low <= high <= 1")
    if network.backoff > network.max_backoff:
        raise ValueError(
            f"data.network.backoff ({network.backoff}) must not be greater than "
            f"data.network.max_backoff ({network.max_backoff})"
        )
    before = -1
    for index, stage in enumerate(config.data.resolutions):
        name, step = f"data.resolutions[{index}]", stage.from_step
        if index == 0 and step != 0:
            raise ValueError(f"{name}.from_step ({step}) must be 0: training starts at step 0")
        if step <= before:
            raise ValueError(
                f"{name}.from_step ({step}) must be greater than {before}, the one before"
            )
        require_patches(f"{name}.image_size", stage.image_size, config.model.vision.patch_size)
        before = step


def _validate_sources(sources: Sequence[Source]) -> None:
    if not sources:
        raise ValueError("data.train ([]) must name at least one shard")
    are_weighted = any(source.weight is not None for source in sources)
    for index, source in enumerate(sources):
        name = f"data.train[{index}]"
        check_fields(source, _SOURCE_RULES, f"{name}.")
        if are_weighted and source.weight is None:
            raise ValueError(f"{name}.weight (None) must be set: all sources have one or none")
        if are_weighted and source.upsampling != 1:
            raise ValueError(
                f"{name}.upsampling ({source.upsampling}) must be 1 with a weight "
                f"({source.weight}): both set how often a sample comes"
            )


def _validate_eval(evaluation: EvalConfig) -> None:
    seen: set[str] = set()
    for index, each in enumerate(evaluation.sets):
        name = f"eval.sets[{index}]"
        if not re.fullmatch(r"[\w.-]+", each.name, re.ASCII) or each.name in _TAKEN_NAMES:
            raise ValueError(
                f"{name}.name ({each.name!r}) must be of letters, digits, '.', '-' and '_', and "
                f"not {' or '.join(_TAKEN_NAMES)}"
            )
        if each.name in seen:
            raise ValueError(f"{name}.name ({each.name}) must be that of one set only")
        if each.data is None:
            raise ValueError(f"{name}.data (None) must name a held-out folder")
        if each.max_bad_samples < 0:
            raise ValueError(
                f"{name}.max_bad_samples ({each.max_bad_samples}) must not be negative"
            )
        seen.add(each.name)
