"""Commands that write and inspect shards, and convert weights."""

import argparse
import os

from linclip_launch.arguments.command import Command, add_out, path, path_text, whole_number

__all__ = ["DATA_COMMANDS"]


def _generated(parser: argparse.ArgumentParser, size: int) -> None:
    parser.add_argument("out", type=path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--image-size",
        type=whole_number(1),
        default=size,
        metavar="N",
        help=f"side in pixels; default: {size}",
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="default: 0")


def _digits(parser: argparse.ArgumentParser) -> None:
    _generated(parser, 32)
    parser.set_defaults(kind="digits")


def _scenes(parser: argparse.ArgumentParser) -> None:
    _generated(parser, 256)
    parser.add_argument(
        "--num-shards", type=whole_number(1), default=8, metavar="N", help="default: 8"
    )
    parser.add_argument(
        "--samples-per-shard", type=whole_number(1), default=1000, metavar="N", help="default: 1000"
    )
    parser.add_argument(
        "--test",
        dest="num_test",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="scenes in each held-out folder; default: 0",
    )
    parser.set_defaults(kind="scenes")


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=path, metavar="SOURCE", help="folder, searched recursively")
    _pairs(parser)
    parser.set_defaults(kind="folder")


def _csv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=path, metavar="SOURCE", help="table with a header line")
    _pairs(parser)
    parser.add_argument(
        "--image-column", default="filepath", metavar="NAME", help="default: filepath"
    )
    parser.add_argument(
        "--caption-column",
        nargs="+",
        default=["title"],
        metavar="NAME",
        help="further ones go into the entry captions of the JSON, by name; default: title",
    )
    parser.add_argument(
        "--separator",
        type=_separator,
        default=r"\t",
        help=r"default: '\t', a tab",
    )
    parser.set_defaults(kind="csv")


def _separator(word: str) -> str:
    return "\t" if word == r"\t" else word


def _seed_or_none(word: str) -> int | None:
    return None if word == "none" else whole_number(0, alternative=", or none")(word)


def _pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--samples-per-shard",
        type=whole_number(1),
        default=10_000,
        metavar="N",
        help="default and maximum: 10000",
    )
    parser.add_argument(
        "--resize",
        choices=("no", "border", "keep_ratio", "center_crop"),
        default="no",
        help="img2dataset's resize_mode; default: no, which keeps the files as they are",
    )
    parser.add_argument(
        "--image-size", type=whole_number(1), metavar="N", help="side in pixels, unless --resize no"
    )
    parser.add_argument(
        "--shuffle-seed",
        type=_seed_or_none,
        default=0,
        metavar="SEED",
        help="seed of the order of pairs; none keeps the order of the source; default: 0",
    )
    _workers(parser)


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        dest="num_workers",
        type=whole_number(1),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; default: one per core",
    )


def _shards_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="shards, as in data.train")
    add_out(parser)
    parser.add_argument(
        "--max-shards", type=whole_number(1), metavar="N", help="inspect N, evenly spaced"
    )
    parser.add_argument(
        "--max-samples",
        type=whole_number(1),
        metavar="N",
        help="read at most N samples, evenly spaced",
    )
    _workers(parser)
    parser.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode images instead of reading only their headers; default: yes",
    )
    parser.add_argument(
        "--cache-dir", type=path_text, metavar="DIR", help="folder for copies of remote shards"
    )
    parser.add_argument(
        "--write-sizes",
        action="store_true",
        help="write the number of samples of local shards to sizes.json beside them",
    )
    parser.add_argument(
        "--captions",
        default="[]",
        metavar="SOURCES",
        help="where the captions are, as in data.captions; default: the member txt",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("output", type=path, metavar="FOLDER", help="must not exist, or be empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step",
        type=whole_number(0),
        metavar="N",
        help="step of the checkpoint; default: the newest",
    )
    which.add_argument(
        "--best",
        action="store_true",
        help="the best checkpoint of the run folder, by the score of checkpoint.keep_best",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="ema: the running average of the weights; raw: the weights themselves; default: the "
        "average if the run keeps one",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="default: fp32"
    )
    parser.add_argument(
        "--push",
        metavar="hf-hub:OWNER/NAME",
        help="upload the folder to the Hugging Face hub, with the token in HF_TOKEN; a repository "
        "that does not exist is created, private",
    )


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path,
        metavar="SOURCE",
        help="a folder with open_clip_config.json and open_clip_model.safetensors, or a "
        ".safetensors file",
    )
    parser.add_argument("output", type=path, metavar="FOLDER", help="must not exist, or be empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--config", type=path, metavar="FILE", help="for a file: its open_clip_config.json"
    )
    which.add_argument(
        "--model",
        dest="architecture",
        metavar="NAME",
        help="for a file: open_clip's name of its architecture, such as ViT-B-16",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: unchanged")


DATA_COMMANDS = {
    ("shards", "make", "csv"): Command(
        summary="write images and captions that a table names",
        add_arguments=_csv,
        run="ds_linclip.data.prepare.make_shards:run",
        examples="""\
linclip shards make csv captions.tsv data/mine --resize keep_ratio --image-size 256""",
    ),
    ("shards", "make", "folder"): Command(
        summary="write images with captions in .txt files beside them",
        add_arguments=_folder,
        run="ds_linclip.data.prepare.make_shards:run",
        examples="linclip shards make folder photos data/photos",
    ),
    ("shards", "make", "digits"): Command(
        summary="write captioned handwritten digits, which need no download",
        add_arguments=_digits,
        run="ds_linclip.data.prepare.make_shards:run",
        examples="linclip shards make digits data/embedded",
    ),
    ("shards", "make", "scenes"): Command(
        summary="write synthetic scenes of coloured shapes, as many as wanted",
        add_arguments=_scenes,
        run="ds_linclip.data.prepare.make_shards:run",
        examples="linclip shards make scenes data/scenes --num-shards 100 --test 1000",
    ),
    ("shards", "inspect"): Command(
        summary="report what shards hold, and samples that training cannot use",
        add_arguments=_shards_inspect,
        run="ds_linclip.data.prepare.inspect_shards:run",
        examples="linclip shards inspect 'data/mine/{00000..00041}.tar' --out report",
    ),
    ("export",): Command(
        summary="convert a checkpoint to a folder that open_clip reads",
        add_arguments=_export,
        run="ds_linclip.interop.export:run",
        examples="linclip export runs/my_run exported",
    ),
    ("import",): Command(
        summary="convert open_clip's weights to a folder for init.pretrained",
        add_arguments=_import,
        run="ds_linclip.interop.import_weights:run",
        examples="linclip import weights.safetensors start --model ViT-B-16",
    ),
}
