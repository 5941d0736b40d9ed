"""Held-out folders: their defects are errors, or counted."""

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ds_linclip.data import describe_unreadable
from helpers.labelled_folders import (
    CAT,
    CLASSES,
    DOG,
    FISH,
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


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"eval\.data \(.*\) must hold a readable classnames\.txt, or come with a list",
    ):
        open_data(tmp_path)
    (tmp_path / "classnames.txt").write_text("cat\n")
    templates = tmp_path / "zeroshot_classification_templates.txt"
    templates.write_text("\n")
    with pytest.raises(ValueError, match=r"eval\.data \(.*\): .*_templates\.txt must not be empty"):
        open_data(tmp_path)
    templates.write_text("a {}\n")
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must be a folder with tars"):
        open_data(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"garbage" * 500)
    with pytest.raises(ValueError, match=r"at least one sample: .*shard_unreadable: 1 \(.*0\.tar"):
        open_data(tmp_path)
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    with pytest.raises(
        ValueError, match=r"must hold at least one sample: .*shard_empty \(.*0\.tar"
    ):
        open_data(tmp_path)


def test_folder_of_unknown_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must be a folder .* there is none"):
        open_data(tmp_path / "nowhere", classes=CLASSES)
    (tmp_path / "0.jpg").write_bytes(image())
    with pytest.raises(
        ValueError, match=r"must be a folder with tars .*, or one with a folder of images for each"
    ):
        open_data(tmp_path, classes=CLASSES)
    (tmp_path / "0.jpg").unlink()
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


def test_names_that_no_terminal_shows_are_escaped(tmp_path: Path) -> None:
    files = [(CAT, "\x1b\n\udcff.jpg", b"<html>"), (CAT, "\r.bmp", b""), ("\x1b\n", "0.jpg", b"")]
    folder = write_form("class_folders", tmp_path / "set", files)
    data = open_data(folder, classes=[CAT], strict=False)
    (batch,) = data
    lines = [*data.findings.describe(), describe_unreadable(batch.unreadable)]
    assert len(lines) == 3
    assert "".join(lines).isprintable()
    assert r"\x1b\n\udcff.jpg" in lines[2]
    write_folder(tmp_path, [sound_sample(), sound_sample(b"a\n\x1bb")])
    with pytest.raises(ValueError, match=r"\(a\\n\\x1bb: 1\)"):
        open_data(tmp_path)


def test_set_of_only_unknown_classes_is_empty(tmp_path: Path) -> None:
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
def test_bad_sample_is_found_when_opening(
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
    # A sample that has a class stays in the denominator.
    counts = "cls" not in broken
    assert batch.unreadable == list(data.findings.unreadable)
    assert [image.key for image in batch.unreadable] == (["s2"] if counts else [])
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
        message = rf"shard_unreadable: 1 \(.*{CAT}\.tar\); shard_cut \(.*\): 1 \(.*{FISH}\.tar\)"
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
    assert unreadable == [(f"{FISH}_1", "image_cut", f"sample {FISH}_1 of {cut}")]
    assert data.num_samples == 5


@pytest.mark.parametrize("form", ["class_tars", "shards"])
def test_what_tars_hold_beside_samples_is_told(tmp_path: Path, form: str) -> None:
    files = [
        (class_id, name, content)
        for class_id, stem, content in [(c, n.removesuffix(".JPEG"), i) for c, n, i in some_files()]
        for name, content in (
            *((f"._{stem}.JPEG", b"-"), (f"{stem}.JPEG", content)),
            (f"{stem}.seg.png", image(kind="PNG")),
        )
    ]
    folder = write_form("class_tars", tmp_path / form, files)
    if form == "shards":  # as class numbers
        members = []
        for class_id in sorted(CLASSES):
            with tarfile.open(folder / f"{class_id}.tar") as tar:
                for member in tar:
                    members.append((member.name, tar.extractfile(member).read()))  # type: ignore[union-attr]
                    if member.name.endswith("png"):
                        label = str(CLASSES.index(class_id)).encode()
                        members.append((member.name.replace(".seg.png", ".cls"), label))
            (folder / f"{class_id}.tar").unlink()
        write_tar(folder / "0.tar", members)
    data = open_data(folder, classes=CLASSES)
    assert keys_of(data) == [name.removesuffix(".JPEG") for _, name, _ in some_files()]
    assert len(labels_of(data)) == 9
    lines = data.findings.describe()
    assert [line.partition(" (")[0] for line in lines] == [
        "passed over: member_hidden",
        "passed over: member_surplus",
    ]
    assert lines[1].endswith(f": 9 ({DOG}_0.seg.png of {sorted(folder.iterdir())[0]}, ...)")


def test_members_of_a_sample_that_are_apart_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, [])
    members = [(f"{i}.jpg", image()) for i in range(3)] + [(f"{i}.cls", b"0") for i in range(3)]
    write_tar(tmp_path / "0.tar", members)
    message = (
        r"members_apart \(members of a sample must stand together in the tar, .*\): 3 \(sample 0 of"
    )
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path)
    with pytest.raises(ValueError, match=message):  # no sample is left
        open_data(tmp_path, strict=False)


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
    unreadable = [image for batch in batches for image in batch.unreadable]
    assert {image.cause for image in unreadable} == {"image_undecodable"}
    names = [Path(image.key).stem for image in unreadable]
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


def test_some_images_may_be_unreadable(tmp_path: Path) -> None:
    samples = [sound_sample(), sound_sample() | {"jpg": b"<html>"}, {"cls": b"1"}]
    write_folder(tmp_path, [*samples, *(sound_sample(b"1") for _ in range(3))])
    with pytest.raises(
        ValueError, match=r"must hold whole samples.*image_missing: 1 \(sample s2 of"
    ):
        open_data(tmp_path)
    data = open_data(tmp_path, batch_size=1, max_bad_samples=1)
    with pytest.raises(
        ValueError,
        match=r"sample s1 of .*0\.tar must be readable: image_undecodable; max_bad_samples is 1, "
        r"found image_missing: 1 \(sample s2 .*\); image_undecodable: 1 \(sample s1 .*\)$",
    ):
        list(data)
    apart = [image for n in range(6) for batch in data.batches([n]) for image in batch.unreadable]
    with pytest.raises(ValueError, match=r"max_bad_samples is 1"):
        data.require_readable(apart)  # the sum over ranks, of which none has too many
    data = open_data(tmp_path, max_bad_samples=2)
    batches = list(data)
    assert [image.key for batch in batches for image in batch.unreadable] == ["s1", "s2"]
    assert labels_of(batches) == [0, 1, 1, 1]
    assert data.num_samples == 6


@pytest.mark.parametrize("label", [b"1_0", b"+1", b"-1", b"1.0", b"0x1", "\uff11".encode()])
def test_class_number_has_digits_only(tmp_path: Path, label: bytes) -> None:
    write_folder(tmp_path, [sound_sample(), sound_sample(label)])
    (tmp_path / "classnames.txt").write_text("x\n" * 20)
    with pytest.raises(ValueError, match=r"not among the 20 of the list: 1 .*first sample s1 of"):
        open_data(tmp_path)


def test_class_number_may_have_a_mark_and_spaces(tmp_path: Path) -> None:
    write_folder(tmp_path, [sound_sample(b"\xef\xbb\xbf1\r\n"), sound_sample(b" 001 ")])
    assert labels_of(open_data(tmp_path)) == [1, 1]


def test_class_names_keep_their_numbers(tmp_path: Path) -> None:
    write_folder(tmp_path, [sound_sample(), sound_sample(b"1")])
    names = tmp_path / "classnames.txt"
    names.write_bytes("\ufeffc\x85t\r\ndo\x1cg\r\n\r\n".encode())
    assert open_data(tmp_path).classnames == ["c\x85t", "do\x1cg"]
    names.write_text("cat\n\ndog\n")
    with pytest.raises(
        ValueError, match=r"eval\.data \(.*\): line 2 of .*classnames\.txt must not"
    ):
        open_data(tmp_path)
