"""The command line ``linclip``: help, mistakes, tables."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from typing import get_args

import pytest

from ds_linclip.config import load_config, save_config
from ds_linclip.data.prepare.image_text_files import ResizeMode
from ds_linclip.inference import PRECISIONS
from ds_linclip.interop.hub_folder import DTYPES
from ds_linclip.planner.run_plan import DEVICES
from helpers import EMBEDDED
from linclip_eval.commands.inputs import parse_sources
from linclip_eval.runtime.measure import Limits
from linclip_eval.runtime.subjects import SUBJECTS
from linclip_eval.zero_shot.class_lists import IMAGENET_LISTS, NamePolicy
from linclip_launch.arguments import COMMANDS
from linclip_launch.cli import main, parse, parsers

#: Prints the modules that all helps together have imported.
HELPS = """
import contextlib, io, sys
from linclip_launch.arguments import COMMANDS
from linclip_launch.cli import main, parsers
for name in parsers():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*name, "--help"])
    assert out.getvalue().startswith("usage: linclip"), name
    assert name not in COMMANDS or f"examples:\\n  linclip {' '.join(name)}" in out.getvalue(), name
print(*sys.modules)
"""


def test_help_of_every_command_has_examples_and_loads_nothing_large():
    done = subprocess.run(
        [sys.executable, "-c", HELPS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    large = {"torch", "numpy", "deepspeed", "omegaconf", "pydantic", "open_clip", "matplotlib"}
    assert large.isdisjoint(done.stdout.split())


def choices_of(*command, option):
    (action,) = (each for each in parsers()[command]._actions if option in each.option_strings)
    return tuple(action.choices)


def test_choices_are_those_of_the_code():
    """Arguments repeat them, so that help imports nothing that takes long."""
    assert choices_of("eval", "zero-shot", option="--precision") == tuple(PRECISIONS)
    assert choices_of("eval", "zero-shot", option="--names") == get_args(NamePolicy)
    assert choices_of("eval", "runtime", option="--what") == tuple(SUBJECTS)
    assert choices_of("shards", "make", "csv", option="--resize") == get_args(ResizeMode)
    assert choices_of("export", option="--dtype") == tuple(DTYPES)
    assert all(name in parsers()["eval", "probe"].format_help() for name in IMAGENET_LISTS)
    assert all(name in parsers()[("plan",)].format_help() for name in DEVICES)
    runtime = parsers()["eval", "runtime"]
    for name in ("runs", "warmup", "max_seconds_per_point", "max_seconds_per_call"):
        assert runtime.get_default(name) == getattr(Limits, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "trian embedded",
            "error: unknown command 'trian': did you mean train? (see linclip --help)",
        ),
        ("eval zeroshot", "error: unknown command 'zeroshot': did you mean zero-shot?"),
        ("shards make pictures", "error: unknown command 'pictures': one of csv, folder, digits"),
        ("export runs/a out --dtype fp8", "error: argument --dtype: invalid choice: 'fp8'"),
        ("export runs/a out --stepp 3", "error: unrecognized arguments: --stepp"),
        ("eval zero-shot", "error: the following arguments are required: MODEL (see linclip eval"),
        ("runs nowhere", "error: folder (nowhere) does not exist"),
        ("runs .", "error: folder (.) holds no run folder"),
        (
            "train embedded --hostfile hosts --ranks 2",
            "error: --ranks and --hostfile exclude each other: each says where ranks start",
        ),
        ("train embedded --node-rank 0", "error: --node-rank needs --hostfile"),
        ("preflight embedded --include node1", "error: --include needs --hostfile"),
        ("train", "error: the following arguments are required: CONFIG (see linclip train"),
        ("plan embeded", "error: config (embeded) must be a file, or one of embedded, embedded_"),
        ("plan no/such.yaml", "error: config (no/such.yaml) cannot be read"),
    ],
)
def test_mistake_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words.split())
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("base: $HOME/base.yaml\nname: '007'\n")
    (tmp_path / "base.yaml").write_text("{}")
    for words, message in (
        (["runs", "~"], f"folder ({tmp_path}) holds no run folder"),
        (["export", "~/a", "out"], f"run folder ({tmp_path}/a) does not exist"),
        (["import", "in", "out", "--config=~/a.json"], "in"),
        (["plan", "~/run.yaml"], "train.steps (0) must be greater than 0"),
        (
            ["runs", "~no-such-user"],
            "argument FOLDER: must be a path, with ./ before",
        ),
        (["export", "", "out"], "argument RUN_OR_CHECKPOINT: must be a path, "),
    ):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        assert code == 2
        assert message in capsys.readouterr().err
    options, _ = parse(["eval", "probe", "~/m", "--train=~/a", "--test=~/b", "--out=~/c"])
    assert (options.model, options.train) == (f"{tmp_path}/m", f"{tmp_path}/a")
    assert (options.test, options.out) == (f"{tmp_path}/b", tmp_path / "c")
    assert parse_sources(["a=~/b", "c"], "MODEL") == {"a": f"{tmp_path}/b", "c": "c"}


#: Words that are no number, path or choice of any argument.
NO_VALUE = ("None", "x", "", "nan", "inf", "-inf", "1.5.2", "-3", "1e400", "0x10")


def test_argument_of_the_wrong_type_states_the_rule(capsys):
    """Every argument of every command that takes a number or a path."""
    seen, found = set(), parsers()
    for name in COMMANDS:
        for action in found[name]._actions:
            if action.type is None:
                continue
            refused = []
            for word in NO_VALUE:
                try:
                    found[name]._get_values(action, [word])
                except argparse.ArgumentError as error:
                    message = str(error)
                    assert re.search(
                        rf": must be a (whole number >= \d+(, or none)?|number >=? 0|"
                        rf"number between 0 and 1|path, with ./ before a ~), "
                        rf"not {re.escape(repr(word))}$",
                        message,
                    ), message
                    refused.append(word)
            assert refused or action.dest == "separator", (name, action.dest)
            seen.add(action.dest)
    assert {"shuffle_seed", "source", "out", "batch_size", "timeout", "max_restarts"} <= seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("shards make folder a b --shuffle-seed None", "must be a whole number >= 0, or none, not"),
        ("shards make digits a --image-size 0", "must be a whole number >= 1, not '0'"),
        ("eval probe m --train a --test b --out c --seed -1", "must be a whole number >= 0, not"),
        ("eval runtime --budget-seconds nan", "must be a number > 0, not 'nan'"),
        ("preflight embedded --max-skew-seconds -0.5", "must be a number >= 0, not '-0.5'"),
    ],
)
def test_bad_number_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "linclip_eval.commands.report", None)
    monkeypatch.delitem(sys.modules, "linclip_eval.commands.report")
    monkeypatch.setitem(sys.modules, "markdown", None)
    assert main(["eval", "report", "a", "--out", "b"]) == 2
    assert "markdown is not installed: pip install 'ds_linclip[eval]'" in capsys.readouterr().err


def test_runs_are_a_table(tmp_path, capsys):
    for name, steps in (("a", 20), ("b", 10), ("c", 30)):
        folder = tmp_path / name
        (folder / "checkpoints" / f"step-{10:08d}").mkdir(parents=True)
        save_config(
            load_config(EMBEDDED, [f"train.steps={steps}", "optim.warmup_steps=1"]),
            folder / "config.yaml",
        )
        (folder / "starts.jsonl").write_text("{}\n")
        records = [
            {"step": 5, "train/loss": 4.5, "eval/zeroshot_top1": 0.25},
            {"step": 10, "train/loss": 3.25},
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines + '{"step": 11, "tra')
        (folder / "lock").touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "c" / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    assert main(["runs", str(tmp_path)]) == 0
    holder.communicate()
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:6] == ["run", "state", "step", "of", "loss", "score"]
    score = ["3.2500", "zeroshot_top1", "0.2500", "10"]
    assert [row[:8] for row in rows] == [
        ["a", "stopped", "10", "20", *score],
        ["b", "finished", "10", "10", *score],
        ["c", "running", "10", "30", *score],
    ]


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_doctor_names_versions_and_limits(capsys):
    assert main(["doctor"]) == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"python", "ds_linclip", "torch", "triton", "cpu", "memory", "driver", "limits"} <= set(
        table
    )
    assert table["torch"][0].isdigit()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_of_the_shell(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name[-1] in script for name in COMMANDS)
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
