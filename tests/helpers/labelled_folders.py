"""Held-out folders in every form, for tests."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from open_clip.transform import PreprocessCfg
from PIL import Image

from ds_linclip.data import EvalTransform, LabelledBatch, LabelledData
from helpers.tar_files import write_tar

CAT, DOG, FISH = "n02121620", "n02084071", "n02512053"
CLASSES = [CAT, DOG, FISH]  # not sorted by id
FORMS = ("class_tars", "class_folders", "shards")


def open_data(folder: Path, image_size: tuple[int, int] = (16, 16), **options: Any) -> LabelledData:
    arguments = {"batch_size": 4} | options
    return LabelledData(
        folder, transform=EvalTransform(PreprocessCfg(size=image_size)), **arguments
    )


def image(grey: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (grey, grey, grey)).save(buffer, kind)
    return buffer.getvalue()


def write_folder(
    folder: Path, samples: Iterable[dict[str, bytes]], *, with_names: bool = True
) -> None:
    """Write a tar of the samples s0, s1, ..., and clip_benchmark's files for two classes."""
    if with_names:
        (folder / "classnames.txt").write_text("cat\ndog\n")
        (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    members = [
        (f"s{number}.{extension}", content)
        for number, parts in enumerate(samples)
        for extension, content in parts.items()
    ]
    write_tar(folder / "0.tar", members)


def sound_sample(label: bytes = b"0") -> dict[str, bytes]:
    return {"jpg": image(), "cls": label}


def write_form(
    form: str, folder: Path, files: Sequence[tuple[str, str, bytes]], *, as_numbers: bool = True
) -> Path:
    """Write images (class, name, content) in one of the forms that take a list of classes."""
    folder.mkdir()
    if form == "shards":
        members = []
        for class_id, name, content in files:
            known = as_numbers and class_id in CLASSES
            label = str(CLASSES.index(class_id)) if known else class_id
            members += [(name, content), (f"{Path(name).stem}.cls", label.encode())]
        write_tar(folder / "val-00.tar", members)
    for class_id in {class_id for class_id, _, _ in files}:
        own = [(name, content) for other, name, content in files if other == class_id]
        if form == "class_tars":
            write_tar(folder / f"{class_id}.tar", own)
        elif form == "class_folders":
            (folder / class_id).mkdir()
            for name, content in own:
                (folder / class_id / name).write_bytes(content)
    return folder


def some_files(per_class: int = 3) -> list[tuple[str, str, bytes]]:
    """Return images of all classes, in the order that every form has."""
    ids = sorted(CLASSES)
    return [
        (class_id, f"{class_id}_{number}.JPEG", image(30 * (i * per_class + number)))
        for i, class_id in enumerate(ids)
        for number in range(per_class)
    ]


def labels_of(batches: Iterable[LabelledBatch]) -> list[int]:
    return [label for batch in batches for label in batch.labels.tolist()]


def keys_of(batches: Iterable[LabelledBatch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]
