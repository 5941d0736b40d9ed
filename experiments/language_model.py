"""A causal language model as a benchmark of attention: bits per byte, recall, speed and memory.

``python -m experiments.language_model [TEXT ...]`` trains a small byte-level model with every kind
of attention on text files or on the captions of tars (without any, on the manual that comes with
Python), trains a smaller one on associative recall, and measures tokens per second and memory over
the length of the context. It writes runs.jsonl, summary.md and figure.png. Recorded runs are not
repeated, so that an interrupted study continues where it stopped.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import BenchmarkParser
from benchmarks.attention.zoo import SLOW
from ds_linclip.process.atomic import write_atomically
from ds_linclip.process.progress import progress
from experiments.causal_model import KINDS
from experiments.language_model_report import draw, to_sections
from experiments.language_model_training import (
    RECALL_TASKS,
    Device,
    TextSettings,
    measure_speed,
    train_recall,
    train_text,
)
from experiments.text_data import Corpus, pair_bits, read_corpus
from linclip_eval.results import write_report

__all__ = ["Job", "main"]

TASKS = ("speed", "text", "recall")
_MEASURED = ("ds_linclip", "kernels", "experiments")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: a task with a kind of attention.

    Attributes:
        seed: Of weights and batches; 0 for "speed".
        length: Tokens of a sequence for "speed" and "recall", otherwise 0.
    """

    task: Literal["speed", "text", "recall"]
    kind: str
    seed: int = 0
    length: int = 0


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    settings = _settings(parser, arguments)
    processes = arguments.processes or os.cpu_count() or 1
    if arguments.device == "cuda":
        processes = 1
    try:
        corpus = read_corpus(arguments.text, held_out_bytes=arguments.held_out_bytes)
        longest = sum(len(document) + 1 for document in corpus.training) - 1
        if settings.context > longest:
            raise ValueError(
                f"context ({settings.context}) must be less than the training text: take at most "
                f"{longest}"
            )
        output, facts = parser.begin(arguments, arguments.device, _MEASURED)
        common = _common(settings, corpus, arguments.device)
        _keep_settings(output, common)
        log = output / "runs.jsonl"
        finished = _finished(log)
        jobs = plan(arguments.kinds, arguments.tasks, arguments.seeds, settings.contexts)
        missing = [job for job in jobs if job not in finished]
        for record in run_all(missing, settings, corpus, arguments.device, processes):
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
    except ValueError as error:
        parser.error(str(error))
    print(_report(output, settings, corpus, facts))
    return 0


def plan(
    kinds: Sequence[str], tasks: Sequence[str], seeds: int, contexts: Sequence[int]
) -> list[Job]:
    """Return the runs of a study: speed first, then all kinds of a seed before the next seed."""
    jobs = []
    if "speed" in tasks:
        jobs += [Job(task="speed", kind=kind, length=n) for kind, n in product(kinds, contexts)]
    for seed in range(seeds):
        if "text" in tasks:
            jobs += [Job(task="text", kind=kind, seed=seed) for kind in kinds]
        if "recall" in tasks:
            lengths = product(RECALL_TASKS, kinds)
            jobs += [Job(task="recall", kind=kind, seed=seed, length=n) for n, kind in lengths]
    return jobs


def run_all(
    jobs: Sequence[Job], settings: TextSettings, corpus: Corpus, device: Device, processes: int
) -> Iterator[dict[str, Any]]:
    """Run jobs and yield their records: what measures time and memory first and by itself, in a
    process for every kind, then the others, ``processes`` at a time."""
    speeds: dict[str, list[Job]] = {}
    for job in jobs:
        if job.task == "speed":
            speeds.setdefault(job.kind, []).append(job)
    others = [[job] for job in jobs if job.task != "speed"]
    if processes > 1:
        os.environ["TQDM_DISABLE"] = "1"  # in the runs: tqdm reads it when a process imports it
    with progress(total=len(jobs), desc="runs", unit="run") as bar:
        for groups, at_a_time, is_alone in (
            (list(speeds.values()), 1, True),
            (others, processes, False),
        ):
            context, per_process = get_context("spawn"), 1 if is_alone else None
            with ProcessPoolExecutor(at_a_time, context, max_tasks_per_child=per_process) as pool:
                futures = [pool.submit(_run, each, settings, corpus, device) for each in groups]
                try:
                    for future in as_completed(futures):
                        records = future.result()
                        yield from records
                        bar.update(len(records))
                finally:
                    pool.shutdown(cancel_futures=True)


def _run(
    jobs: Sequence[Job], settings: TextSettings, corpus: Corpus, device: Device
) -> list[dict[str, Any]]:
    records = []
    for job in jobs:
        if job.task == "speed":
            result = measure_speed(job.kind, job.length, settings, device)
        elif job.task == "recall":
            result = train_recall(job.kind, job.length, job.seed, settings, device)
        else:
            result = train_text(job.kind, job.seed, settings, corpus, device)
        records.append({**asdict(job), "attention": str(KINDS[job.kind]), **result})
    return records


def _parser() -> BenchmarkParser:
    parser = BenchmarkParser("language_model", __doc__, "--out")
    parser.add_argument("text", nargs="*", help="text files, or tars with captions (patterns)")
    quick = [kind for kind in KINDS if kind not in SLOW]
    about = f"of {', '.join(KINDS)}; default: all but {', '.join(SLOW)}"
    parser.add_argument("--kinds", nargs="+", default=quick, metavar="KIND", help=about)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, help="runs at a time on the CPU; default: cores")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256, help="tokens of a training sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recall-steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate on text")
    parser.add_argument("--held-out-bytes", type=int, default=131072)
    lengths = [256, 512, 1024, 2048, 4096]
    about = "lengths to measure; each must divide the longest"
    parser.add_argument("--contexts", type=int, nargs="+", default=lengths, help=about)
    return parser


def _settings(parser: BenchmarkParser, arguments: Any) -> TextSettings:
    """Check the numbers of the command line."""
    sizes = ["width", "layers", "heads", "context", "batch", "steps", "recall_steps", "lr"]
    parser.check_positive(arguments, *sizes, "seeds", "held_out_bytes", "contexts")
    if arguments.processes is not None:
        parser.check_positive(arguments, "processes")
    for kind in arguments.kinds:
        if kind not in KINDS:
            parser.error(f"kinds ({kind}) must be known: take some of {', '.join(KINDS)}")
    if arguments.width % arguments.heads:
        parser.error(f"width ({arguments.width}) must be divisible by heads ({arguments.heads})")
    for length in arguments.contexts:
        if max(arguments.contexts) % length:
            parser.error(f"contexts ({length}) must divide the longest ({max(arguments.contexts)})")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("device (cuda) must be available: take cpu")
    contexts = tuple(sorted(set(arguments.contexts)))
    return TextSettings(**{name: getattr(arguments, name) for name in sizes}, contexts=contexts)


def _report(output: Path, settings: TextSettings, corpus: Corpus, facts: Mapping[str, str]) -> str:
    """Write the summary of all recorded runs, and return it."""
    done = _finished(output / "runs.jsonl")
    order = [job for job in done if job.kind in KINDS]
    order.sort(key=lambda job: (list(KINDS).index(job.kind), job.length, job.seed))
    records = [done[job] for job in order]
    sizes = [len(document) for document in corpus.held_out]
    text = sum(map(len, corpus.training))
    about = (
        f"{settings.layers} causal blocks of width {settings.width}, {settings.heads} heads, "
        f"context {settings.context}; {settings.steps} steps of {settings.batch} sequences, from "
        f"{text:,} bytes in {len(corpus.training)} documents; {settings.recall_steps} steps of a "
        "smaller model on associative recall."
    )
    return write_report(
        output,
        title="A causal language model with every attention",
        sections=[
            about,
            *to_sections(records, sizes, pair_bits(corpus), RECALL_TASKS),
            "![Bits per byte, recall, speed and memory](figure.png)",
        ],
        facts=facts,
        figures={"figure.png": draw(records, sizes, RECALL_TASKS)},
    )


def _common(settings: TextSettings, corpus: Corpus, device: Device) -> dict[str, Any]:
    """Return what all runs of a folder share."""
    digest = hashlib.sha256()
    for document in (*corpus.training, *corpus.held_out):
        digest.update(hashlib.sha256(document).digest())
    text = {
        "training_documents": len(corpus.training),
        "training_bytes": sum(map(len, corpus.training)),
        "held_out_documents": len(corpus.held_out),
        "held_out_bytes": sum(map(len, corpus.held_out)),
        "sha256": digest.hexdigest(),
    }
    common = {
        "device": device,
        "model": asdict(settings),
        "recall": [asdict(task) for task in RECALL_TASKS.values()],
    }
    return {**common, "text": text}


def _keep_settings(output: Path, common: dict[str, Any]) -> None:
    path, text = output / "settings.json", json.dumps(common, indent=1) + "\n"
    if not path.exists():
        write_atomically(path, text)
    elif path.read_text() != text:
        raise ValueError(f"out ({output}) must be another folder: {path} has other settings")


def _finished(log: Path) -> dict[Job, dict[str, Any]]:
    """Return the recorded runs.

    Raises:
        ValueError: for a run whose kind had other settings of attention.
    """
    lines = log.read_text().splitlines() if log.exists() else []
    done = {}
    for record in map(json.loads, lines):
        job = Job(**{name: record[name] for name in Job.__dataclass_fields__})
        if job.kind in KINDS and record["attention"] != str(KINDS[job.kind]):
            raise ValueError(
                f"out ({log.parent}) must be another folder: {job.kind} was {record['attention']}"
            )
        done[job] = record
    return done


if __name__ == "__main__":
    sys.exit(main())
