"""Commands that start, plan, check and list runs, and those about this machine."""

import argparse

from linclip_launch.arguments.command import (
    Command,
    number,
    path,
    positive_number,
    whole_number,
)

__all__ = ["MACHINE_COMMANDS", "TRAINING_COMMANDS"]


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
        type=whole_number(1),
        metavar="N",
        help="ranks on this machine; default: as many as the config sets, one per GPU, or two on "
        "the CPU where there is none",
    )


def _hosts(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--hostfile", type=path, metavar="FILE", help="lines of 'host slots=N'")
    parser.add_argument(
        "--include", default="", metavar="HOSTS", help="hosts and slots to use: node1@node2:0,1"
    )
    parser.add_argument(
        "--exclude", default="", metavar="HOSTS", help="hosts and slots to leave out"
    )


def _linearize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=path,
        metavar="MODEL",
        help="the softmax model: a run folder, a checkpoint, or a folder that `linclip import` or "
        "`linclip export` has written",
    )
    _train(parser)
    parser.add_argument(
        "--attention",
        default="linear",
        metavar="KIND",
        help="the new attention: a kind of model.vision.attention, or with its settings "
        "'{kind: linear, normalized: true}'; default: linear",
    )
    parser.add_argument(
        "--tower",
        choices=("vision", "text", "both"),
        default="both",
        help="towers whose attention changes; default: both",
    )
    parser.add_argument(
        "--output", type=path, required=True, metavar="FOLDER", help="folder of runs and models"
    )
    parser.add_argument(
        "--shares",
        type=number,
        nargs=3,
        default=[0.3, 0.6, 0.1],
        metavar=("TRANSFER", "DISTIL", "FINISH"),
        help="parts of train.steps that the stages take, 0 to leave one out; default: 0.3 0.6 0.1",
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
        type=whole_number(0),
        metavar="N",
        help="without ssh: the number of this host in the hostfile; ranks are started here only",
    )
    hosts.add_argument(
        "--master-addr", metavar="ADDRESS", help="address of the first host; default: its name"
    )
    hosts.add_argument(
        "--master-port",
        type=whole_number(1),
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
        type=positive_number,
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
        type=whole_number(0),
        default=3,
        metavar="N",
        help="failures in a row without a newer checkpoint before giving up; default: 3",
    )
    restarts.add_argument(
        "--backoff-seconds",
        type=number,
        default=5.0,
        metavar="S",
        help="wait before a restart; default: 5",
    )
    restarts.add_argument(
        "--min-nodes",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="least number of hosts to run on; default: 1",
    )


def _plan(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    parser.add_argument(
        "--devices",
        type=whole_number(1),
        metavar="N",
        help="number of ranks; default: from the config",
    )
    parser.add_argument("--device", metavar="NAME", help="h100, h200, a100, a100-40gb or cpu")
    parser.add_argument(
        "--device-memory-gib", type=positive_number, metavar="GIB", help="memory of another device"
    )
    parser.add_argument(
        "--peak-tflops", type=positive_number, metavar="TFLOPS", help="peak of another device"
    )
    parser.add_argument(
        "--mfu", type=positive_number, help="share of the peak that training reaches"
    )
    parser.add_argument(
        "--num-samples",
        type=whole_number(1),
        metavar="N",
        help="samples per epoch, where the shards are not here",
    )


def _preflight(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    _ranks(parser)
    _hosts(parser)
    parser.add_argument(
        "--json", type=path, metavar="FILE", help="file for the table with all its numbers"
    )
    parser.add_argument(
        "--timeout",
        type=positive_number,
        default=120.0,
        metavar="S",
        help="seconds within which all ranks must arrive, and finish each check; default: 120",
    )
    parser.add_argument(
        "--min-free-gib",
        type=number,
        default=0.0,
        metavar="GIB",
        help="least free room for checkpoints and for the cache; default: what they need",
    )
    parser.add_argument(
        "--max-skew-seconds",
        type=number,
        default=1.0,
        metavar="S",
        help="difference between clocks from which on to warn; default: 1",
    )


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="*",
        type=path,
        metavar="FOLDER",
        help="run folders, or folders of them; default: runs",
    )


def _nothing(parser: argparse.ArgumentParser) -> None:
    del parser


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"))


TRAINING_COMMANDS = {
    ("train",): Command(
        summary="train a model, or resume it; the same command does both",
        add_arguments=_train,
        run="linclip_launch.supervise:run",
        examples="""\
linclip train embedded
linclip train vit_b16 name=my_run "data.train=['/data/laion/{00000..41455}.tar']"
linclip train my_config.yaml --hostfile hosts --supervise""",
    ),
    ("linearize",): Command(
        summary="turn a softmax model into one with linear attention, by distillation",
        add_arguments=_linearize,
        run="linclip_launch.linearize:run",
        examples="""\
linclip linearize runs/my_softmax embedded train.steps=200 --output linear
linclip linearize imported vit_b16.yaml --attention inline --output linear --hostfile hosts""",
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
}
MACHINE_COMMANDS = {
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
