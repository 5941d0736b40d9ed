"""Held-out folders: their forms and order, batches by number, and what is wrong with them."""

import io
import os
import resource
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform
from PIL import Image
from tar_files import write_tar

from ds_linclip.data import EvalTransform, LabelledBatch, LabelledData
from ds_linclip.data.make_shards import make_scenes

NUM_SAMPLES = 13
CAT, DOG, FISH = "n02121620", "n02084071", "n02512053"
CLASSES = [CAT, DOG, FISH]  # in another order than that of their names
FORMS = ("class_tars", "class_folders", "shards")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    make_scenes(out, num_shards=1, samples_per_shard=1, image_size=40, num_test=NUM_SAMPLES)
    return out / "test"


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
    """A tar of the samples s0, s1, ..., and clip_benchmark's files for two classes."""
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
    """The images (class, name, content) in one of the forms that take a list of classes."""
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
    """Images of all classes, in the order in which every form has them."""
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


def test_classes_and_templates(held_out: Path) -> None:
    data = open_data(held_out)
    assert len(data.classnames) == 48
    assert data.classnames[0] == "red circle"
    assert data.templates
    assert all("{c}" in template for template in data.templates)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 8)])
def test_batches_hold_what_lies_in_the_tar(held_out: Path, size: tuple[int, int]) -> None:
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


def test_batches_come_in_the_order_asked_for(held_out: Path) -> None:
    data = open_data(held_out, num_workers=2)
    assert [batch.number for batch in data.batches([3, 0, 2])] == [3, 0, 2]
    assert list(data.batches([])) == []
    with pytest.raises(ValueError, match=r"numbers \(4\) must be in \[0, 4\)"):
        list(data.batches([0, 4]))


def test_every_iteration_is_complete(held_out: Path) -> None:
    data = open_data(held_out)
    next(iter(data))  # one that is not read to its end
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
    assert batch.captions == ["a cat\nein Kätzchen"]


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
        "h.JPEG": "PNG",  # as some of ImageNet's
    }
    files = [(CAT, name, image(kind=kind)) for name, kind in kinds.items()]
    data = open_data(write_form(form, tmp_path / form, files), classes=[CAT])
    assert [Path(key).stem for key in keys_of(data)] == list("abcdefgh")


def test_hidden_files_are_not_looked_at(tmp_path: Path) -> None:
    folder = write_form("class_folders", tmp_path / "set", some_files())
    (folder / ".cache").mkdir()
    (folder / ".cache" / "0.jpg").write_bytes(image())
    (folder / CAT / f"._{CAT}_0.JPEG").write_bytes(b"of a Mac")
    assert open_data(folder, classes=CLASSES).num_samples == 9


def test_fingerprint_names_the_evaluation_set(tmp_path: Path) -> None:
    def of(name: str, files: Sequence[tuple[str, str, bytes]], **options: Any) -> str:
        folder = tmp_path / name
        if not folder.exists():
            write_form("shards", folder, files)
        return open_data(folder, classes=CLASSES, **options).fingerprint

    files = some_files()
    first = of("set", files)
    assert len(first) == 64
    assert of("set", files, num_workers=2) == first
    assert of("set", files, strict=False) != first
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


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"eval\.data \(.*\) must hold a readable classnames\.txt, or come with a list",
    ):
        open_data(tmp_path)
    (tmp_path / "classnames.txt").write_text("cat\n")
    templates = tmp_path / "zeroshot_classification_templates.txt"
    templates.write_text("\n")
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) .*_templates\.txt that is not empty"):
        open_data(tmp_path)
    templates.write_text("a {}\n")
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must be a folder with tars"):
        open_data(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"garbage" * 500)
    with pytest.raises(ValueError, match=r"at least one sample: .*shard_unreadable: 1 \(.*0\.tar"):
        open_data(tmp_path)
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must hold at least one sample$"):
        open_data(tmp_path)


def test_folder_of_no_known_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must be readable: .*No such file"):
        open_data(tmp_path / "nowhere", classes=CLASSES)
    (tmp_path / "0.jpg").write_bytes(image())
    with pytest.raises(
        ValueError, match=r"must be a folder with tars .*, or one with a folder of images for each"
    ):
        open_data(tmp_path, classes=CLASSES)
    (tmp_path / "val").mkdir()
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"eval\.data \(.*\) must hold at least one sample$"):
            open_data(tmp_path, classes=CLASSES, strict=strict)
    (tmp_path / "0.tar").mkdir()
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must be readable: .*Is a directory"):
        open_data(tmp_path, classes=CLASSES, strict=False)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"classes": []}, r"classes \(\[\]\) must hold at least one id"),
        ({"classes": [CAT, DOG, CAT]}, rf"classes \({CAT}\) must be named once each"),
        ({"classes": CLASSES, "batch_size": 0}, r"batch_size \(0\) must be at least 1"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    folder = write_form("shards", tmp_path / "set", some_files())
    with pytest.raises(ValueError, match=message):
        open_data(folder, **option)


@pytest.mark.parametrize("form", FORMS)
def test_unknown_classes(tmp_path: Path, form: str) -> None:
    files = [(class_id, f"{class_id}_{number}.jpg", image()) for class_id, number in [
        (CAT, 0), ("n00000001", 0), ("n00000001", 1), (DOG, 0), ("n00000002", 0)
    ]]  # fmt: skip
    folder = write_form(form, tmp_path / form, files)
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must hold whole samples") as caught:
        open_data(folder, classes=[CAT, DOG])
    message = str(caught.value)
    assert "not among the 2 of the list: 3 (n00000001: 2, n00000002: 1), first " in message
    assert "n00000001_0" in message
    data = open_data(folder, classes=[CAT, DOG], strict=False)
    assert data.findings.unknown_classes == {"n00000001": 2, "n00000002": 1}
    assert len(data.findings.describe()) == 1
    assert data.num_samples == 2
    assert sorted(labels_of(data)) == [0, 1]


def test_set_of_unknown_classes_alone_is_empty(tmp_path: Path) -> None:
    folder = write_form("class_tars", tmp_path / "set", some_files())
    with pytest.raises(ValueError, match=r"must hold at least one sample: .*not among the 1 of"):
        open_data(folder, classes=["n00000001"], strict=False)


@pytest.mark.parametrize("form", FORMS)
def test_classes_without_images(tmp_path: Path, form: str) -> None:
    folder = write_form(form, tmp_path / form, some_files())
    missing = [f"n0000000{number}" for number in range(4)]
    with pytest.raises(
        ValueError,
        match=r"classes without an image: 4 of 7 \(n00000000, n00000001, n00000002, \.\.\.\)",
    ):
        open_data(folder, classes=[*CLASSES, *missing])
    data = open_data(folder, classes=[*CLASSES, *missing], strict=False)
    assert data.findings.empty_classes == tuple(missing)
    assert data.num_samples == 9


def test_classnames_may_be_without_images(tmp_path: Path) -> None:
    write_folder(tmp_path, [sound_sample(b"1")])
    assert open_data(tmp_path).findings.empty_classes == ("cat",)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"cls": b"2"}, r"not among the 2 of the list: 1 \(2: 1\), first sample s2 of .*0\.tar"),
        ({"cls": b"-1"}, r"not among the 2 of the list: 1 \(-1: 1\), first sample s2 of"),
        ({"cls": b"cow\xff"}, r"not among the 2 of the list: 1 \(cow\ufffd: 1\), first sample s2"),
        ({"cls": b"1" * 33}, r"class_too_many_bytes: 1 \(sample s2 of .*0\.tar\)"),
        ({"cls": None}, r"class_missing: 1 \(sample s2 of .*0\.tar\)"),
        ({"jpg": None}, r"image_missing: 1 \(sample s2 of .*0\.tar\)"),
        ({"txt": b"a" * 2**17}, r"text_too_many_bytes: 1 \(sample s2 of .*0\.tar\)"),
    ],
)
def test_bad_sample_is_found_on_opening(
    tmp_path: Path, broken: dict[str, bytes | None], message: str
) -> None:
    parts: dict[str, bytes | None] = {**sound_sample(b"1"), **broken}
    present = {name: content for name, content in parts.items() if content is not None}
    write_folder(tmp_path, [sound_sample(), sound_sample(b"1"), present])
    with pytest.raises(ValueError, match=rf"eval\.data \(.*\) must hold whole samples.*{message}"):
        open_data(tmp_path)
    data = open_data(tmp_path, strict=False)
    (batch,) = data
    assert batch.keys == ["s0", "s1"]
    (cause,) = data.findings.problems or ["class_unknown"]
    # A sample that has a class stays in the denominator.
    counts = not cause.startswith("class")
    assert batch.unreadable == ([("s2", cause)] if counts else [])
    assert batch.unreadable_labels.tolist() == ([1] if counts else [])
    assert data.num_samples == 2 + counts


@pytest.mark.parametrize("strict", [True, False])
def test_broken_tars(tmp_path: Path, strict: bool) -> None:
    folder = write_form("class_tars", tmp_path / "set", some_files())
    (folder / f"{CAT}.tar").write_bytes(b"garbage" * 500)
    cut = folder / f"{FISH}.tar"
    with tarfile.open(cut) as tar:
        inside_second = tar.getmembers()[1].offset_data + 100
    os.truncate(cut, inside_second)
    if strict:
        message = rf"shard_unreadable: 1 \(.*{CAT}\.tar\); shard_cut: 1 \(.*{FISH}\.tar\)"
        with pytest.raises(ValueError, match=message):
            open_data(folder, classes=CLASSES)
        return
    data = open_data(folder, classes=CLASSES, strict=False)
    assert data.findings.problems == {
        "shard_unreadable": [str(folder / f"{CAT}.tar")],
        "shard_cut": [str(cut)],
    }
    assert data.findings.empty_classes == (CAT,)
    batches = list(data)
    assert labels_of(batches) == [1, 1, 1, 2]
    unreadable = [entry for batch in batches for entry in batch.unreadable]
    assert unreadable == [(f"{FISH}_1", "image_cut")]
    assert data.num_samples == 5


def test_other_files_beside_images_are_counted(tmp_path: Path) -> None:
    folder = write_form("class_folders", tmp_path / "set", some_files())
    (folder / CAT / "cat.bmp").write_bytes(image(kind="BMP"))
    (folder / CAT / "folder").mkdir()
    with pytest.raises(ValueError, match=r"image_extension: 1 \(image .*cat\.bmp\)"):
        open_data(folder, classes=CLASSES)
    data = open_data(folder, classes=CLASSES, strict=False)
    assert list(data.findings.problems) == ["image_extension"]
    assert data.num_samples == 9


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("broken", "cause"),
    [({"jpg": b"<html>"}, "image_undecodable"), ({"txt": b"\xff"}, "text_not_utf8")],
)
def test_undecodable_sample_is_an_error_of_the_iteration(
    tmp_path: Path, num_workers: int, broken: dict[str, bytes], cause: str
) -> None:
    write_folder(tmp_path, [sound_sample(), sound_sample() | broken])
    data = open_data(tmp_path, num_workers=num_workers)
    with pytest.raises(
        ValueError, match=rf"sample s1 of .*0\.tar must be readable: {cause}"
    ) as caught:
        list(data)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(("form", "num_workers"), [*((form, 0) for form in FORMS), (FORMS[0], 2)])
def test_undecodable_images_stay_in_the_count(tmp_path: Path, form: str, num_workers: int) -> None:
    files = some_files()
    broken = [1, 4, 5, 6, 7, 8]
    for number in broken:
        files[number] = (*files[number][:2], b"<html>")
    folder = write_form(form, tmp_path / form, files)
    data = open_data(folder, classes=CLASSES, num_workers=num_workers, strict=False)
    batches = list(data)
    assert [len(batch.labels) for batch in batches] == [3, 0, 0]
    assert [len(batch.unreadable_labels) for batch in batches] == [1, 4, 1]
    assert batches[1].images.shape[:2] == (0, 3)
    assert batches[0].images.shape == (3, 3, 16, 16)
    labels = [label for batch in batches for label in batch.unreadable_labels.tolist()]
    assert labels == [CLASSES.index(files[number][0]) for number in broken]
    assert {cause for batch in batches for _, cause in batch.unreadable} == {"image_undecodable"}
    names = [Path(key).stem for batch in batches for key, _ in batch.unreadable]
    assert names == [Path(files[number][1]).stem for number in broken]
    assert sum(len(batch.labels) + len(batch.unreadable_labels) for batch in batches) == 9


@pytest.mark.parametrize("form", FORMS)
def test_change_after_opening_is_an_error_even_if_not_strict(tmp_path: Path, form: str) -> None:
    folder = write_form(form, tmp_path / form, some_files())
    data = open_data(folder, classes=CLASSES, strict=False)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if form == "class_folders":
            path.unlink()
        else:
            write_tar(path, [("other.jpg", bytes(100_000))])
    cause = "No such file" if form == "class_folders" else "has changed since it was opened"
    with pytest.raises(ValueError, match=rf"eval\.data \(.*\): .* must be readable: .*{cause}"):
        list(data)


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
def test_version_tells_images_of_the_same_names_apart(tmp_path: Path, form: str) -> None:
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
