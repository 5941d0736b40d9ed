"""Zero-shot score of a held-out folder: opened once, then asked as often as wanted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import open_clip
import torch
import torch.distributed as dist
from open_clip.transform import PreprocessCfg
from torch import Tensor

from ds_linclip.config import Config
from ds_linclip.data import EvalTransform, LabelledData
from linclip_eval.class_lists import ClassList
from linclip_eval.classifier import build_classifier, parse_template
from linclip_eval.zero_shot import ZeroShotResult, zero_shot

__all__ = ["HeldOutEvaluator"]


class _Encoders(Protocol):
    def encode_image(self, images: Tensor) -> Tensor: ...
    def encode_text(self, texts: Tensor) -> Tensor: ...


class _Writer(Protocol):
    def figure(self, step: int, tag: str, figure: Any) -> None: ...


class HeldOutEvaluator:
    """Scores models on one held-out folder; every rank of ``group`` calls it together.

    Args:
        folder: clip_benchmark's webdataset layout: ``*.tar`` with jpg and cls members,
            ``classnames.txt``, ``zeroshot_classification_templates.txt``. Opened and checked here,
            so that an evaluation hours later finds it in order.
        image_size: (height, width) of the model's images, in pixels.
        context_length: tokens of the model's text tower.
        batch_size: images per forward, per rank.
        num_workers: decoding processes, per rank.
        device: where the model is.
        group: ranks that share out the samples and the prompts; None: this process alone.
        num_images: predictions drawn at each call, by rank 0 of ``group``.

    Raises:
        ValueError: when the folder misses a file or its files disagree.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        image_size: tuple[int, int],
        context_length: int,
        batch_size: int,
        num_workers: int = 0,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        num_images: int = 0,
    ) -> None:
        self._data = LabelledData(
            folder,
            transform=EvalTransform(PreprocessCfg(size=image_size)),
            batch_size=batch_size,
            num_workers=num_workers,
        )
        try:
            self._prompts = [parse_template(template) for template in self._data.templates]
        except ValueError as error:
            raise ValueError(f"eval.data ({folder}): {error}") from error
        self._classes = ClassList.of_names(str(folder), self._data.classnames)
        self._device = device
        self._group = group
        self._num_images = num_images if group is None or dist.get_rank(group) == 0 else 0
        self._tokenizer = open_clip.SimpleTokenizer(context_length=context_length)

    @classmethod
    def from_config(
        cls, config: Config, *, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> Self:
        """The evaluator of ``config.eval``.

        Raises:
            ValueError: when ``eval.data`` is None, or as the class.
        """
        if config.eval.data is None:
            raise ValueError("eval.data (None) must name a held-out folder")
        return cls(
            config.eval.data,
            image_size=config.model.vision.image_size,
            context_length=config.model.text.context_length,
            batch_size=config.eval.batch_size,
            num_workers=config.data.num_workers,
            device=device,
            group=group,
            num_images=config.log.num_images,
        )

    def score(self, model: _Encoders) -> ZeroShotResult:
        """Classify every held-out image; ``model`` is in eval mode, gradients are off."""
        classifier = build_classifier(
            model.encode_text,
            self._classes.texts,
            self._prompts,
            tokenizer=self._tokenizer,
            device=self._device,
            group=self._group,
        )
        return zero_shot(
            model.encode_image,
            classifier,
            self._data,
            self._classes,
            group=self._group,
            num_predictions=self._num_images,
        )

    def __call__(self, model: _Encoders, writer: _Writer, step: int) -> Mapping[str, float]:
        """Score during training: draws the first predictions, returns scalars by their tags."""
        result = self.score(model)
        if result.predictions:
            # Imported by the one rank that draws: matplotlib takes each half a second.
            from linclip_eval.figures import draw_predictions

            writer.figure(step, "eval/predictions", draw_predictions(result.predictions))
        return {"eval/zeroshot_top1": result.topk(1), "eval/zeroshot_top5": result.topk(5)}
