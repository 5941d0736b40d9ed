"""Held-out folders: shares of ranks, open_clip's preprocessing, messages that name eval.data."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from ds_linclip.data import LabelledBatch, labelled_batches, read_classes
from ds_linclip.data.make_shards import make_scenes

NUM_SAMPLES = 13


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    make_scenes(out, num_shards=1, samples_per_shard=1, image_size=40, num_test=NUM_SAMPLES)
    return out / "test"


def take(
    folder: Path, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> list[LabelledBatch]:
    batches = labelled_batches(
        folder,
        image_size=16,
        batch_size=4,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )
    return list(batches)


def test_classes_and_templates(held_out: Path) -> None:
    classnames, templates = read_classes(held_out)
    assert len(classnames) == 48
    assert classnames[0] == "red circle"
    assert templates
    assert all("{c}" in template for template in templates)


def test_batches_hold_what_lies_in_the_tar(held_out: Path) -> None:
    batches = take(held_out)
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 1]
    transform = image_transform(16, is_train=False)
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
    assert batches[0].to("meta").images.device.type == "meta"


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_ranks_share_all_samples(held_out: Path, world_size: int) -> None:
    everything = [key for batch in take(held_out) for key in batch.keys]
    assert len(set(everything)) == NUM_SAMPLES
    for rank in range(world_size):
        keys = [key for batch in take(held_out, rank, world_size) for key in batch.keys]
        assert keys == everything[rank::world_size]


def test_workers_change_nothing(held_out: Path) -> None:
    for a, b in zip(take(held_out), take(held_out, num_workers=2), strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_flat_folder_is_read_too(held_out: Path, tmp_path: Path) -> None:
    shutil.copy(held_out / "test" / "0.tar", tmp_path / "0.tar")
    assert len(take(tmp_path)) == len(take(held_out))


def test_missing_files_are_named(held_out: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.data \(/none\) must be a folder with tars"):
        labelled_batches("/none", image_size=16, batch_size=4, rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) must hold a readable classnames\.txt"):
        read_classes(tmp_path)
    shutil.copy(held_out / "classnames.txt", tmp_path)
    templates = tmp_path / "zeroshot_classification_templates.txt"
    templates.write_text("\n")
    with pytest.raises(ValueError, match=r"eval\.data \(.*\) .*_templates\.txt that is not empty"):
        read_classes(tmp_path)
    templates.write_text("a photo of a {}\n")
    with pytest.raises(ValueError, match=r"template \(a photo of a \{\}\) must contain \{c\}"):
        read_classes(tmp_path)


@pytest.mark.parametrize("broken", ["image", "class"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_sample_is_an_error(tmp_path: Path, broken: str, num_workers: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    parts = {"jpg": buffer.getvalue(), "cls": b"0"}
    parts |= {"jpg": b"<html>"} if broken == "image" else {"cls": b"cat"}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for extension, content in parts.items():
            info = tarfile.TarInfo(f"s7.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(
        ValueError, match=r"eval\.data \(.*\): sample s7 of .*0\.tar must"
    ) as caught:
        take(tmp_path, num_workers=num_workers)
    assert "Traceback" not in str(caught.value)
