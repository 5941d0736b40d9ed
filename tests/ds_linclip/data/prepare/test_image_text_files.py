"""``linclip shards make folder`` and ``csv``: every file becomes a sample or a counted failure."""

import csv
import hashlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ds_linclip.data.prepare import image_text_files, make_shards
from ds_linclip.data.prepare.image_text_files import (
    PairLoader,
    PairSet,
    ResizeMode,
    folder_pairs,
    table_pairs,
)
from ds_linclip.data.prepare.make_shards import make_pairs
from ds_linclip.data.prepare.shard_writer import EncodedSample, FailedSample
from ds_linclip.data.tally import Tally
from linclip_launch.cli import main

COMMAND = Path(sys.executable).parent / "linclip"
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}


def picture(width: int, height: int, *, form: str = "JPEG", seed: int = 0, **save: object) -> bytes:
    """Return an image file whose pixels depend on the seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, form, **save)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return the start of a PNG that claims a size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + data + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def write_folder(folder: Path, count: int = 12) -> dict[str, bytes]:
    """Write sound pairs in two folders and all formats; return the files by caption."""
    files = {}
    for number in range(count):
        suffix = list(FORMATS)[number % 5]
        content = picture(40 + number, 30, form=FORMATS[suffix], seed=number)
        path = folder / ("cats" if number < count // 2 else "a/dogs") / f"{number:02d}.x.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        caption = f"  picture {number} ü\n"
        path.with_suffix(".txt").write_text(caption)
        files[caption] = content
    return files


def write_dirty_folder(folder: Path) -> Counter[str]:
    """Write two sound pairs and one or two of each failure; return the counts."""
    folder.mkdir(parents=True)
    sound = picture(20, 20)
    pairs: list[tuple[str, bytes, bytes | None, str]] = [
        ("ok.JPG", sound, b"fine", "success"),
        ("ok2.jpg", picture(24, 24, form="PNG"), b"a png by another name", "success"),
        ("cut.jpg", sound[: len(sound) // 2], b"cut", "image_undecodable"),
        ("text.png", b"no image at all", b"text", "image_undecodable"),
        ("tiny.png", picture(2, 30, form="PNG"), b"tiny", "image_too_small"),
        ("bomb.png", png_header(30_000, 30_000), b"bomb", "image_too_many_pixels"),
        ("big.webp", b"\0" * (64 * 2**20 + 1), b"big", "image_too_many_bytes"),
        ("alone.jpg", sound, None, "text_missing"),
        ("blank.jpg", sound, b" \n", "text_empty"),
        ("latin.jpg", sound, "über".encode("latin-1"), "text_not_utf8"),
        ("novel.jpg", sound, b"x" * (64 * 2**10 + 1), "text_too_many_bytes"),
    ]
    for name, content, text, _ in pairs:
        (folder / name).write_bytes(content)
        if text is not None:
            (folder / name).with_suffix(".txt").write_bytes(text)
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "gone.txt").write_text("a broken link")
    (folder / "readme.md").write_text("no image, not counted")
    return Counter({"image_missing": 1}) + Counter(cause for *_, cause in pairs)


def write_csv(file: Path, rows: list[list[str]], separator: str = "\t") -> None:
    with open(file, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines, delimiter=separator).writerows(rows)


def read_set(out: Path) -> list[dict[str, bytes]]:
    """Return all samples as webdataset reads them."""
    urls = sorted(str(path) for path in out.glob("*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def read_rows(out: Path) -> list[dict[str, object]]:
    paths = sorted(out.glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_folder_keeps_every_file_as_it_is(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "images")
    counts = make_pairs(tmp_path / "out", folder_pairs(tmp_path / "images"), samples_per_shard=5)
    assert counts == {"success": 12}
    samples = read_set(tmp_path / "out")
    assert {
        sample["txt"].decode(): next(sample[ext] for ext in FORMATS if ext in sample)
        for sample in samples
    } == files
    assert [sample["__key__"] for sample in samples][:6] == [
        *(f"00000000{i}" for i in range(5)),
        "000010000",
    ]
    rows = read_rows(tmp_path / "out")
    assert [json.loads(sample["json"]) for sample in samples] == rows
    for row in rows:
        content = files[str(row["caption"])]
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        assert (tmp_path / "images" / str(row["url"])).read_bytes() == content
        assert row["width"] == row["original_width"] == 40 + int(str(row["caption"]).split()[1])
    stats = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*_stats.json"))
    ]
    assert [stat["successes"] for stat in stats] == [5, 5, 2]


@pytest.mark.parametrize(
    ("form", "save", "extension"),
    [
        ("JPEG", {"progressive": True}, "jpg"),
        ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (32, 24))]}, "jpg"),
        ("PNG", {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}, "png"),  # APNG
        ("WEBP", {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}, "webp"),
        ("GIF", {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}, "gif"),
        *((form, {}, None) for form in ("BMP", "TIFF", "JPEG2000", "ICO", "PPM", "TGA", "PCX")),
    ],
)
def test_file_is_stored_if_training_decodes_it_whatever_its_name(
    tmp_path: Path, form: str, save: dict[str, Any], extension: str | None
) -> None:
    content = picture(40, 30, form=form, **save)
    (tmp_path / "a.jpg").write_bytes(content)
    sample = PairLoader(str(tmp_path), "no", 0, False)(("a.jpg", "caption"))
    if extension is None:
        assert isinstance(sample, FailedSample)
        assert sample.cause == "image_undecodable"
    else:
        assert isinstance(sample, EncodedSample)
        assert (sample.image, sample.extension) == (content, extension)


def test_fault_at_one_file_costs_that_file_only_and_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "images", 6)
    whole = image_text_files.decode_image

    def decode(content: bytes) -> Image.Image:
        if content.startswith(b"\x89PNG"):
            raise ZeroDivisionError
        return whole(content)

    monkeypatch.setattr(image_text_files, "decode_image", decode)
    counts = make_pairs(tmp_path / "out", folder_pairs(tmp_path / "images"), num_workers=2)
    assert counts == {"success": 5, "unexpected_ZeroDivisionError": 1}
    assert counts.examples == {"unexpected_ZeroDivisionError": "cats/02.x.png"}


def write_pair(stem: Path, suffix: str = ".jpg", text_suffix: str = ".txt") -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}{suffix}").write_bytes(picture(8, 8))
    Path(f"{stem}{text_suffix}").write_text(stem.name)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    folder, other = tmp_path / "images", tmp_path / "other"
    write_pair(folder / "z" / "own")
    write_pair(other / "deep" / "linked")
    (folder / "a_link").symlink_to(other)
    (folder / "b_link").symlink_to(other / "deep")  # a part of the one above
    (folder / "c_link").symlink_to(folder / "z")
    (folder / "z" / "up").symlink_to("..")
    (folder / "z" / "self").symlink_to("self")
    (other / "deep" / "back").symlink_to(folder)
    (other / "deep" / "root").symlink_to("/")
    pairs = folder_pairs(folder)
    assert pairs.images == ["a_link/deep/linked.jpg", "z/own.jpg"]
    assert pairs.passed_over == {"link_loop": 3, "folder_read_before": 2, "no_suffix": 1}
    assert pairs.passed_over.examples == {
        "link_loop": "z/up",
        "folder_read_before": "b_link",
        "no_suffix": "z/self",
    }
    assert make_pairs(tmp_path / "out", pairs) == {"success": 2}


def test_what_is_passed_over_is_counted_with_an_example(tmp_path: Path) -> None:
    for stem, suffix, text in (
        ("a", ".JPG", ".TXT"),
        ("b", ".Jpeg", ".txt"),
        ("c", ".png", ".Txt"),
    ):
        write_pair(tmp_path / stem, suffix, text)
    (tmp_path / "b.TXT").write_text("not this one")
    (tmp_path / "b.webp").write_bytes(picture(9, 9, form="WEBP"))
    (tmp_path / "b.seg.png").write_bytes(picture(9, 9, form="PNG"))
    for name in ("d.bmp", "e.BMP", "f.tif", "g.jfif", "h.heic", "alone.txt", "README", "i.tar.gz"):
        (tmp_path / name).write_bytes(b"")
    for name in (".DS_Store", "._a.JPG", "._a.TXT"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    for name in (".thumbnails", "@eaDir", "__MACOSX"):
        (tmp_path / name).mkdir()
        write_pair(tmp_path / name / "a")
    pairs = folder_pairs(tmp_path)
    assert dict(zip(pairs.images, pairs.captions, strict=True)) == {
        "a.JPG": ".TXT",
        "b.Jpeg": ".txt",
        "b.seg.png": None,
        "b.webp": ".txt",
        "c.png": ".Txt",
    }
    assert pairs.shared_captions.examples == {"caption_shared": "b.webp"}
    assert pairs.passed_over == {
        "*.bmp": 2,
        **dict.fromkeys(("*.tif", "*.jfif", "*.heic", "*.gz", "no_suffix"), 1),
        "unused_text": 2,
        "dot_file": 3,
        "hidden_folder": 3,
    }
    assert pairs.passed_over.examples["*.bmp"] == "d.bmp"
    assert pairs.passed_over.examples["unused_text"] == "b.TXT"


def test_images_that_a_table_names_elsewhere_are_told_apart(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    urls = ["https://example.com/a.jpg", "file:///a.jpg", "sub\\a.jpg", "C:\\a.jpg", "no.jpg"]
    table.write_text("\n".join(["filepath,title", *(f"{url},a cat" for url in urls)]))
    pairs = table_pairs(table, image_column="filepath", caption_column="title", separator=",")
    load = PairLoader(pairs.root, "no", 0, captions_in_files=False)
    results = [load(pair) for pair in zip(pairs.images, pairs.captions, strict=True)]
    assert [each.cause for each in results if isinstance(each, FailedSample)] == [
        *["image_is_url"] * 2,
        *["image_path_of_windows"] * 2,
        "image_missing",
    ]
    with pytest.raises(ValueError, match=r"source \(.*/t\.csv\) must hold a usable pair"):
        make_pairs(tmp_path / "out", pairs)


# No slash and no NUL, which no file system has; bytes that are no text; little that is too long.
NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=20)
SUFFIXES = st.sampled_from(["", ".jpg", ".PNG", ".txt", ".Txt", ".bmp", ".", ".jpg.", "\udcff.gif"])


@given(st.lists(st.tuples(st.sampled_from(["", "d", ".d", "d/é\n"]), NAMES, SUFFIXES), max_size=8))
def test_every_file_of_a_folder_is_an_image_a_caption_or_counted(
    names: list[tuple[str, str, str]],
) -> None:
    with TemporaryDirectory() as folder:
        for parent, stem, suffix in names:
            path = Path(folder, parent, stem + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch()
        files = {
            os.path.relpath(path, folder) for path in Path(folder).rglob("*") if path.is_file()
        }
        try:
            pairs = folder_pairs(Path(folder))
        except ValueError as error:
            message = str(error)
        else:
            used = {
                os.path.splitext(image)[0] + suffix
                for image, suffix in zip(pairs.images, pairs.captions, strict=True)
                if suffix is not None
            }
            assert pairs.images == sorted(pairs.images)
            assert files >= used | set(pairs.images)
            hidden = {file for file in files if file.startswith(".d/")}  # is counted as a folder
            counted = len(used) + len(pairs.images) + pairs.passed_over.total()
            assert len(files - hidden) + bool(hidden) == counted
            assert "\n" not in "".join(pairs.passed_over.lines())
            return
    assert "must hold images" in message
    assert "\n" not in message


@given(st.integers(1, 30), st.integers(0, 2**40) | st.none(), st.integers(8, 30), st.data())
def test_order_is_a_permutation_that_only_the_seed_chooses(
    count: int, seed: int | None, per_shard: int, data: st.DataObject
) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    images = ["no.jpg" if number in bad else "a.jpg" for number in range(count)]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            make_shards, "ordered_map", lambda f, items, num_workers: (f(i) for i in items)
        )
        Path(folder, "a.jpg").write_bytes(picture(4, 4))
        pairs = PairSet(
            source=folder,
            root=folder,
            images=images,
            captions=[str(number) for number in range(count)],
            captions_in_files=False,
            fingerprint="",
            passed_over=Tally(),
            shared_captions=Tally(),
        )
        out = Path(folder, "out")
        counts = make_pairs(out, pairs, samples_per_shard=per_shard, shuffle_seed=seed)
        rows = read_rows(out)
    order = [int(str(row["caption"])) for row in rows]
    expected = list(range(count))
    if seed is not None:
        random.Random(seed).shuffle(expected)
    assert order == expected
    assert [row["key"] for row in rows] == [
        f"{i // per_shard:05d}{i % per_shard:04d}" for i in range(count)
    ]
    assert counts == Counter({"success": count - len(bad)}) + Counter({"image_missing": len(bad)})


def test_order_is_shuffled_by_seed_or_kept(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    pairs = folder_pairs(tmp_path / "images")
    urls = {}
    for name, seed in (("kept", None), ("zero", 0), ("one", 1)):
        make_pairs(tmp_path / name, pairs, shuffle_seed=seed)
        urls[name] = [row["url"] for row in read_rows(tmp_path / name)]
    assert urls["kept"] == sorted(urls["kept"], key=str)
    assert len({tuple(order) for order in urls.values()}) == 3
    assert len({frozenset(order) for order in urls.values()}) == 1


@pytest.mark.parametrize("resize", ["no", "border"])
def test_bytes_do_not_depend_on_workers(tmp_path: Path, resize: ResizeMode) -> None:
    write_folder(tmp_path / "images", 40)
    write_dirty_folder(tmp_path / "images" / "dirty")
    pairs = folder_pairs(tmp_path / "images")
    size = None if resize == "no" else 24
    for workers in (1, 2):
        counts = make_pairs(
            tmp_path / f"workers{workers}",
            pairs,
            samples_per_shard=9,
            resize=resize,
            image_size=size,
            num_workers=workers,
        )
        assert counts is not None
        assert counts["success"] == 42
    assert bytes_of(tmp_path / "workers1") == bytes_of(tmp_path / "workers2")


def test_bad_pairs_are_counted_and_listed(tmp_path: Path) -> None:
    expected = write_dirty_folder(tmp_path / "images")
    counts = make_pairs(tmp_path / "out", folder_pairs(tmp_path / "images"), samples_per_shard=7)
    assert counts == expected
    rows = read_rows(tmp_path / "out")
    assert Counter(row["error_message"] or "success" for row in rows) == expected
    failed = {row["url"]: row for row in rows if row["status"] != "success"}
    assert failed["cut.jpg"]["status"] == "failed_to_resize"
    assert failed["cut.jpg"]["caption"] == "cut"
    assert failed["alone.jpg"]["status"] == "failed_to_download"
    assert failed["alone.jpg"]["caption"] is None
    # Keys number the pairs: failures leave gaps.
    assert [row["key"] for row in rows] == [f"0000{i // 7}{i % 7:04d}" for i in range(len(rows))]
    samples = read_set(tmp_path / "out")
    assert {sample["__key__"] for sample in samples} == {
        row["key"] for row in rows if row["status"] == "success"
    }
    assert sorted("png" if "png" in sample else "jpg" for sample in samples) == [
        "jpg",
        "png",
    ]  # named by their content
    total: Counter[str] = Counter()
    for path in (tmp_path / "out").glob("*_stats.json"):
        stats = json.loads(path.read_text())
        assert stats["count"] == sum(stats["status_dict"].values())
        assert stats["count"] == (
            stats["successes"] + stats["failed_to_download"] + stats["failed_to_resize"]
        )
        total.update(stats["status_dict"])
    assert total == expected


def test_csv_as_open_clip_reads_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", 4)
    elsewhere = tmp_path / "elsewhere.jpg"
    elsewhere.write_bytes(picture(33, 22, seed=9))
    captions = [
        'say "cheese", please',
        "two\nlines",
        " a\ttab ",
        "",
        "comma, comma",
        "nothing there",
    ]
    names = ["images/cats/00.x.jpg", "images/cats/01.x.jpeg", "images/a/dogs/02.x.png"]
    paths = [*names, "images/a/dogs/03.x.webp", str(elsewhere), "images/lost.jpg"]
    pairs = zip(captions, paths, strict=True)
    rows = [["id", "title", "filepath"]]
    rows += [[str(i), caption, path] for i, (caption, path) in enumerate(pairs)]
    for name, separator in (("tab", "\t"), ("comma", ",")):
        write_csv(tmp_path / f"{name}.csv", rows, separator)
        table = table_pairs(
            tmp_path / f"{name}.csv",
            image_column="filepath",
            caption_column="title",
            separator=separator,
        )
        counts = make_pairs(tmp_path / name, table, shuffle_seed=None)
        assert counts == {"success": 4, "text_empty": 1, "image_missing": 1}
        texts = [sample["txt"].decode() for sample in read_set(tmp_path / name)]
        assert texts == ['say "cheese", please', "two\nlines", " a\ttab ", "comma, comma"]
        assert [row["url"] for row in read_rows(tmp_path / name)] == paths
    assert read_set(tmp_path / "tab")[3]["jpg"] == elsewhere.read_bytes()


def test_csv_row_with_broken_text_is_one_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(20, 20))
    (tmp_path / "a.tsv").write_bytes(
        b"\xef\xbb\xbffilepath\ttitle\na.jpg\tgood\na.jpg\tb\xe4d\n\xe4.jpg\tlost\n"
    )
    pairs = table_pairs(
        tmp_path / "a.tsv", image_column="filepath", caption_column="title", separator="\t"
    )
    counts = make_pairs(tmp_path / "out", pairs)
    assert counts == {"success": 1, "text_not_utf8": 1, "image_missing": 1}
    assert "�.jpg" in [row["url"] for row in read_rows(tmp_path / "out")]


def test_csv_row_with_overlong_caption_is_one_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(20, 20))
    rows = [["filepath", "title"], ["a.jpg", "good"], ["a.jpg", "word " * 200_000]]
    write_csv(tmp_path / "a.tsv", [*rows, ["x" * 200_000, "lost"], ["a.jpg", "good too"]])
    limit = csv.field_size_limit()
    pairs = table_pairs(
        tmp_path / "a.tsv", image_column="filepath", caption_column="title", separator="\t"
    )
    assert csv.field_size_limit() == limit
    counts = make_pairs(tmp_path / "out", pairs)
    assert counts == {"success": 2, "text_too_many_bytes": 1, "image_missing": 1}


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("border", (100, 50), (32, 32)),
        ("border", (10, 8), (32, 32)),
        ("keep_ratio", (100, 50), (64, 32)),
        ("keep_ratio", (10, 15), (32, 48)),
        ("center_crop", (100, 50), (32, 32)),
        ("center_crop", (8, 24), (32, 32)),
    ],
)
def test_resize_modes_are_those_of_img2dataset(
    tmp_path: Path, mode: ResizeMode, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    red_left = Image.new("RGB", size, "blue")
    red_left.paste("red", (0, 0, size[0] // 2, size[1]))
    red_left.save(tmp_path / "a.png")
    sample = PairLoader(str(tmp_path), mode, 32, False)(("a.png", "red and blue"))
    assert isinstance(sample, EncodedSample)
    with Image.open(io.BytesIO(sample.image)) as image:
        assert (image.format, image.size, sample.size) == ("JPEG", expected, expected)
        pixels = np.asarray(image).astype(int)
    assert sample.original_size == size
    middle = pixels[expected[1] // 2]
    assert middle[2, 0] - middle[2, 2] > 150  # red
    assert middle[-3, 2] - middle[-3, 0] > 150  # blue
    is_white = (pixels > 240).all(axis=2)
    share = 1 - min(size) / max(size) if mode == "border" else 0
    assert is_white.mean() == pytest.approx(share, abs=0.06)
    if share > 0.4:
        assert is_white[0].all()
        assert is_white[-1].all()


def test_exif_rotation_transparency_and_extremes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (tmp_path / "turned.jpg").write_bytes(picture(60, 30, exif=exif.tobytes()))
    Image.new("RGBA", (30, 30), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (8000, 4), "red").save(tmp_path / "line.png")
    keep = PairLoader(str(tmp_path), "keep_ratio", 16, False)
    turned = keep(("turned.jpg", "x"))
    assert isinstance(turned, EncodedSample)
    assert (turned.size, turned.original_size) == ((16, 32), (30, 60))
    clear = keep(("clear.png", "x"))
    assert isinstance(clear, EncodedSample)
    assert np.asarray(Image.open(io.BytesIO(clear.image))).min() > 250
    huge = PairLoader(str(tmp_path), "keep_ratio", 256, False)(("line.png", "x"))
    assert isinstance(huge, FailedSample)
    assert huge.cause == "image_too_many_pixels"
    thin = PairLoader(str(tmp_path), "border", 256, False)(("line.png", "x"))
    assert isinstance(thin, EncodedSample)


@pytest.mark.parametrize(("height", "usable"), [(4093, True), (4095, False)])
def test_side_too_long_for_libjpeg_is_one_bad_sample(
    tmp_path: Path, height: int, usable: bool
) -> None:
    (tmp_path / "images").mkdir()
    for name, size in (("strip", (4, height)), ("plain", (20, 20))):
        Image.new("RGB", size, "red").save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(name)
    counts = make_pairs(
        tmp_path / "out", folder_pairs(tmp_path / "images"), resize="keep_ratio", image_size=64
    )
    assert counts == ({"success": 2} if usable else {"success": 1, "image_too_many_pixels": 1})


def test_changed_files_are_another_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", 3)
    out = tmp_path / "out"
    assert make_pairs(out, folder_pairs(tmp_path / "images")) == {"success": 3}
    before = bytes_of(out)
    assert make_pairs(out, folder_pairs(tmp_path / "images"), num_workers=2) is None
    (tmp_path / "images" / "cats" / "00.x.txt").write_text("another caption")
    with pytest.raises(ValueError, match=r"out \(.*\) must be empty: it holds"):
        make_pairs(out, folder_pairs(tmp_path / "images"))
    assert bytes_of(out) == before


def test_other_columns_of_one_table_are_another_set(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(20, 20))
    write_csv(tmp_path / "a.tsv", [["filepath", "title", "alt"], ["a.jpg", "one", "two"]])
    for column, code in (("title", 0), ("title", 0), ("alt", 2)):
        words = ["csv", str(tmp_path / "a.tsv"), str(tmp_path / "out"), "--caption-column", column]
        assert main(["shards", "make", *words]) == code


def test_only_bad_pairs_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"broken")
        (tmp_path / "images" / f"{number}.txt").write_text("text")
    with pytest.raises(ValueError, match=r"source \(.*\) must hold a usable pair.*undecodable: 3"):
        make_pairs(tmp_path / "out", folder_pairs(tmp_path / "images"), num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_without_read_permission_is_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", 2)
    (tmp_path / "images" / "cats" / "00.x.jpg").chmod(0)
    counts = make_pairs(tmp_path / "out", folder_pairs(tmp_path / "images"))
    assert counts == {"success": 1, "image_unreadable": 1}


@pytest.mark.long
def test_command_reports_what_failed(tmp_path: Path) -> None:
    expected = write_dirty_folder(tmp_path / "images")
    arguments = ["folder", tmp_path / "images", tmp_path / "out", "--workers", "2"]
    arguments += ["--resize", "border", "--image-size", "32", "--shuffle-seed", "none"]
    done = subprocess.run(
        [str(word) for word in (COMMAND, "shards", "make", *arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "written, 2 samples, 10 failed, 1 passed over\n" in done.stdout
    *table, title, passed_over, override = done.stdout.splitlines()[1:]
    assert override == f"""'data.train=["{tmp_path / "out"}/00000.tar"]'"""
    assert [title, passed_over.split()] == ["passed over:", ["*.md", "1", "readme.md"]]
    lines = [line.split() for line in table]
    assert {cause: int(count) for cause, count, _ in lines} == {
        cause: count for cause, count in expected.items() if cause != "success"
    }
    assert ["image_missing", "1", "gone.png"] in lines
    assert "12/12" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("folder nowhere OUT", "source (nowhere) must be a folder"),
        ("folder empty OUT", "source (empty) must hold images"),
        ("folder images OUT --samples-per-shard 10001", "samples_per_shard (10001)"),
        ("folder images OUT --resize border", "image_size (None)"),
        ("folder images OUT --image-size 64", "image_size (64)"),
        ("folder images OUT --resize border --image-size 3", "image_size (3)"),
        ("folder images images", "out (images) must be empty"),
        ("csv nowhere.csv OUT", "nowhere.csv"),
        ("csv table.csv OUT", "image_column (filepath) must be a column of table.csv"),
        ("csv table.csv OUT --separator , --image-column a --caption-column b", "line 3"),
        ("csv table.csv OUT --separator ;;", "separator (';;') must be one character"),
        ("csv header.csv OUT", "source (header.csv) must hold rows"),
    ],
)
def test_mistakes_are_one_line_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "images", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text('a,b\n1,2\n"open,3\n')
    (tmp_path / "header.csv").write_text("filepath\ttitle\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(["shards", "make", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.long
def test_command_exits_with_2_for_a_mistake(tmp_path: Path) -> None:
    command = [str(COMMAND), "shards", "make", "folder", str(tmp_path / "no"), "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: source ({tmp_path / 'no'}) must be a folder\n"
    unknown = subprocess.run(
        [str(COMMAND), "shards", "bake"], capture_output=True, text=True, timeout=60, check=False
    )
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: unknown command 'bake': did you mean make?")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_further_captions_are_written(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They become entries of the JSON that ``data.captions`` can name; bad ones are counted."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(20, 20))
    images, titles = [f"{n}.jpg" for n in range(3)], [f"title {n}" for n in range(3)]
    alt, syn = ["alt 0", "", "alt 2"], [["a", "b"], ["c", " ", None], []]
    table, columns = tmp_path / "table", ["title", "alt"]
    if form == "csv":
        rows = [["filepath", "title", "alt"], *map(list, zip(images, titles, alt, strict=True))]
        write_csv(table, rows)
    else:
        entries = {"filepath": images, "title": titles, "alt": alt, "syn": syn}
        pq.write_table(pa.table(entries), table)
        columns.append("syn")
    words = ["csv", str(table), str(tmp_path / "out"), "--shuffle-seed", "none", "--workers", "1"]
    assert main(["shards", "make", *words, "--caption-column", *columns]) == 0
    printed = capsys.readouterr().out
    assert "alt/text_empty" in printed
    samples = read_set(tmp_path / "out")
    found = [json.loads(sample["json"])["captions"] for sample in samples]
    lists = [{"syn": ["a", "b"]}, {"syn": ["c"]}, {}] if form == "parquet" else [{}, {}, {}]
    assert found == [{"alt": "alt 0", **lists[0]}, lists[1], {"alt": "alt 2", **lists[2]}]
    assert [sample["txt"].decode() for sample in samples] == titles
    assert ("syn/text_empty" in printed) == ("syn/text_missing" in printed) == (form == "parquet")
    assert main(["shards", "make", *words, "--caption-column", "title", "title"]) == 2
    assert main(["shards", "make", *words, "--caption-column", "title", "nope"]) == 2
    assert "further_columns[0] (nope) must be a column" in capsys.readouterr().err
