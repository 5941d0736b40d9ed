"""Held-out folders: their forms, their order and their batches."""

import io
import os
import resource
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform
from PIL import Image

from ds_linclip.data import EvalTransform, LabelledBatch
from ds_linclip.data.prepare.make_shards import make_scenes
from helpers.labelled_folders import (
    CAT,
    CLASSES,
    FORMS,
    image,
    keys_of,
    labels_of,
    open_data,
    some_files,
    sound_sample,
    write_folder,
    write_form,
)
from helpers.tar_files import write_tar

NUM_SAMPLES = 13


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    make_scenes(out, num_shards=1, samples_per_shard=1, image_size=40, num_test=NUM_SAMPLES)
    return out / "test"


def test_classes_and_templates(held_out: Path) -> None:
    data = open_data(held_out)
    assert len(data.classnames) == 48
    assert data.classnames[0] == "red circle"
    assert data.templates
    assert all("{c}" in template for template in data.templates)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 8)])
def test_batches_hold_the_content_of_the_tar(held_out: Path, size: tuple[int, int]) -> None:
    data = open_data(held_out, size)
    batches = list(data)
    assert (data.num_samples, data.num_batches) == (NUM_SAMPLES, 4)
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 1]
    assert [batch.number for batch in batches] == [0, 1, 2, 3]
    assert batches[0].images.shape == (4, 3, *size)
    transform = image_transform(16 if size == (16, 16) else size, is_train=False)
    images, labels, captions = [], [], []
    with tarfile.open(held_out / "test" / "0.tar") as tar:
        for member in tar:
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".jpg"):
                images.append(transform(Image.open(io.BytesIO(content))))
            elif member.name.endswith(".cls"):
                labels.append(int(content))
            elif member.name.endswith(".txt"):
                captions.append(content.decode())
    assert torch.equal(torch.cat([batch.images for batch in batches]), torch.stack(images))
    assert labels_of(batches) == labels
    assert [caption for batch in batches for caption in batch.captions] == captions
    assert batches[0].labels.dtype == torch.int64


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (3, 0), (20, 0), (2, 2)])
def test_a_batch_is_the_same_on_any_number_of_ranks(
    held_out: Path, world_size: int, num_workers: int
) -> None:
    data = open_data(held_out, num_workers=num_workers)
    alone = {batch.number: batch for batch in open_data(held_out)}
    shared: dict[int, LabelledBatch] = {}
    for rank in range(world_size):
        numbers = range(data.num_batches)[rank::world_size]
        batches = list(data.batches(numbers))
        assert [batch.number for batch in batches] == list(numbers)
        shared |= {batch.number: batch for batch in batches}
    assert sorted(shared) == sorted(alone)
    for number, batch in alone.items():
        assert shared[number].keys == batch.keys
        assert torch.equal(shared[number].images, batch.images)
        assert torch.equal(shared[number].labels, batch.labels)


def test_batches_are_in_the_given_order(held_out: Path) -> None:
    data = open_data(held_out, num_workers=2)
    assert [batch.number for batch in data.batches([3, 0, 2])] == [3, 0, 2]
    assert list(data.batches([])) == []
    with pytest.raises(ValueError, match=r"numbers \(4\) must be in \[0, 4\)"):
        list(data.batches([0, 4]))


def test_every_iteration_is_complete(held_out: Path) -> None:
    data = open_data(held_out)
    next(iter(data))  # an unfinished iteration
    rounds = [[(b.keys, b.labels.tolist()) for b in data] for _ in range(2)]
    assert rounds[0] == rounds[1]
    assert sum(len(keys) for keys, _ in rounds[0]) == NUM_SAMPLES


def test_flat_folder_is_read_too(held_out: Path, tmp_path: Path) -> None:
    for file in [*held_out.glob("*.txt"), held_out / "test" / "0.tar"]:
        shutil.copy(file, tmp_path)
    assert keys_of(open_data(tmp_path)) == keys_of(open_data(held_out))


def test_a_caption_keeps_its_lines(tmp_path: Path) -> None:
    write_folder(tmp_path, [sound_sample() | {"txt": "a cat\nein Kätzchen\n".encode()}])
    (batch,) = open_data(tmp_path)
    assert batch.captions == ["a cat\nein Kätzchen\n"]


@pytest.mark.parametrize(("form", "num_workers"), [*((form, 0) for form in FORMS), (FORMS[0], 2)])
def test_forms_with_a_list_of_classes(tmp_path: Path, form: str, num_workers: int) -> None:
    files = some_files()
    folder = write_form(form, tmp_path / form, files)
    data = open_data(folder, classes=CLASSES, num_workers=num_workers)
    batches = list(data)
    assert data.classnames == CLASSES
    assert data.templates == []
    assert data.findings.describe() == []
    assert labels_of(batches) == [CLASSES.index(class_id) for class_id, _, _ in files]
    assert [Path(key).stem for key in keys_of(batches)] == [Path(name).stem for _, name, _ in files]
    transform = EvalTransform(PreprocessCfg(size=(16, 16)))
    expected = torch.stack([transform(content) for _, _, content in files])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)


def test_shards_may_name_classes_by_id(tmp_path: Path) -> None:
    files = some_files()[::-1]  # shards have an order of their own
    folder = write_form("shards", tmp_path / "ids", files, as_numbers=False)
    batches = list(open_data(folder, classes=CLASSES))
    assert labels_of(batches) == [CLASSES.index(class_id) for class_id, _, _ in files]


def test_a_cls_tells_more_than_the_name_of_the_tar(tmp_path: Path) -> None:
    write_folder(tmp_path, [sound_sample(b"2"), sound_sample(b"1")], with_names=False)
    assert labels_of(open_data(tmp_path, classes=["0", "2", "1"], strict=False)) == [1, 2]


@pytest.mark.parametrize("form", FORMS)
def test_formats_and_extensions(tmp_path: Path, form: str) -> None:
    kinds = {
        "a.jpg": "JPEG",
        "b.JPEG": "JPEG",
        "c.Jpg": "JPEG",
        "d.png": "PNG",
        "e.PNG": "PNG",
        "f.webp": "WEBP",
        "g.GIF": "GIF",
        "h.JPEG": "PNG",  # like some files of ImageNet
    }
    files = [(CAT, name, image(kind=kind)) for name, kind in kinds.items()]
    data = open_data(write_form(form, tmp_path / form, files), classes=[CAT])
    assert [Path(key).stem for key in keys_of(data)] == list("abcdefgh")


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    folder = write_form("class_folders", tmp_path / "set", some_files())
    (folder / ".cache").mkdir()
    (folder / ".cache" / "0.jpg").write_bytes(image())
    (folder / CAT / f"._{CAT}_0.JPEG").write_bytes(b"of a Mac")
    assert open_data(folder, classes=CLASSES).num_samples == 9


def test_fingerprint_identifies_the_evaluation_set(tmp_path: Path) -> None:
    def of(name: str, files: Sequence[tuple[str, str, bytes]], **options: Any) -> str:
        folder = tmp_path / name
        if not folder.exists():
            write_form("shards", folder, files)
        return open_data(folder, classes=CLASSES, **options).fingerprint

    files = some_files()
    first = of("set", files)
    assert len(first) == 64
    assert of("set", files, num_workers=2) == first
    assert of("set", files, image_size=(8, 8)) != first
    assert of("copy", files) == first
    changed = {
        first,
        of("set", files, batch_size=5),
        of("other_order", [*files[1:], files[0]]),
        of("other_label", [(CAT, *files[0][1:]), *files[1:]]),
        of("other_key", [(files[0][0], "other.jpg", files[0][2]), *files[1:]]),
        of("longer", [*files, (CAT, "one_more.jpg", image())]),
    }
    assert len(changed) == 6


def test_more_tars_than_files_may_be_open(tmp_path: Path) -> None:
    classes = [f"n{number:08}" for number in range(60)]
    files = [(class_id, f"{class_id}_0.jpg", image()) for class_id in classes]
    folder = write_form("class_tars", tmp_path / "set", files)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 30, hard))
        data = open_data(folder, classes=classes)
        assert labels_of(data) == list(range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_captions_need_no_classes(tmp_path):
    samples = [
        {"jpg": image(grey), "txt": f"grey {grey}\nlevel {grey}".encode()} for grey in (1, 2)
    ]
    write_folder(tmp_path, samples, with_names=False)
    data = open_data(tmp_path, needs_classes=False)
    (batch,) = data
    assert batch.captions == ["grey 1\nlevel 1", "grey 2\nlevel 2"]
    assert batch.labels.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"must hold a readable classnames\.txt"):
        open_data(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_version_differs_for_other_images_with_the_same_names(tmp_path: Path, form: str) -> None:
    files = some_files()
    for name, grey in (("dark", 1), ("light", 200)):
        write_form(form, tmp_path / name, [(c, key, image(grey)) for c, key, _ in files])
    dark, light = (open_data(tmp_path / name, classes=CLASSES) for name in ("dark", "light"))
    assert dark.fingerprint == light.fingerprint
    assert dark.version != light.version
    assert open_data(tmp_path / "dark", classes=CLASSES).version == dark.version
    changed = next(path for path in sorted((tmp_path / "dark").rglob("*.*")) if path.is_file())
    os.utime(changed, ns=(0, 0))
    assert open_data(tmp_path / "dark", classes=CLASSES).version != dark.version


def test_split_is_preferred(held_out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(held_out, folder)
    assert open_data(folder, split="train").num_samples == NUM_SAMPLES
    (folder / "train").mkdir()
    write_tar(folder / "train" / "0.tar", [("a.jpg", image()), ("a.cls", b"1")])
    assert open_data(folder, split="train").num_samples == 1
    assert open_data(folder).num_samples == NUM_SAMPLES
