"""Commands that score and measure models."""

import argparse

from linclip_launch.arguments.command import (
    Command,
    add_out,
    path,
    path_text,
    positive_number,
    share,
    whole_number,
)

__all__ = ["EVALUATION_COMMANDS"]


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=path_text,
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
        type=whole_number(1),
        metavar="N",
        help="side in pixels; default: the size the model was trained on",
    )


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="images per forward and process; default: 256",
    )
    parser.add_argument(
        "--num-workers",
        type=whole_number(0),
        default=2,
        metavar="N",
        help="decoding processes per process; default: 2",
    )
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="count what is wrong with the folder (unknown or empty classes, missing tars, images "
        "that cannot be read or have no caption) instead of ending with an error; images that are "
        "there count as wrong",
    )
    parser.add_argument(
        "--max-bad-samples",
        type=whole_number(0),
        metavar="N",
        help="images that may be unreadable; they are counted, as wrong; default: 0",
    )


def _classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes",
        type=path_text,
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
        type=path_text,
        metavar="LIST",
        help="one (a photo of a {}.), simple (open_clip's 7), openai (its 80), or a file with one "
        "template per line; default: one",
    )
    _data(parser)


def _zero_shot(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--data",
        type=path_text,
        metavar="FOLDER",
        help="images: tars named by synsets, folders named by synsets, or webdataset shards; "
        "default: eval.data of the run, with its classes, names and templates",
    )
    _task(parser)
    parser.add_argument(
        "--out", type=path, metavar="FOLDER", help="default: a folder in the run folder"
    )


def _retrieval(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--data", type=path_text, required=True, metavar="FOLDER", help="images with captions"
    )
    _data(parser)
    add_out(parser)


def _probe(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--train", type=path_text, required=True, metavar="FOLDER", help="labelled images to fit to"
    )
    parser.add_argument(
        "--test",
        type=path_text,
        required=True,
        metavar="FOLDER",
        help="images of the same classes to score on",
    )
    _classes(parser)
    parser.add_argument(
        "--num-neighbors",
        type=whole_number(1),
        nargs="+",
        default=[10, 20, 100, 200],
        metavar="K",
        help="default: 10 20 100 200",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="of the choice of validation images; default: 0",
    )
    _data(parser)
    add_out(parser)


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
        type=whole_number(1),
        nargs="+",
        default=[112, 160, 224, 336, 448, 672, 1024],
        metavar="N",
        help="sides in pixels; default: 112 to 1024",
    )
    _task(parser)
    add_out(parser)


def _runtime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path, metavar="FOLDER", help="default: docs/results/runtime/<device>"
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
        type=whole_number(1),
        nargs="+",
        metavar="N",
        help="default: powers of two from 256 to 4194304 on a GPU, to 65536 on a CPU",
    )
    parser.add_argument(
        "--heads",
        type=whole_number(1),
        metavar="H",
        help="number of heads of 64 features, in `attention`; default: 12 on a GPU, 1 on a CPU",
    )
    parser.add_argument(
        "--runs", type=whole_number(1), default=1000, metavar="N", help="timed calls; default: 1000"
    )
    parser.add_argument(
        "--warmup",
        type=whole_number(0),
        default=100,
        metavar="N",
        help="calls before them; default: 100",
    )
    parser.add_argument(
        "--max-seconds-per-point",
        type=positive_number,
        default=0.5,
        metavar="S",
        help="time of the runs of one attention at one N; default: 0.5",
    )
    parser.add_argument(
        "--max-seconds-per-call",
        type=positive_number,
        default=20.0,
        metavar="S",
        help="leave out calls predicted to take longer; default: 20",
    )
    parser.add_argument(
        "--budget-seconds",
        type=positive_number,
        default=480.0,
        metavar="S",
        help="time for everything, shared equally by --what; default: 480",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="of torch on a CPU; default: 1",
    )


def _scaling_laws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=path,
        metavar="RUN_FOLDER",
        help="a run folder, or a folder that holds only run folders",
    )
    add_out(parser)
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
        "--data",
        type=path_text,
        required=True,
        metavar="FOLDER",
        help="folder in clip_benchmark's layout",
    )
    add_out(parser)
    parser.add_argument(
        "--num-images",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="evenly spaced, with captions; default: 64",
    )
    _image_size(parser)
    parser.add_argument(
        "--max-tokens",
        type=whole_number(1),
        default=4096,
        metavar="N",
        help="longest sequence; default: 4096",
    )


def _audit(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--question",
        choices=("match", "parts"),
        default="match",
        help="match: does a caption belong to an image, from image and caption; parts: which class "
        "has an image, from its centre and its surroundings; default: match",
    )
    parser.add_argument(
        "--data",
        type=path_text,
        required=True,
        metavar="FOLDER",
        help="images with captions for match, as for retrieval; with classes for parts, as for "
        "zero-shot",
    )
    parser.add_argument(
        "--bins",
        type=whole_number(2),
        default=5,
        metavar="N",
        help="clusters of each source, at most 20 and 50 samples per cell; default: 5",
    )
    parser.add_argument(
        "--groups",
        type=whole_number(2),
        metavar="N",
        help="of parts: groups that the classes are joined to; default: each by itself",
    )
    parser.add_argument(
        "--centre-share",
        type=share,
        metavar="S",
        help="of parts: share of the image's area that is its centre; default: 0.5",
    )
    parser.add_argument(
        "--repeats",
        type=whole_number(20),
        default=200,
        metavar="N",
        help="shuffles, and bootstrap samples; default: 200",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="of pairs, clusters, shuffles and bootstrap; default: 0",
    )
    _task(parser)
    add_out(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", type=path, nargs="+", metavar="FOLDER", help="results of other commands"
    )
    parser.add_argument("--title", default="Evaluation", help="default: Evaluation")
    add_out(parser)


EVALUATION_COMMANDS = {
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
    ("eval", "audit"): Command(
        summary="decompose what decisions are made from: image, caption, centre, surroundings",
        add_arguments=_audit,
        run="linclip_eval.commands.audit:run",
        examples="""\
linclip eval audit runs/my_run --data /data/flickr30k --out audit
linclip eval audit runs/my_run --question parts --groups 4 --data data/photos --out audit""",
    ),
    ("eval", "report"): Command(
        summary="show the results of other commands as one page",
        add_arguments=_report,
        run="linclip_eval.commands.report:run",
        examples="linclip eval report scores laws layers --out page",
    ),
}
