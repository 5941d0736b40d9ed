"""A zero-shot task: images, their classes, and the prompts that name the classes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch.distributed import ProcessGroup

from ds_linclip.data import EvalTransform, LabelledData
from ds_linclip.process.consensus import from_first_rank, require_equal
from ds_linclip.process.text_files import read_list
from linclip_eval.protocols import Encoders, Tokenizer, unit_features
from linclip_eval.zero_shot.class_lists import ClassList, NamePolicy, imagenet_classes
from linclip_eval.zero_shot.classifier import Template, build_classifier, parse_template
from linclip_eval.zero_shot.evaluate import ZeroShotResult, zero_shot

__all__ = ["ZeroShotTask"]

_TEMPLATES: dict[str, Sequence[Template]] = {
    "one": ("a photo of a {}.",),
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
}


@dataclass(frozen=True, kw_only=True)
class ZeroShotTask:
    """A data set with its classes and prompts, ready to score models.

    ``classes`` are those that the labels of ``data`` index.
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
        max_bad_samples: int = 0,
    ) -> "ZeroShotTask":
        """Open a folder of images as a task.

        Args:
            folder: A folder in clip_benchmark's layout names its classes and templates itself.
            transform, batch_size, num_workers, strict, max_bad_samples: See :class:`LabelledData`.
            classes: A class list for :func:`imagenet_classes`, for a folder that names none.
            names: The names that prompts use for these classes.
            templates: "one", "simple" (open_clip's 7), "openai" (its 80), or a file with one
                template per line; used with ``classes`` only.

        Raises:
            ValueError: when folder, class list or templates cannot be read or do not match.
        """
        class_list = imagenet_classes(classes, names) if classes else None
        data = LabelledData(
            folder,
            transform=transform,
            batch_size=batch_size,
            num_workers=num_workers,
            classes=class_list.ids if class_list else None,
            strict=strict,
            max_bad_samples=max_bad_samples,
        )
        if class_list is None:
            class_list = ClassList.of_names(str(folder), data.classnames)
            prompts = _parse_templates(data.templates, f"eval.data ({folder}): templates")
        else:
            prompts = _parse_templates(_read_templates(templates), f"templates ({templates})")
        return cls(data=data, classes=class_list, templates=prompts)

    @torch.no_grad()
    def rehearse(self, model: Encoders, *, tokenizer: Tokenizer, device: torch.device) -> None:
        """Embed one class and one image, on a GPU a whole batch, to meet errors early.

        Raises:
            ValueError: when image and text features do not fit each other or are not finite, or an
                image cannot be read.
        """
        classifier = build_classifier(
            model.encode_text,
            self.classes.texts[:1],
            self.templates,
            tokenizer=tokenizer,
            device=device,
        )
        (batch,) = self.data.batches([0])
        images = batch.images if device.type == "cuda" else batch.images[:1]  # a CPU is slow
        if len(images) == 0:  # none of the first batch can be read, which the task may allow
            return
        features = unit_features(model.encode_image(images.to(device)), batch.keys[: len(images)])
        if features.shape[1] != len(classifier):
            raise ValueError(
                f"image features ({features.shape[1]}) must be as long as text features "
                f"({len(classifier)})"
            )

    def score(
        self,
        model: Encoders,
        *,
        tokenizer: Tokenizer,
        device: torch.device,
        group: ProcessGroup | None = None,
        num_predictions: int = 0,
        cache_dir: Path | None = None,
        fingerprint: str = "",
    ) -> ZeroShotResult:
        """Classify all images with a model, whose device is ``device``.

        Args:
            num_predictions: The number of this rank's first images to keep for display.
            cache_dir: A folder for class features and finished batches, from which an interrupted
                call resumes; None: nothing is kept.
            fingerprint: A text that identifies the model in ``cache_dir``.

        Raises:
            ValueError: on all ranks, when they hold different models or images, for an image that a
                task cannot read, or when ``cache_dir`` cannot be written.
        """
        classifier = build_classifier(
            model.encode_text,
            self.classes.texts,
            self.templates,
            tokenizer=tokenizer,
            device=device,
            group=group,
            cache_dir=cache_dir / "classifier" if cache_dir else None,
            fingerprint=fingerprint,
        )
        require_equal(f"{fingerprint} {self.data.fingerprint}", "model and images", group)
        parts_dir = None
        if cache_dir is not None:
            # The same name only when every image would be classified the same.
            digest = hashlib.sha256(classifier.cpu().numpy().tobytes())
            digest.update(f"{fingerprint} {self.data.version}".encode())
            parts_dir = (
                cache_dir / "parts" / from_first_rank(lambda: digest.hexdigest()[:16], group)
            )
        result = zero_shot(
            model.encode_image,
            classifier,
            self.data,
            self.classes,
            group=group,
            parts_dir=parts_dir,
            num_predictions=num_predictions,
        )
        self.data.require_readable(result.unreadable)
        return result


def _parse_templates(templates: Sequence[Template], source: str) -> Sequence[Template]:
    parsed = []
    for number, template in enumerate(templates, start=1):
        try:
            parsed.append(parse_template(template))
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from error
    return parsed


def _read_templates(name: str) -> Sequence[Template]:
    if name in _TEMPLATES:
        return _TEMPLATES[name]
    try:
        return read_list(Path(name))
    except ValueError as error:
        raise ValueError(
            f"templates ({name}) must be {', '.join(_TEMPLATES)}, or a readable file: {error}"
        ) from error
