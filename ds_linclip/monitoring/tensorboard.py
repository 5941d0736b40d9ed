"""TensorBoard's dashboards, hyperparameters and text of a run."""

import re
from collections import defaultdict
from typing import Any

from ds_linclip.config import Config, config_as_yaml
from ds_linclip.monitoring.scalars import SCALARS

__all__ = ["begin_session", "dashboards", "end_session"]

#: Fields of the config by which TensorBoard compares runs.
_HYPERPARAMETERS = (
    *("model.embed_dim", "model.vision.image_size", "model.vision.patch_size"),
    *("model.vision.width", "model.vision.layers", "model.vision.patch_dropout"),
    *("model.vision.attention_text", "model.text.width", "model.text.layers"),
    *("model.text.attention_text", "train.steps", "train.global_batch_size"),
    *("train.precision", "train.seed", "loss.kind", "optim.kind", "optim.lr"),
    *("optim.weight_decay", "optim.warmup_steps", "optim.ema_decay"),
    *("parallel.tp", "parallel.pp", "parallel.cp", "zero.stage"),
)
_RESULTS = ("train/loss", "perf/samples_per_second", "perf/model_tflops_per_device")
_SCORES = ("eval/zeroshot_top1", "eval/zeroshot_top5")


def begin_session(board: Any, config: Config, world_size: int, plan: str, step: int) -> None:
    """Write dashboards, hyperparameters, config and parallel plan (Markdown) to a
    ``torch.utils.tensorboard.SummaryWriter``, when a run starts or resumes from ``step``."""
    board.add_custom_scalars(dashboards())
    experiment, start, _ = _hparams(config, world_size)
    for summary in (experiment, start):
        board.file_writer.add_summary(summary)
    board.add_text("config", f"```yaml\n{config_as_yaml(config)}```", step)
    board.add_text("parallel_plan", plan, step)
    board.flush()


def end_session(board: Any, config: Config, world_size: int) -> None:
    """Mark the run as finished."""
    *_, end = _hparams(config, world_size)
    board.file_writer.add_summary(end)
    board.flush()


def dashboards() -> dict[str, dict[str, list]]:
    """Return the layout of the Custom Scalars page: dashboard -> chart -> expressions for tags."""
    layout: dict[str, dict[str, list]] = defaultdict(dict)
    for scalar in SCALARS:
        expression = f"^{re.escape(scalar.tag)}{'' if scalar.is_family else '$'}"
        chart = layout[scalar.dashboard].setdefault(scalar.chart, ["Multiline", []])
        chart[1].append(expression)
    return dict(layout)


def _hparams(config: Config, world_size: int) -> tuple[Any, Any, Any]:
    from torch.utils.tensorboard.summary import hparams  # takes long; needed if there is a board

    values = {name: _shown(config, name) for name in _HYPERPARAMETERS}
    tags = _RESULTS + (_SCORES if config.eval.data else ())
    return hparams(values | {"ranks": world_size}, dict.fromkeys(tags, 0.0))


def _shown(config: Config, name: str) -> float | str:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else str(value)
