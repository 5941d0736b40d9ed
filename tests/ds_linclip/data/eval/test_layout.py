"""Where the tars and folders of a held-out set lie, and how many it promises."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_linclip.data.eval.layout import find_parts
from helpers.labelled_folders import (
    CAT,
    CLASSES,
    DOG,
    image,
    keys_of,
    open_data,
    some_files,
    sound_sample,
    write_folder,
    write_form,
)


def write_tars(folder: Path, *names: str) -> Path:
    """Write clip_benchmark's files for two classes, and the same tar under several names."""
    folder.mkdir()
    write_folder(folder, [sound_sample(), sound_sample(b"1")])
    content = (folder / "0.tar").read_bytes()
    (folder / "0.tar").unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("names", "promised", "message"),
    [
        (["test/0.tar"], b"2\n", r"shard_count: 1 \(.*/test promises 2 tars and has 1\)"),
        (["test/0.tar", "test/1.tar"], b"1", r"shard_count: 1 \(.*/test promises 1 tars and has 2"),
        (["test/0.tar", "test/2.tar"], None, r"shard_missing: 1 \(.*/test/1\.tar\)"),
        (["test/0.tar", "test/2.tar"], b"2", r"shard_missing: 1 \(.*/test/1\.tar\)"),
        (["val-01.tar", "val-04.tar"], None, r"shard_missing: 2 \(.*/val-02\.tar, .*val-03\.tar\)"),
        (["0-of-2.tar"], None, r"shard_count: 1 \(.* promises 2 tars and has 1\)"),
        (["test/0.tar", "test/00.tar"], None, r"shard_repeated: 1 \(.*/0\.tar and 00\.tar\)"),
        (["0.tar", "0 (1).tar"], None, r"shard_repeated: 1 \(.*/0\.tar and 0 \(1\)\.tar\)"),
        (["a.tar", "a - Copy.tar"], None, r"shard_repeated: 1 \(.*/a\.tar and a - Copy\.tar\)"),
        (["0.tar", "0 copy 2.tar"], None, r"shard_repeated: 1 \(.*/0\.tar and 0 copy 2\.tar\)"),
        (["0.tar", "1.tar.gz"], None, r"shard_extension: 1 \(.*/1\.tar\.gz\)"),
        (["0.tar", "1.tar.part"], None, r"shard_extension: 1 \(.*/1\.tar\.part\)"),
    ],
)
def test_missing_tars_are_errors_or_counted(tmp_path, names, promised, message):
    folder = write_tars(tmp_path / "set", *names)
    if promised is not None:
        (folder / names[0]).with_name("nshards.txt").write_bytes(promised)
    with pytest.raises(ValueError, match=rf"eval\.data \(.*\) must hold whole samples.*{message}"):
        open_data(folder)
    data = open_data(folder, strict=False)
    (line,) = data.findings.describe()
    assert line.startswith(message.split(":")[0])


@pytest.mark.parametrize(
    ("names", "promised"),
    [
        (["test/0.tar", "test/1.tar"], b"\xef\xbb\xbf2\r\n\r\n"),
        (["test/0.tar"], "1\n".encode("utf-16")),
        (["test/0.TAR"], b"01"),
        (["00331.tar"], None),  # one shard of many
        (["20240131.tar", "20240630.tar"], None),  # dates are no sequence
        (["cats.tar", "dogs.tar"], None),
        (["1.tar", "2.tar"], b"2"),
        (["val-0-of-2.tar", "val-1-of-2.tar"], None),
        (["0.tar", "0.tar.md5", "1_stats.json"], None),
    ],
)
def test_whole_sets_are_read(tmp_path, names, promised):
    folder = write_tars(tmp_path / "set", *names)
    if promised is not None:
        (folder / names[0]).with_name("nshards.txt").write_bytes(promised)
    data = open_data(folder)
    assert data.num_samples == 2 * sum(name.lower().endswith(".tar") for name in names)
    assert data.findings.describe() == []


@pytest.mark.parametrize(
    "content", [b"", b"two", b"-1", b"1.0", b"1 2", b"1_0", b"\xff", b"9" * 20]
)
def test_unreadable_number_of_tars_is_an_error(tmp_path, content):
    folder = write_tars(tmp_path / "set", "test/0.tar")
    (folder / "test" / "nshards.txt").write_bytes(content)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"eval\.data \(.*\): .*nshards\.txt.* must "):
            open_data(folder, strict=strict)


@given(
    present=st.sets(st.integers(0, 12), min_size=1),
    width=st.integers(1, 3),
    has_count=st.booleans(),
)
def test_every_gap_is_found(tmp_path_factory, present, width, has_count):
    place = tmp_path_factory.getbasetemp() / "numbered" / "test"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for number in present:
        (place / f"{number:0{width}}.tar").touch()
    total = max(present) + 1
    if has_count:
        (place / "nshards.txt").write_text(f"{total}\n")
    layout = find_parts(place.parent, {}, "test")
    assert [int(path.stem) for path in layout.tars] == sorted(present)
    missing = [f"{place}/{n:0{width}}.tar" for n in range(total) if n not in present]
    found = layout.problems.get("shard_missing", [])
    if min(present) <= 1:
        assert found == [name for name in missing if int(Path(name).stem) > min(present)]
    assert ("shard_count" in layout.problems) == (has_count and bool(missing))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.tar", "test/0.tar"], r"in one place: there are tars in it and images in .*/test$"),
        (["train-0.tar", "val-0.tar"], r"of one split, not val-0\.tar and train-0\.tar"),
        (["val/0.tar"], r"must be a folder with tars .*; there is .*/val/0\.tar$"),
        (["test/0.tar.gz"], r"must be a folder with tars .*; there is .*/test/0\.tar\.gz$"),
        (["0.tgz"], r"must be a folder with tars .*; .*/0\.tgz is compressed or unfinished$"),
        (["train/0.txt", "test/0.tar"], r"/train must hold tars; it has none$"),
    ],
)
def test_other_places_are_named(tmp_path, names, message):
    folder = write_tars(tmp_path / "set", *names)
    with pytest.raises(ValueError, match=rf"^eval\.data \(.*\).*{message}"):
        open_data(folder, split="train" if "train/0.txt" in names else "test", strict=False)


@pytest.mark.parametrize("name", ["00000_stats.json", "sizes.json"])
def test_fewer_samples_than_promised(tmp_path, name):
    folder = write_tars(tmp_path / "set", "test/00000.tar")
    key = "successes" if "stats" in name else "00000.tar"
    path = folder / "test" / name
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({key: 2}).encode())
    assert open_data(folder).num_samples == 2
    path.write_text(json.dumps({key: 3}))
    with pytest.raises(ValueError, match=r"shard_short: 1 \(.*/00000\.tar: 2 of 3 samples\)"):
        open_data(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=rf"eval\.data \(.*\): .*{name} must be readable JSON"):
        open_data(folder)


def test_data_must_be_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"eval\.data \(.*/no\) must be a folder .* there is none"):
        open_data(tmp_path / "no")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"eval\.data \(.*/file\) must be .*; it is a file"):
        open_data(tmp_path / "file", needs_classes=False)


def test_images_below_a_class_folder_belong_to_it(tmp_path):
    """Tiny ImageNet has n02121620/images/n02121620_0.JPEG and n02121620/n02121620_boxes.txt."""
    folder = write_form("class_folders", tmp_path / "set", some_files())
    flat = keys_of(open_data(folder, classes=CLASSES))
    for name in CLASSES:
        files = list((folder / name).iterdir())
        (folder / name / "images").mkdir()
        for file in files:
            file.rename(folder / name / "images" / file.name)
        (folder / name / f"{name}_boxes.txt").write_text("0 0 8 8")
    data = open_data(folder, classes=CLASSES)
    assert [key.replace("/images/", "/") for key in keys_of(data)] == flat
    (line,) = data.findings.describe()
    assert line.startswith(f"passed over: not_an_image: 3 ({min(CLASSES)}/")


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder = write_form("class_folders", tmp_path / "set", some_files())
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in CLASSES:
        os.symlink(folder / name, linked / name)
    os.symlink(folder, folder / CAT / "circle")
    os.symlink("self", folder / CAT / "self")
    for name in (".DS_Store", ".hidden/0.jpg", "@eaDir/0.jpg/thumbnail.jpg"):
        (folder / CAT / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / CAT / name).write_bytes(image())
    data = open_data(linked, classes=CLASSES, strict=False)
    assert data.num_samples == 9  # dogs are no cats, although the circle leads to them
    assert data.findings.passed_over == {"link_loop": 1, "dot_file": 1, "hidden_folder": 2}
    assert data.findings.problems == {"not_a_file": [f"image {linked / CAT / 'self'}"]}
    (folder / CAT / "self").unlink()
    os.symlink("nowhere", folder / DOG / "lost.jpg")
    with pytest.raises(ValueError, match=r"not_a_file: 1 \(image .*/lost\.jpg\)"):
        open_data(linked, classes=CLASSES)
    assert open_data(linked, classes=CLASSES, strict=False).num_samples == 9


def test_folder_above_the_classes_names_them(tmp_path):
    write_form("class_folders", tmp_path / "val", some_files())
    with pytest.raises(
        ValueError, match=r"must be the folder of the classes; folders of classes are in .*/val$"
    ):
        open_data(tmp_path, classes=CLASSES, strict=False)


def test_images_outside_the_classes_are_counted(tmp_path):
    folder = write_form("class_folders", tmp_path / "set", some_files())
    (folder / "words.txt").touch()
    (folder / "loose.PNG").write_bytes(image(kind="PNG"))
    with pytest.raises(ValueError, match=r"image_outside_class: 1 \(.*/loose\.PNG\)"):
        open_data(folder, classes=CLASSES)
    (folder / f"{CAT}.tar").touch()
    with pytest.raises(ValueError, match=r"in one place: there are tars in it and images in .*/n0"):
        open_data(folder, classes=CLASSES, strict=False)
