"""A zero-shot task: images, their classes, and the prompts that name them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import open_clip
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_linclip.data import EvalTransform, LabelledData
from ds_linclip.process.consensus import from_first_rank, require_equal
from linclip_eval.zero_shot.class_lists import (
    ClassList,
    NamePolicy,
    imagenet_classes,
)
from linclip_eval.zero_shot.classifier import (
    ClassifierCache,
    Template,
    build_classifier,
    parse_template,
)
from linclip_eval.zero_shot.evaluate import ZeroShotResult, zero_shot

__all__ = ["Encoders", "ZeroShotTask"]

_TEMPLATES: dict[str, Sequence[Template]] = {
    "one": ("a photo of a {}.",),
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
}


class Encoders(Protocol):
    """What a task asks of a model."""

    def encode_image(self, images: Tensor) -> Tensor: ...
    def encode_text(self, texts: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ZeroShotTask:
    """What a model is asked.

    Attributes:
        data: Images, prepared for one model.
        classes: Of their labels.
        templates: Of the prompts.
    """

    data: LabelledData
    classes: ClassList
    templates: Sequence[Template]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        transform: EvalTransform,
        batch_size: int,
        num_workers: int = 0,
        classes: str | None = None,
        names: NamePolicy = "lemma",
        templates: str = "one",
        strict: bool = True,
    ) -> "ZeroShotTask":
        """The task that a folder of images is.

        Args:
            folder: See :class:`LabelledData`; in clip_benchmark's layout it names its classes and
                templates.
            transform: Image file to model input.
            batch_size: Images per forward, per rank.
            num_workers: Decoding processes, per rank.
            classes: Class list of :func:`imagenet_classes`, for a folder that names none.
            names: What prompts call these classes.
            templates: "one", "simple" (open_clip's 7), "openai" (its 80), or a file with a template
                a line.
            strict: Whether an unknown or empty class or an unreadable image is an error.

        Raises:
            ValueError: when folder, class list or templates cannot be read or do not fit.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1")
        given = imagenet_classes(classes, names) if classes else None
        data = LabelledData(
            folder,
            transform=transform,
            batch_size=batch_size,
            num_workers=num_workers,
            classes=given.ids if given else None,
            strict=strict,
        )
        if given is None:
            given = ClassList.of_names(str(folder), data.classnames)
            prompts: Sequence[Template] = data.templates
        else:
            prompts = _read_templates(templates)
        try:
            parsed = [parse_template(template) for template in prompts]
        except ValueError as error:
            raise ValueError(f"eval.data ({folder}): {error}") from error
        return cls(data=data, classes=given, templates=parsed)

    def score(
        self,
        model: Encoders,
        *,
        tokenizer: Callable[[list[str]], Tensor],
        device: torch.device,
        group: ProcessGroup | None = None,
        num_predictions: int = 0,
        keep_in: Path | None = None,
        fingerprint: str = "",
    ) -> ZeroShotResult:
        """Ask ``model``; every rank of ``group`` calls it together.

        Args:
            model: In eval mode; gradients are off.
            tokenizer: Prompts to token ids [B, L].
            device: Where the model is.
            group: Ranks that share the work.
            num_predictions: How many of this rank's first images to keep for display.
            keep_in: Folder for what is done, features of classes and finished batches, so that what
                was cut off goes on where it was; None: nothing is kept.
            fingerprint: Tells models apart there.

        Raises:
            ValueError: for an image that a strict task cannot read.
            OSError: when ``keep_in`` cannot be written.
        """
        classifier = build_classifier(
            model.encode_text,
            self.classes.texts,
            self.templates,
            tokenizer=tokenizer,
            device=device,
            group=group,
            cache=ClassifierCache(keep_in / "classifier", fingerprint) if keep_in else None,
        )
        require_equal(f"{fingerprint} {self.data.fingerprint}", "model and images", group)
        parts = None
        if keep_in is not None:
            # The same name only where every image would be given the same classes.
            digest = hashlib.sha256(classifier.cpu().numpy().tobytes())
            digest.update(f"{fingerprint} {self.data.version}".encode())
            parts = keep_in / "parts" / from_first_rank(lambda: digest.hexdigest()[:16], group)
        return zero_shot(
            model.encode_image,
            classifier,
            self.data,
            self.classes,
            group=group,
            parts=parts,
            num_predictions=num_predictions,
        )


def _read_templates(name: str) -> Sequence[Template]:
    if name in _TEMPLATES:
        return _TEMPLATES[name]
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--templates ({name}) must be {', '.join(_TEMPLATES)}, or a readable file"
        ) from error
    return [line for line in lines if line.strip()]
