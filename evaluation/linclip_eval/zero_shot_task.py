"""A zero-shot task: images, their classes, and the prompts that name them."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import open_clip
from torch.distributed import ProcessGroup

from ds_linclip.data import LabelledData
from linclip_eval.class_lists import IMAGENET_LISTS, ClassList, NamePolicy, imagenet_classes
from linclip_eval.classifier import ClassifierCache, Template, build_classifier
from linclip_eval.models import EvalModel
from linclip_eval.zero_shot import ZeroShotResult, zero_shot

__all__ = ["ZeroShotTask", "add_task_arguments"]

_TEMPLATES: dict[str, Sequence[Template]] = {
    "one": ("a photo of a {}.",),
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
}


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
        cls, options: argparse.Namespace, folder: str | Path, model: EvalModel
    ) -> "ZeroShotTask":
        """The task of a folder and of what :func:`add_task_arguments` added.

        Raises:
            ValueError: when folder, class list or templates cannot be read or do not fit.
        """
        if options.batch_size < 1:
            raise ValueError(f"--batch-size ({options.batch_size}) must be at least 1")
        classes = options.classes and imagenet_classes(options.classes, options.names)
        data = LabelledData(
            folder,
            transform=model.transform,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            classes=classes.ids if classes else None,
            strict=not options.lenient,
        )
        if classes is None:
            own = ClassList.of_names(str(folder), data.classnames)
            return cls(data=data, classes=own, templates=data.templates)
        return cls(data=data, classes=classes, templates=_read_templates(options.templates))

    def score(
        self, model: EvalModel, folder: Path, *, group: ProcessGroup | None = None
    ) -> ZeroShotResult:
        """Ask ``model``; every rank of ``group`` calls it together.

        Args:
            model: The one that the data were prepared for.
            folder: Where features of classes and finished parts are kept, so that what was cut off
                goes on where it was.
            group: Ranks that share the work.

        Raises:
            ValueError: for an image that a strict task cannot read.
            OSError: when ``folder`` cannot be written.
        """
        classifier = build_classifier(
            model.encode_text,
            self.classes.texts,
            self.templates,
            tokenizer=model.tokenizer,
            device=model.device,
            group=group,
            cache=ClassifierCache(folder / "classifier", model.fingerprint),
        )
        # Equal only where every image would be given the same classes.
        digest = hashlib.sha256(classifier.cpu().numpy().tobytes())
        digest.update(f"{model.fingerprint} {model.image_size} {self.data.fingerprint}".encode())
        parts = folder / "parts" / digest.hexdigest()[:16]
        return zero_shot(
            model.encode_image, classifier, self.data, self.classes, group=group, parts=parts
        )


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how images are read and classes are named."""
    parser.add_argument(
        "--classes",
        help=f"{', '.join(IMAGENET_LISTS)}, or a file with a synset a line; without it the data "
        "must be in clip_benchmark's layout and name their classes and templates",
    )
    parser.add_argument("--names", choices=get_args(NamePolicy), default="lemma")
    parser.add_argument(
        "--templates",
        default="one",
        help="one (a photo of a {}.), simple (open_clip's 7), openai (its 80), or a file with a "
        "template a line",
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images, per process")
    parser.add_argument("--num-workers", type=int, default=2, help="decoding, per process")
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="go on in spite of unknown or empty classes and images that cannot be read; they are "
        "counted, and such images count as wrong",
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
