"""``linclip linearize``: turn a trained softmax CLIP into one with another attention.

Three runs of the one trainer, each started as ``linclip train`` would:

1. ``transfer``: the attention of every layer learns the output of the teacher's layer for the
   teacher's input (LoLCATs, arXiv 2410.10254); nothing else is trained.
2. ``distil``: the whole model learns the teacher's features and its matching probabilities
   (CLIP-KD, arXiv 2307.12732; MobileCLIP, arXiv 2311.17049).
3. ``finish``: contrastive training on the data.

Every stage begins with the weights of the one before. The same command resumes an interrupted
stage and leaves out finished ones.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from ds_linclip.checkpoint.directory import committed, step_of
from ds_linclip.config import (
    Config,
    ModelConfig,
    build_section,
    check_model,
    config_as_yaml,
    load_config,
)
from ds_linclip.interop.export import export_checkpoint
from ds_linclip.interop.hub_folder import CONFIG_FILE, read_config
from ds_linclip.process.atomic import write_atomically
from linclip_launch import supervise

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage: the terms of its loss, and its learning rate as a part of the config's."""

    name: str
    terms: str
    lr_factor: float


_STAGES = (
    _Stage(name="transfer", terms="[{kind: layers}]", lr_factor=1.0),
    _Stage(
        name="distil", terms="[{kind: features, weight: 10}, {kind: similarity}]", lr_factor=0.5
    ),
    _Stage(name="finish", terms="[{kind: contrastive}]", lr_factor=0.1),
)


def run(options: argparse.Namespace) -> int:
    """Linearise as a command line says, and return the exit code of the last run.

    Raises:
        ValueError: for a wrong config or model, or an output folder of another model.
        OSError: when a file cannot be read or written.
    """
    output: Path = options.output
    base = load_config(options.config, options.overrides)
    if base.train.epochs is not None:
        raise ValueError(
            f"train.epochs ({base.train.epochs}) must be null: state the length of a linearisation "
            "as train.steps or train.samples, which its stages share"
        )
    teacher = _teacher_folder(options.model, output)
    config_file = _student_config(base, read_config(teacher), options, output)
    steps = _shares(base.train.steps, options.shares)
    start, source = ["init.change_attention=true"], teacher
    for stage in (each for each in _STAGES if steps[each.name]):
        overrides = [
            *(f"output_dir={output / 'runs'}", f"name={stage.name}"),
            *(f"init.pretrained={source}", *start, f"loss.terms={stage.terms}"),
            f"train.steps={steps[stage.name]}",
            f"optim.lr={base.optim.lr * stage.lr_factor:g}",
            f"optim.warmup_steps={min(base.optim.warmup_steps, steps[stage.name] // 10)}",
        ]
        if "contrastive" not in stage.terms:
            overrides.append(f"teacher.model={teacher}")
        config = load_config(config_file, overrides)
        code = _train(options, config_file, overrides, config)
        if code:
            return code
        start, source = [], output / stage.name
        if not source.exists():
            export_checkpoint(config.run_dir, source)
    sys.stdout.write(f"{source}: {options.model} with attention {options.attention}\n")
    return 0


def _teacher_folder(model: Path, output: Path) -> Path:
    """Return a hub folder with the teacher: ``model`` itself, or an export of a run."""
    if (model / CONFIG_FILE).exists():
        return model.resolve()
    teacher = output / "teacher"
    if not teacher.exists():
        export_checkpoint(model, teacher)
    return teacher.resolve()


def _student_config(
    base: Config, teacher: ModelConfig, options: argparse.Namespace, output: Path
) -> Path:
    """Write the config of all stages, the one given with the teacher's model in another attention,
    and return its path.

    Raises:
        ValueError: when the folder belongs to another command.
    """
    attention = yaml.safe_load(options.attention)
    attention = {"kind": attention} if isinstance(attention, str) else attention
    model = asdict(teacher)
    for tower in ("vision", "text"):
        if options.tower in (tower, "both"):
            model[tower] |= {"attention": attention, "attention_by_layer": []}
    base.model = build_section(model, ModelConfig, "model")
    check_model(base.model)
    base.init.pretrained = str(options.model.resolve())  # every stage has another one
    path, content = output / "linearize.yaml", config_as_yaml(base)
    if path.exists() and path.read_text(encoding="utf-8") != content:
        raise ValueError(
            f"output folder ({output}) holds a linearisation of another model or with other "
            "settings (linearize.yaml): take another --output, or the same ones to resume"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


def _shares(steps: int, shares: list[float]) -> dict[str, int]:
    """Return the number of steps of every stage, which add up to ``steps``."""
    names = [stage.name for stage in _STAGES]
    if not sum(shares):
        raise ValueError(f"--shares ({shares}) must not all be 0")
    bounds = [round(steps * sum(shares[:n]) / sum(shares)) for n in range(len(shares) + 1)]
    return {name: bounds[n + 1] - bounds[n] for n, name in enumerate(names)}


def _train(
    options: argparse.Namespace, config_file: Path, overrides: list[str], config: Config
) -> int:
    """Train one stage, unless it is finished, and return the exit code."""
    done = committed(config.run_dir / "checkpoints")
    if done and step_of(done[-1]) == config.train.steps:
        return 0
    of_stage = {**vars(options), "config": str(config_file), "overrides": overrides}
    return supervise.run(argparse.Namespace(**of_stage))
