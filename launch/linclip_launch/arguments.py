"""The commands of ``linclip`` and their arguments; imports nothing that takes long to load."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COMMANDS", "GROUPS", "Command"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        summary: What it does, in one line.
        add_arguments: Adds its arguments to a parser.
        run: ``module:function`` that takes the parsed arguments, and returns the exit code or None.
        examples: Lines of a shell.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: str
    examples: str


#: First word of commands of two words -> what they have in common.
GROUPS = {
    ("eval",): "score models of ds_linclip and open_clip, and measure them",
    ("shards",): "write training shards, and report what they hold",
    ("shards", "make"): "write images and captions as training shards",
}


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="YAML file, or the name of a config of the package, such as embedded or vit_b16",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings, such as optim.lr=1e-3",
    )


def _ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="ranks on this machine; default: as many as the config sets, one per GPU, or two on "
        "the CPU where there is none",
    )


def _hosts(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="lines of 'host slots=N'")
    parser.add_argument(
        "--include", default="", metavar="HOSTS", help="hosts and slots to use: node1@node2:0,1"
    )
    parser.add_argument(
        "--exclude", default="", metavar="HOSTS", help="hosts and slots to leave out"
    )


def _train(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    _ranks(parser)
    parser.add_argument(
        "--launch",
        metavar="COMMAND",
        help="starts a Python on every rank instead of deepspeed, for example 'srun python'",
    )
    parser.add_argument(
        "--deepspeed",
        default="",
        metavar="OPTIONS",
        help="further options of the deepspeed command, in one string",
    )
    hosts = parser.add_argument_group("several hosts")
    _hosts(hosts)
    hosts.add_argument(
        "--node-rank",
        type=int,
        metavar="N",
        help="without ssh: the number of this host in the hostfile; ranks are started here only",
    )
    hosts.add_argument(
        "--master-addr", metavar="ADDRESS", help="address of the first host; default: its name"
    )
    hosts.add_argument(
        "--master-port",
        type=int,
        metavar="PORT",
        help="port on the first host; default: a free one, or 29500 with --node-rank",
    )
    hosts.add_argument(
        "--remote-shell",
        # A host without power is silent: ssh probes it, and gives up after a minute.
        default="ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 {host}",
        metavar="COMMAND",
        help="runs one more argument on a host; default: %(default)s",
    )
    hosts.add_argument(
        "--check-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="time for a host to reply; default: 20",
    )
    restarts = parser.add_argument_group("restarts")
    restarts.add_argument(
        "--supervise",
        action="store_true",
        help="restart the run from its newest checkpoint when it fails, without hosts that do not "
        "answer",
    )
    restarts.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="failures in a row without a newer checkpoint before giving up; default: 3",
    )
    restarts.add_argument(
        "--backoff-seconds",
        type=float,
        default=5.0,
        metavar="S",
        help="wait before a restart; default: 5",
    )
    restarts.add_argument(
        "--min-nodes",
        type=int,
        default=1,
        metavar="N",
        help="least number of hosts to run on; default: 1",
    )


def _plan(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    parser.add_argument(
        "--devices", type=int, metavar="N", help="number of ranks; default: from the config"
    )
    parser.add_argument("--device", metavar="NAME", help="h100, h200, a100, a100-40gb or cpu")
    parser.add_argument(
        "--device-memory-gib", type=float, metavar="GIB", help="memory of another device"
    )
    parser.add_argument(
        "--peak-tflops", type=float, metavar="TFLOPS", help="peak of another device"
    )
    parser.add_argument("--mfu", type=float, help="share of the peak that training reaches")
    parser.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help="samples per epoch, where the shards are not here",
    )


def _preflight(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    _ranks(parser)
    _hosts(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file for the table with all its numbers"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds within which all ranks must arrive, and finish each check; default: 120",
    )
    parser.add_argument(
        "--min-free-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="least free room for checkpoints and for the cache; default: what they need",
    )
    parser.add_argument(
        "--max-skew-seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="difference between clocks from which on to warn; default: 1",
    )


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="run folders, or folders of them; default: runs",
    )


def _nothing(parser: argparse.ArgumentParser) -> None:
    del parser


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"))


def _generated(parser: argparse.ArgumentParser, size: int) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--image-size", type=int, default=size, metavar="N", help=f"side in pixels; default: {size}"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def _digits(parser: argparse.ArgumentParser) -> None:
    _generated(parser, 32)
    parser.set_defaults(kind="digits")


def _scenes(parser: argparse.ArgumentParser) -> None:
    _generated(parser, 256)
    parser.add_argument("--num-shards", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000"
    )
    parser.add_argument(
        "--test",
        dest="num_test",
        type=int,
        default=0,
        metavar="N",
        help="scenes in each held-out folder; default: 0",
    )
    parser.set_defaults(kind="scenes")


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder, searched recursively")
    _pairs(parser)
    parser.set_defaults(kind="folder")


def _csv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="table with a header line")
    _pairs(parser)
    parser.add_argument(
        "--image-column", default="filepath", metavar="NAME", help="default: filepath"
    )
    parser.add_argument("--caption-column", default="title", metavar="NAME", help="default: title")
    parser.add_argument(
        "--separator",
        type=lambda word: "\t" if word == r"\t" else word,
        default=r"\t",
        help=r"default: '\t', a tab",
    )
    parser.set_defaults(kind="csv")


def _pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--samples-per-shard",
        type=int,
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
        "--image-size", type=int, metavar="N", help="side in pixels, unless --resize no"
    )
    parser.add_argument(
        "--shuffle-seed",
        type=lambda word: None if word == "none" else int(word),
        default=0,
        metavar="SEED",
        help="seed of the order of pairs; none keeps the order of the source; default: 0",
    )
    _workers(parser)


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        dest="num_workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; default: one per core",
    )


def _shards_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="shards, as in data.train")
    _out(parser)
    parser.add_argument("--max-shards", type=int, metavar="N", help="inspect N, evenly spaced")
    parser.add_argument(
        "--max-samples", type=int, metavar="N", help="read at most N samples, evenly spaced"
    )
    _workers(parser)
    parser.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode images instead of reading only their headers; default: yes",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="folder for copies of remote shards")
    parser.add_argument(
        "--write-sizes",
        action="store_true",
        help="write the number of samples of local shards to sizes.json beside them",
    )


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder of the results"
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("output", type=Path, metavar="FOLDER", help="must not exist, or be empty")
    parser.add_argument(
        "--step", type=int, metavar="N", help="step of the checkpoint; default: the newest"
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


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder with open_clip_config.json and open_clip_model.safetensors, or a "
        ".safetensors file",
    )
    parser.add_argument("output", type=Path, metavar="FOLDER", help="must not exist, or be empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--config", type=Path, metavar="FILE", help="for a file: its open_clip_config.json"
    )
    which.add_argument(
        "--model",
        dest="architecture",
        metavar="NAME",
        help="for a file: open_clip's name of its architecture, such as ViT-B-16",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: unchanged")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="run folder, checkpoint, exported folder, folder of open_clip, or open_clip's "
        "NAME[:TAG]; a NAME alone has random weights",
    )
    _precision(parser)
    _image_size(parser)


def _precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of weights and images; default: fp32",
    )


def _image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side in pixels; default: the size the model was trained on",
    )


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=int,
        default=256,
        metavar="N",
        help="images per forward and process; default: 256",
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=2,
        metavar="N",
        help="decoding processes per process; default: 2",
    )
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="count what is wrong with the folder (unknown or empty classes, images that cannot be "
        "read or have no caption) instead of ending with an error; such images count as wrong",
    )


def _classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes",
        metavar="LIST",
        help="imagenet-1k, imagenet-12k, imagenet-21k-miil, imagenet-21k-miil-w21, "
        "imagenet-21k-goog, imagenet-22k, or a file with one synset per line; default: the data "
        "are in clip_benchmark's layout, which names classes and templates",
    )


def _task(parser: argparse.ArgumentParser) -> None:
    _classes(parser)
    parser.add_argument(
        "--names",
        choices=("lemma", "aliases", "definition", "open_clip"),
        help="the names of the classes in prompts; default: lemma",
    )
    parser.add_argument(
        "--templates",
        metavar="LIST",
        help="one (a photo of a {}.), simple (open_clip's 7), openai (its 80), or a file with one "
        "template per line; default: one",
    )
    _data(parser)


def _zero_shot(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="images: tars named by synsets, folders named by synsets, or webdataset shards; "
        "default: eval.data of the run, with its classes, names and templates",
    )
    _task(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: a folder in the run folder"
    )


def _retrieval(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="images with captions")
    _data(parser)
    _out(parser)


def _probe(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--train", required=True, metavar="FOLDER", help="labelled images to fit to"
    )
    parser.add_argument(
        "--test", required=True, metavar="FOLDER", help="images of the same classes to score on"
    )
    _classes(parser)
    parser.add_argument(
        "--num-neighbors",
        type=int,
        nargs="+",
        default=[10, 20, 100, 200],
        metavar="K",
        help="default: 10 20 100 200",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the choice of validation images; default: 0",
    )
    _data(parser)
    _out(parser)


def _resolution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="models as for zero-shot, optionally labelled as LABEL=MODEL",
    )
    _precision(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="folders as for zero-shot, optionally labelled as LABEL=FOLDER",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[112, 160, 224, 336, 448, 672, 1024],
        metavar="N",
        help="sides in pixels; default: 112 to 1024",
    )
    _task(parser)
    _out(parser)


def _runtime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: docs/results/runtime/<device>"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--what",
        nargs="+",
        choices=("attention", "layer", "block", "vit-s-16", "vit-b-16", "vit-l-16", "text"),
        help="default: all on a GPU; attention, layer, block, vit-s-16 on a CPU",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="default: powers of two from 256 to 4194304 on a GPU, to 65536 on a CPU",
    )
    parser.add_argument(
        "--heads",
        type=int,
        metavar="H",
        help="number of heads of 64 features, in `attention`; default: 12 on a GPU, 1 on a CPU",
    )
    parser.add_argument(
        "--runs", type=int, default=1000, metavar="N", help="timed calls; default: 1000"
    )
    parser.add_argument(
        "--warmup", type=int, default=100, metavar="N", help="calls before them; default: 100"
    )
    parser.add_argument(
        "--max-seconds-per-point",
        type=float,
        default=0.5,
        metavar="S",
        help="time of the runs of one attention at one N; default: 0.5",
    )
    parser.add_argument(
        "--max-seconds-per-call",
        type=float,
        default=20.0,
        metavar="S",
        help="leave out calls predicted to take longer; default: 20",
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=480.0,
        metavar="S",
        help="time for everything, shared equally by --what; default: 480",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of torch on a CPU; default: 1"
    )


def _scaling_laws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_FOLDER",
        help="a run folder, or a folder that holds only run folders",
    )
    _out(parser)
    parser.add_argument(
        "--note",
        default="",
        metavar="TEXT",
        help="a sentence for the summary, on the limits of the runs",
    )
    parser.add_argument(
        "--skip-unfinished",
        action="store_true",
        help="leave out, name and count runs that did not reach their last step or were not "
        "evaluated after it",
    )


def _diagnostics(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="run folders, checkpoints or exported folders of plain ViTs, optionally labelled as "
        "LABEL=MODEL",
    )
    parser.add_argument(
        "--data", required=True, metavar="FOLDER", help="folder in clip_benchmark's layout"
    )
    _out(parser)
    parser.add_argument(
        "--num-images",
        type=int,
        default=64,
        metavar="N",
        help="evenly spaced, with captions; default: 64",
    )
    _image_size(parser)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="longest sequence; default: 4096",
    )


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="results of other commands"
    )
    parser.add_argument("--title", default="Evaluation", help="default: Evaluation")
    _out(parser)


#: Words -> command, in the order of the help.
COMMANDS = {
    ("train",): Command(
        summary="train a model, or resume it; the same command does both",
        add_arguments=_train,
        run="linclip_launch.supervise:run",
        examples="""\
linclip train embedded
linclip train vit_b16 name=my_run "data.train=['/data/laion/{00000..41455}.tar']"
linclip train my_config.yaml --hostfile hosts --supervise""",
    ),
    ("plan",): Command(
        summary="print layout, memory, time and disk of a run, and start nothing",
        add_arguments=_plan,
        run="linclip_launch.plan:run",
        examples="""\
linclip plan vit_l16 --devices 64 --device h100 --num-samples 400000000""",
    ),
    ("preflight",): Command(
        summary="check versions, devices, network, storage and data of all nodes before a run",
        add_arguments=_preflight,
        run="linclip_launch.supervise:run_preflight",
        examples="""\
linclip preflight my_config.yaml
linclip preflight my_config.yaml --hostfile hosts --json preflight.json""",
    ),
    ("runs",): Command(
        summary="show run folders in a table: state, step, loss, last score",
        add_arguments=_runs,
        run="linclip_launch.runs:run",
        examples="""\
linclip runs
linclip runs /data/runs/my_run""",
    ),
    ("eval", "zero-shot"): Command(
        summary="classify images by the names of their classes",
        add_arguments=_zero_shot,
        run="linclip_eval.commands.zero_shot:run",
        examples="""\
linclip eval zero-shot runs/my_run
linclip eval zero-shot runs/my_run --data /data/imagenet-21k --classes imagenet-22k --out scores
deepspeed --module linclip_launch.eval zero-shot runs/my_run        # several processes""",
    ),
    ("eval", "retrieval"): Command(
        summary="find the captions of images and the images of captions",
        add_arguments=_retrieval,
        run="linclip_eval.commands.retrieval:run",
        examples="linclip eval retrieval runs/my_run --data /data/flickr30k --out scores",
    ),
    ("eval", "probe"): Command(
        summary="fit nearest neighbours and a linear probe to frozen features",
        add_arguments=_probe,
        run="linclip_eval.commands.probe:run",
        examples="linclip eval probe runs/my_run --train data/train --test data/test --out scores",
    ),
    ("eval", "resolution"): Command(
        summary="score the same weights over image sizes and data sets",
        add_arguments=_resolution,
        run="linclip_eval.commands.resolution:run",
        examples="""\
linclip eval resolution runs/my_run --data photos=data/photos --sizes 224 448 --out scores""",
    ),
    ("eval", "runtime"): Command(
        summary="measure time and memory over the number of tokens",
        add_arguments=_runtime,
        run="linclip_eval.commands.runtime:run",
        examples="linclip eval runtime --what attention vit-s-16 --out runtime",
    ),
    ("eval", "scaling-laws"): Command(
        summary="fit loss and error over compute, from run folders",
        add_arguments=_scaling_laws,
        run="linclip_eval.commands.scaling_laws:run",
        examples="linclip eval scaling-laws runs --out laws --skip-unfinished",
    ),
    ("eval", "diagnostics"): Command(
        summary="measure the attention of every layer, for models side by side",
        add_arguments=_diagnostics,
        run="linclip_eval.commands.diagnostics:run",
        examples="""\
linclip eval diagnostics linear=runs/a softmax=runs/b --data data/embedded/test --out layers""",
    ),
    ("eval", "report"): Command(
        summary="show the results of other commands as one page",
        add_arguments=_report,
        run="linclip_eval.commands.report:run",
        examples="linclip eval report scores laws layers --out page",
    ),
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
    ("doctor",): Command(
        summary="show versions, devices and limits of this machine, for a bug report",
        add_arguments=_nothing,
        run="linclip_launch.doctor:run",
        examples="linclip doctor",
    ),
    ("completion",): Command(
        summary="print a script that completes commands and options in a shell",
        add_arguments=_completion,
        run="linclip_launch.cli:print_completion",
        examples="""\
linclip completion bash > ~/.local/share/bash-completion/completions/linclip
linclip completion zsh > ~/.zfunc/_linclip""",
    ),
}
