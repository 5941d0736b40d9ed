"""Zero-shot score of a held-out folder: opened once, then asked as often as wanted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor

from ds_linclip.data import labelled_batches, read_classes
from linclip_eval.figures import draw_predictions
from linclip_eval.zero_shot import ZeroShotResult, build_classifier, zero_shot

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
            ``classnames.txt``, ``zeroshot_classification_templates.txt``.
        image_size: side of the model's square images, in pixels.
        context_length: tokens of the model's text tower.
        batch_size: images per forward, per rank.
        device: where the model is.
        group: ranks that share out the samples and the prompts; None: this process alone.
        num_images: predictions drawn at each call.

    Raises:
        ValueError: when the folder misses a file or its files disagree.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        image_size: int,
        context_length: int,
        batch_size: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        num_images: int = 0,
    ) -> None:
        self.classnames, self.templates = read_classes(folder)
        self._folder = folder
        self._image_size = image_size
        self._batch_size = batch_size
        self._device = device
        self._group = group
        self._num_images = num_images
        self._tokenizer = open_clip.SimpleTokenizer(context_length=context_length)

    def score(self, model: _Encoders) -> ZeroShotResult:
        """Classify every held-out image; ``model`` is in eval mode, gradients are off."""
        rank, world_size = 0, 1
        if self._group is not None:
            rank, world_size = dist.get_rank(self._group), dist.get_world_size(self._group)
        classifier = build_classifier(
            model.encode_text,
            self.classnames,
            self.templates,
            tokenizer=self._tokenizer,
            device=self._device,
            group=self._group,
        )
        return zero_shot(
            model.encode_image,
            classifier,
            labelled_batches(
                self._folder,
                image_size=self._image_size,
                batch_size=self._batch_size,
                rank=rank,
                world_size=world_size,
            ),
            classnames=self.classnames,
            group=self._group,
            num_predictions=self._num_images,
        )

    def __call__(self, model: _Encoders, writer: _Writer, step: int) -> Mapping[str, float]:
        """Score during training: draws the first predictions, returns scalars by their tags."""
        result = self.score(model)
        if result.predictions:
            writer.figure(step, "eval/predictions", draw_predictions(result.predictions))
        return {"eval/zeroshot_top1": result.top1, "eval/zeroshot_top5": result.top5}
