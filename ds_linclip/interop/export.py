"""``linclip export``: convert a checkpoint to the folder format that open_clip reads.

Works on a checkpoint of any parallel layout in one process, without building the model: parameters
are assembled one at a time.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from torch import Tensor

from ds_linclip.checkpoint.directory import checkpoint_path, committed, read_best, step_of
from ds_linclip.checkpoint.loading import as_used, check_files, latest_checkpoint, weight_kind
from ds_linclip.checkpoint.sharded_safetensors import MANIFEST, CheckpointReader
from ds_linclip.config import load_config
from ds_linclip.interop.hub_folder import DTYPES, new_folder, write_hub_folder
from ds_linclip.interop.key_mapping import (
    SCALARS,
    check_shapes,
    open_clip_key,
    open_clip_shapes,
    to_open_clip_layout,
)
from ds_linclip.interop.model_card import model_card
from ds_linclip.process.atomic import write_atomically

__all__ = ["Exported", "export_checkpoint", "run"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Summary of an export."""

    checkpoint: Path  #: Folder of the checkpoint that was read.
    step: int  #: Its number of optimizer steps.
    weights: str  #: "ema", the running average of the weights, or "raw".
    num_parameters: int  #: Number of weights that were written.


def export_checkpoint(
    source: Path,
    output: Path,
    *,
    step: int | None = None,
    best: bool = False,
    weights: Literal["ema", "raw"] | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> Exported:
    """Write a checkpoint's model as config, weights and model card, after checking its files.

    Args:
        source: A run folder or a checkpoint in it.
        output: The folder to write; must not exist, or be empty.
        step: Step of the checkpoint to take from a run folder; None: the newest.
        best: Take the best checkpoint of a run folder by ``checkpoint.keep_best``.
        weights: "ema": the running average of the weights; "raw": the weights themselves; None: the
            average if the run keeps one, as in evaluation.
        dtype: Dtype of the weights. Scalars are always fp32.

    Raises:
        ValueError: when there is no such checkpoint, when it is damaged or of another format, or
            when ``output`` holds something.
        OSError: when ``output`` cannot be written.
    """
    checkpoint = _find_best(source) if best else _find_checkpoint(source, step)
    with new_folder(output) as folder:
        files = CheckpointReader(checkpoint)
        check_files(files, [*files.file_names, "config.yaml"])
        config = load_config(checkpoint / "config.yaml")
        has_average = any("ema" in files.kinds(name) for name in files.names)
        if weights == "ema" and not has_average:
            raise ValueError(
                f"checkpoint ({checkpoint}) holds no running average (optim.ema_decay "
                f"{config.optim.ema_decay}): use --weights raw"
            )
        chosen = weights or ("ema" if has_average else "raw")
        names = {open_clip_key(name, config.model): name for name in files.names}
        shapes = open_clip_shapes(config.model, with_bias=config.loss.kind == "sigmoid")
        found = {key: () if key in SCALARS else files.shape(names[key]) for key in names}
        try:
            check_shapes(found, shapes)
        except ValueError as error:
            raise ValueError(f"checkpoint ({checkpoint}): {error}") from error

        def read(key: str) -> Tensor:
            kind = weight_kind(files, names[key]) if chosen == "ema" else "weight"
            weight = as_used(names[key], files.full(names[key], kind))
            return to_open_clip_layout(names[key], weight, config.model)

        try:
            num_parameters = write_hub_folder(
                folder, config.model, shapes, dtype=lambda _: DTYPES[dtype], read=read
            )
        except SafetensorError as error:
            raise ValueError(f"checkpoint ({checkpoint}) cannot be read: {error}") from error
        except ValueError as error:
            raise ValueError(f"checkpoint ({checkpoint}): {error}") from error
        card = model_card(
            os.path.basename(os.path.abspath(output)),
            config,
            files.manifest,
            run_dir=checkpoint.resolve().parent.parent,
            num_parameters=num_parameters,
            weights=chosen,
            dtype=dtype,
        )
        write_atomically(folder / "README.md", card, durable=True)
    return Exported(
        checkpoint=checkpoint,
        step=files.manifest["step"],
        weights=chosen,
        num_parameters=num_parameters,
    )


def _find_checkpoint(source: Path, step: int | None) -> Path:
    is_run = (source / "checkpoints").is_dir()
    if not is_run and ((source / MANIFEST).exists() or re.match(r"step-\d{8}", source.name)):
        if step is not None:
            raise ValueError(f"--step ({step}) needs a run folder, not a checkpoint ({source})")
        return source
    if not source.is_dir():
        raise ValueError(f"run folder ({source}) does not exist")
    newest = latest_checkpoint(source)
    if step is None:
        return newest
    path = checkpoint_path(source / "checkpoints", step)
    if not path.is_dir():
        steps = ", ".join(str(step_of(each)) for each in committed(path.parent))
        raise ValueError(
            f"run folder ({source}) holds no checkpoint of step {step}, only of {steps}"
        )
    return path


def _find_best(source: Path) -> Path:
    best = read_best(source / "checkpoints")
    if best is None:
        raise ValueError(
            f"--best needs a run folder that records its best checkpoint (checkpoint.keep_best), "
            f"not ({source})"
        )
    return source / "checkpoints" / best.checkpoint


def run(options: argparse.Namespace) -> None:
    """Export what a command line names, push it if asked to, and print a line for each; see
    :func:`export_checkpoint`."""
    if options.push is not None:
        from ds_linclip.interop.hub_push import check_push, push_folder  # takes long to import

        check_push(options.push)
    exported = export_checkpoint(
        options.source,
        options.output,
        step=options.step,
        best=options.best,
        weights=options.weights,
        dtype=options.dtype,
    )
    sys.stdout.write(
        f"{options.output}: step {exported.step} of {exported.checkpoint.parent.parent}, "
        f"{exported.weights} weights in {options.dtype}, {exported.num_parameters:,} parameters\n"
    )
    if options.push is not None:
        sys.stdout.write(f"pushed to {push_folder(options.output, options.push)}\n")
