"""Held-out folders: shares of ranks, open_clip's preprocessing, messages that name eval.data."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform
from PIL import Image

from ds_linclip.data import EvalTransform, LabelledBatch, LabelledData
from ds_linclip.data.make_shards import make_scenes

NUM_SAMPLES = 13


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    make_scenes(out, num_shards=1, samples_per_shard=1, image_size=40, num_test=NUM_SAMPLES)
    return out / "test"


def open_data(folder: Path, image_size: tuple[int, int] = (16, 16), **options: int) -> LabelledData:
    return LabelledData(
        folder, transform=EvalTransform(PreprocessCfg(size=image_size)), batch_size=4, **options
    )


def take(folder: Path, rank: int = 0, world_size: int = 1) -> list[LabelledBatch]:
    return list(open_data(folder, rank=rank, world_size=world_size))


def write_folder(folder: Path, samples: list[dict[str, bytes]]) -> None:
    """A held-out folder with two classes and the samples s0, s1, ..."""
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, parts in enumerate(samples):
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"s{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def sound_sample(label: bytes = b"0") -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return {"jpg": buffer.getvalue(), "cls": label}


def test_classes_and_templates(held_out: Path) -> None:
    data = open_data(held_out)
    assert len(data.classnames) == 48
    assert data.classnames[0] == "red circle"
    assert data.templates
    assert all("{c}" in template for template in data.templates)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 8)])
def test_batches_hold_what_lies_in_the_tar(held_out: Path, size: tuple[int, int]) -> None:
    batches = list(open_data(held_out, size))
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 1]
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
    assert torch.cat([batch.labels for batch in batches]).tolist() == labels
    assert [caption for batch in batches for caption in batch.captions] == captions
    assert batches[0].labels.dtype == torch.int64


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_ranks_share_all_samples(held_out: Path, world_size: int) -> None:
    everything = [key for batch in take(held_out) for key in batch.keys]
    assert len(set(everything)) == NUM_SAMPLES
    for rank in range(world_size):
        keys = [key for batch in take(held_out, rank, world_size) for key in batch.keys]
        assert keys == everything[rank::world_size]


def test_workers_change_nothing(held_out: Path) -> None:
    for a, b in zip(open_data(held_out), open_data(held_out, num_workers=2), strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_every_iteration_is_complete(held_out: Path) -> None:
    data = open_data(held_out)
    next(iter(data))  # one that is not read to its end
    rounds = [[(b.keys, b.labels.tolist()) for b in data] for _ in range(2)]
    assert rounds[0] == rounds[1]
    assert sum(len(keys) for keys, _ in rounds[0]) == NUM_SAMPLES


def test_flat_folder_is_read_too(held_out: Path, tmp_path: Path) -> None:
    for file in [*held_out.glob("*.txt"), held_out / "test" / "0.tar"]:
        shutil.copy(file, tmp_path)
    assert len(take(tmp_path)) == len(take(held_out))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must hold a readable classnames\.txt"):
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
    with pytest.raises(ValueError, match=r"0\.tar must be a readable tar: shard_unreadable"):
        open_data(tmp_path)
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must hold at least one sample"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ({"cls": b"2"}, r"have a class in \[0, 2\), the lines of classnames\.txt; it has 2"),
        ({"cls": b"-1"}, r"have a class in \[0, 2\), the lines of classnames\.txt; it has -1"),
        ({"cls": b"cat"}, r"be readable: invalid literal"),
        ({"jpg": None}, r"be readable: image_missing"),
        ({"cls": None}, r"be readable: class_missing"),
    ],
)
def test_bad_sample_is_found_on_opening(
    tmp_path: Path, broken: dict[str, bytes | None], rule: str
) -> None:
    parts: dict[str, bytes | None] = {**sound_sample(), **broken}
    present = {name: content for name, content in parts.items() if content is not None}
    write_folder(tmp_path, [sound_sample(), sound_sample(b"1"), present])
    with pytest.raises(ValueError, match=rf"eval\.data \(.*\): sample s2 of .*0\.tar must {rule}"):
        open_data(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_undecodable_image_is_an_error_of_the_iteration(tmp_path: Path, num_workers: int) -> None:
    write_folder(tmp_path, [sound_sample(), sound_sample() | {"jpg": b"<html>"}])
    data = open_data(tmp_path, num_workers=num_workers)
    with pytest.raises(
        ValueError, match=r"sample s1 of .*0\.tar must be readable: image_undecodable"
    ) as caught:
        list(data)
    assert "Traceback" not in str(caught.value)
