"""Measure how time and memory of softmax and linear attention grow with the number of tokens.

Measures what arXiv 2604.10064 does: one layer, one block and whole towers on a sequence of N
tokens, in inference and in training, over many runs after a warm-up; and the bare operator.
"""

import argparse
import logging
import time
from pathlib import Path

import torch

from ds_linclip.config import ParallelConfig
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.provenance import device_name, folder_name
from linclip_eval.commands import outputs
from linclip_eval.runtime.measure import Limits, measure_in_turn
from linclip_eval.runtime.report import write_runtime_report
from linclip_eval.runtime.subjects import SUBJECTS, Subject

__all__ = ["run"]

logger = logging.getLogger(__name__)

#: Fields of :class:`Limits` that are options.
_LIMITS = ("runs", "warmup", "max_seconds_per_point", "max_seconds_per_call")
#: Device -> defaults of the command line.
_WHAT = {"cpu": ["attention", "layer", "block", "vit-s-16"], "cuda": list(SUBJECTS)}
_TOKENS = {"cpu": [2**i for i in range(8, 17)], "cuda": [2**i for i in range(8, 23)]}
_NUM_HEADS = {"cpu": 1, "cuda": 12}
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def run(options: argparse.Namespace) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    begin = time.monotonic()
    limits = Limits(**{name: getattr(options, name) for name in _LIMITS})
    mesh = Mesh.create(ParallelConfig(device=options.device))
    device = mesh.device.type
    out = options.out or Path("docs/results/runtime") / folder_name(device_name(device))
    out.mkdir(parents=True, exist_ok=True)
    if device == "cpu":
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    subjects = list(dict.fromkeys(options.what or _WHAT[device]))
    tokens = sorted(set(options.tokens or _TOKENS[device]))
    num_heads = options.heads or _NUM_HEADS[device]
    threads = f", {options.threads} threads" if device == "cpu" and options.threads > 1 else ""
    dtype = str(_DTYPES[device]).removeprefix("torch.")
    conditions = (
        f"Limits: {limits.runs} runs after {limits.warmup} to warm up, or "
        f"{limits.max_seconds_per_point:g} s of runs, in {limits.passes} passes over all N; "
        f"{limits.max_seconds_per_call:g} s for a call; {options.budget_seconds:g} s for "
        f"everything. {dtype}{threads}; `attention` has {num_heads} heads."
    )
    facts = outputs.command_facts(options.words, device)
    workloads = (Subject(what, mesh, _DTYPES[device], num_heads=num_heads) for what in subjects)
    deadline = begin + options.budget_seconds
    summary = ""
    for points in measure_in_turn(workloads, len(subjects), tokens, limits, deadline=deadline):
        # Written after every subject, so that an interruption loses no more than one.
        summary = write_runtime_report(
            out, points, facts=facts, conditions=conditions, runs=limits.runs
        )
        logger.info("%s: done after %.0f s", points[-1].what, time.monotonic() - begin)
    print(summary)
    mesh.close()
