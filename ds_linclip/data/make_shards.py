"""Command line: writes a data set as shards.

``python -m ds_linclip.data.make_shards digits OUT`` and ``... scenes OUT``. The set is written into
a folder beside OUT that is renamed at the end: an interrupted run leaves no half OUT. A set that is
already there is left alone.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ds_linclip.data import digits, scenes
from ds_linclip.data.shard_writer import RawSample, write_labelled_folder, write_train_shard

__all__ = ["main", "make_digits", "make_scenes"]

_DIGIT_SHARDS = 8
_RECORD = "dataset.json"


def make_digits(out: Path, *, image_size: int = 32, seed: int = 0) -> bool:
    """Write the captioned digits: ``OUT/train`` (8 shards) and ``OUT/test`` (the held-out fifth).

    Args:
        out: Folder that does not exist yet, is empty, or holds the same set.
        image_size: Side in pixels.
        seed: Of the captions.

    Returns:
        Whether it was written; False: the same set was there already.

    Raises:
        ValueError: when ``out`` holds anything else.
    """
    record: dict[str, str | int] = {"name": "digits", "image_size": image_size, "seed": seed}

    def write(folder: Path) -> None:
        train = list(digits.digit_samples("train", image_size=image_size, seed=seed))
        (folder / "train").mkdir()
        for number in tqdm(range(_DIGIT_SHARDS), desc="digits", unit="shard"):
            write_train_shard(folder / "train", number, train[number::_DIGIT_SHARDS])
        write_labelled_folder(
            folder / "test",
            digits.digit_samples("test", image_size=image_size, seed=seed),
            classnames=digits.CLASSNAMES,
            templates=digits.TEMPLATES,
        )

    return _write_once(out, record, write)


def make_scenes(
    out: Path,
    *,
    num_shards: int,
    samples_per_shard: int,
    image_size: int,
    seed: int = 0,
    num_test: int = 0,
) -> bool:
    """Write synthetic scenes: ``OUT/train`` and, for ``num_test > 0``, two held-out folders.

    ``OUT/test`` asks for pairs of colour and shape that occur in training, ``OUT/test_unseen`` for
    pairs that do not.

    Args:
        out: Folder that does not exist yet, is empty, or holds the same set.
        num_shards, samples_per_shard: Number of training scenes.
        image_size: Side in pixels.
        seed: Of all scenes.
        num_test: Scenes in each held-out folder.

    Returns:
        Whether it was written; False: the same set was there already.

    Raises:
        ValueError: for a number that is too small, or when ``out`` holds anything else.
    """
    record: dict[str, str | int] = {
        "name": "scenes",
        "num_shards": num_shards,
        "samples_per_shard": samples_per_shard,
        "image_size": image_size,
        "seed": seed,
        "num_test": num_test,
    }
    if not 1 <= samples_per_shard <= 10_000:  # keys have four digits for the index
        raise ValueError(f"samples_per_shard ({samples_per_shard}) must be in 1 ... 10000")

    def scene(index: int) -> RawSample:
        return scenes.training_scene(index, image_size=image_size, seed=seed)

    def write(folder: Path) -> None:
        (folder / "train").mkdir()
        with tqdm(total=num_shards * samples_per_shard, desc="scenes", unit="image") as progress:
            for number in range(num_shards):
                first = number * samples_per_shard
                indices = range(first, first + samples_per_shard)
                progress.update(write_train_shard(folder / "train", number, map(scene, indices)))
        for split in ("test", "test_unseen") if num_test else ():
            write_labelled_folder(
                folder / split,
                scenes.labelled_scenes(
                    split, num_samples=num_test, image_size=image_size, seed=seed
                ),
                classnames=scenes.CLASSNAMES,
                templates=scenes.TEMPLATES,
            )

    return _write_once(out, record, write)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "digits":
            written = make_digits(options.out, image_size=options.image_size, seed=options.seed)
        else:
            written = make_scenes(
                options.out,
                num_shards=options.num_shards,
                samples_per_shard=options.samples_per_shard,
                image_size=options.image_size,
                seed=options.seed,
                num_test=options.test,
            )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    state = "written" if written else "already complete"
    sys.stdout.write(f"{options.command} in {options.out}: {state}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ds_linclip.data.make_shards", description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, size in (("digits", 32), ("scenes", 256)):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path, help="folder to write")
        command.add_argument("--image-size", type=int, default=size, help="side in pixels")
        command.add_argument("--seed", type=int, default=0)
    command.add_argument("--num-shards", type=int, default=8)
    command.add_argument("--samples-per-shard", type=int, default=1000)
    command.add_argument("--test", type=int, default=0, help="scenes in each held-out folder")
    return parser


def _write_once(out: Path, record: dict[str, str | int], write: Callable[[Path], None]) -> bool:
    """Run ``write`` on a folder beside ``out`` and rename it, unless the same set is there."""
    for name, value in record.items():
        if isinstance(value, int) and value < (0 if name in ("seed", "num_test") else 1):
            raise ValueError(f"{name} ({value}) is too small")
    if _holds(out, record):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(partial)
        (partial / _RECORD).write_text(json.dumps(record, indent=4) + "\n")
        partial.chmod(0o755)
        try:
            partial.rename(out)
        except OSError:
            # Another run was faster, or a file was put there meanwhile.
            if _holds(out, record):
                return False
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _holds(out: Path, record: dict[str, str | int]) -> bool:
    """Whether ``out`` holds the set; False when there is nothing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"out ({out}) must be empty or hold a complete data set") from error
    if found != record:
        raise ValueError(f"out ({out}) must be empty: it holds {found}, asked for is {record}")
    return True


if __name__ == "__main__":
    sys.exit(main())
