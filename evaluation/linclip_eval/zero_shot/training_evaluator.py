"""Zero-shot accuracy during training: the task is opened once and scored repeatedly."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from open_clip.transform import PreprocessCfg

from ds_linclip.config import Config, HeldOutSet, NamedSet
from ds_linclip.data import CaptionTokenizer, EvalTransform
from ds_linclip.data.eval.image_check import check_images
from ds_linclip.process.consensus import agree
from ds_linclip.process.phase import PhaseTracker
from linclip_eval.protocols import Better, Encoders, Tokenizer
from linclip_eval.zero_shot.evaluate import Prediction, ZeroShotResult
from linclip_eval.zero_shot.task import ZeroShotTask

__all__ = ["HeldOutEvaluator"]

logger = logging.getLogger(__name__)


class _Writer(Protocol):
    def figure(self, step: int, tag: str, figure: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class HeldOutEvaluator:
    """The held-out task of a run; the ranks of ``group`` score models on it together.

    Attributes:
        task: The task, opened and checked before training, so that bad data stop the run at its
            start and not at the first evaluation.
        tokenizer: The tokenizer of the model.
        device: The device of the model.
        num_images: The number of predictions that rank 0 of ``group`` draws at each call.
        name: The name of the set in tags; empty: that of ``eval.data``.
        check_result: A file in which :meth:`rehearse` keeps what it found when it decoded all
            images; None: it does not decode them.
    """

    task: ZeroShotTask
    tokenizer: Tokenizer
    device: torch.device
    group: dist.ProcessGroup | None = None
    num_images: int = 0
    name: str = ""
    check_result: Path | None = None

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        held_out: NamedSet | None = None,
    ) -> Self:
        """Return the evaluator of an entry of ``eval.sets``; None: of ``eval.data``.

        Raises:
            ValueError: when ``eval.data`` is None or the task cannot be opened.
        """
        chosen: HeldOutSet = held_out or config.eval
        name = held_out.name if held_out else ""
        if chosen.data is None:
            raise ValueError("eval.data (None) must name a held-out folder")
        try:
            task = ZeroShotTask.open(
                chosen.data,
                transform=EvalTransform(PreprocessCfg(size=config.model.vision.image_size)),
                batch_size=config.eval.batch_size,
                num_workers=config.data.num_workers,
                classes=chosen.classes,
                names=chosen.names,
                templates=chosen.templates,
                max_bad_samples=chosen.max_bad_samples,
            )
        except ValueError as error:
            if not name:
                raise
            raise ValueError(f"eval.sets ({name}): {error}") from error
        if group is None or dist.get_rank(group) == 0:
            for finding in task.data.findings.describe():
                logger.warning("eval.data (%s): %s", chosen.data, finding)
        result = config.run_dir / (f"held_out_{name}.json" if name else "held_out.json")
        return cls(
            task=task,
            tokenizer=CaptionTokenizer(config.model.text.context_length),
            device=device,
            group=group,
            num_images=config.log.num_images,
            name=name,
            check_result=result if config.eval.check_images else None,
        )

    @property
    def metrics(self) -> Mapping[str, Better]:
        """The tags that a call returns, and which end of each is better."""
        top1, top5, bad = self._tags
        return {top1: "max", top5: "max", bad: "min"}

    def rehearse(self, model: Encoders, phases: PhaseTracker) -> None:
        """Decode every image once, and embed a few; all ranks of the run call this together.

        Raises:
            ValueError: on all ranks, when the task cannot be scored.
        """
        everyone = None if self.group is None else dist.group.WORLD
        if self.check_result is not None:
            on_round = partial(phases.enter, "checking held-out images")
            check_images(
                self.task.data, group=everyone, result=self.check_result, on_round=on_round
            )
        phases.enter("rehearsing the evaluation")
        rehearse = partial(self.task.rehearse, tokenizer=self.tokenizer, device=self.device)
        agree(partial(rehearse, model), everyone, (Exception,))

    def score(self, model: Encoders) -> ZeroShotResult:
        """Classify every held-out image with a model in eval mode."""
        draws = self.group is None or dist.get_rank(self.group) == 0
        return self.task.score(
            model,
            tokenizer=self.tokenizer,
            device=self.device,
            group=self.group,
            num_predictions=self.num_images if draws else 0,
        )

    def __call__(self, model: Encoders, writer: _Writer, step: int) -> Mapping[str, float]:
        """Return top-1 and top-5 accuracy during training, and the number of unreadable images, by
        their TensorBoard tags.

        ``writer`` receives a figure of the first predictions.
        """
        result = self.score(model)
        if result.predictions:
            tag = f"eval/{self.name}/predictions" if self.name else "eval/predictions"
            agree(partial(_draw, result.predictions, writer, step, tag), None, (Exception,))
        values = result.topk(1), result.topk(5), len(result.unreadable)
        return dict(zip(self._tags, values, strict=True))

    @property
    def _tags(self) -> tuple[str, str, str]:
        if not self.name:
            return "eval/zeroshot_top1", "eval/zeroshot_top5", "eval/bad_samples"
        return f"eval/{self.name}/top1", f"eval/{self.name}/top5", f"eval/{self.name}/bad_samples"


def _draw(predictions: Sequence[Prediction], writer: _Writer, step: int, tag: str) -> None:
    # Only the rank that draws imports matplotlib, which takes half a second.
    from linclip_eval.zero_shot.figures import draw_predictions

    writer.figure(step, tag, draw_predictions(predictions))
