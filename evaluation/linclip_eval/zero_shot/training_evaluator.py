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

from ds_linclip.config import Config
from ds_linclip.data import CaptionTokenizer, EvalTransform
from ds_linclip.data.eval.image_check import check_images
from ds_linclip.process.consensus import agree
from ds_linclip.process.phase import PhaseTracker
from linclip_eval.protocols import Encoders, Tokenizer
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
        check_result: A file in which :meth:`rehearse` keeps what it found when it decoded all
            images; None: it does not decode them.
    """

    task: ZeroShotTask
    tokenizer: Tokenizer
    device: torch.device
    group: dist.ProcessGroup | None = None
    num_images: int = 0
    check_result: Path | None = None

    @classmethod
    def from_config(
        cls, config: Config, *, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> Self:
        """Return the evaluator that ``config.eval`` describes.

        Raises:
            ValueError: when ``eval.data`` is None or the task cannot be opened.
        """
        if config.eval.data is None:
            raise ValueError("eval.data (None) must name a held-out folder")
        task = ZeroShotTask.open(
            config.eval.data,
            transform=EvalTransform(PreprocessCfg(size=config.model.vision.image_size)),
            batch_size=config.eval.batch_size,
            num_workers=config.data.num_workers,
            classes=config.eval.classes,
            names=config.eval.names,
            templates=config.eval.templates,
            max_bad_samples=config.eval.max_bad_samples,
        )
        if group is None or dist.get_rank(group) == 0:
            for finding in task.data.findings.describe():
                logger.warning("eval.data (%s): %s", config.eval.data, finding)
        return cls(
            task=task,
            tokenizer=CaptionTokenizer(config.model.text.context_length),
            device=device,
            group=group,
            num_images=config.log.num_images,
            check_result=config.run_dir / "held_out.json" if config.eval.check_images else None,
        )

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
            agree(partial(_draw, result.predictions, writer, step), None, (Exception,))
        return {
            "eval/zeroshot_top1": result.topk(1),
            "eval/zeroshot_top5": result.topk(5),
            "eval/bad_samples": len(result.unreadable),
        }


def _draw(predictions: Sequence[Prediction], writer: _Writer, step: int) -> None:
    # Only the rank that draws imports matplotlib, which takes half a second.
    from linclip_eval.zero_shot.figures import draw_predictions

    writer.figure(step, "eval/predictions", draw_predictions(predictions))
