"""One rank of a training run. ``linclip train`` starts these; so do ``deepspeed --module
linclip_launch.train CONFIG key=value ...``, ``torchrun -m linclip_launch.train ...`` and ``srun``.

On SIGTERM to any rank, all ranks save the current step and leave; on SIGUSR1 they save and
continue. Exit codes: see :class:`ds_linclip.process.exit_codes.ExitCode`.
"""

import argparse
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

from ds_linclip.process.import_gc import gc_paused
from ds_linclip.process.number_text import format_figure

with gc_paused():
    from ds_linclip.config import Config, load_config
    from ds_linclip.parallel.mesh import Mesh
    from ds_linclip.process.consensus import AgreedCrash, AgreedError
    from ds_linclip.process.exit_codes import ExitCode
    from ds_linclip.process.parent_death import end_with_launcher
    from ds_linclip.resilience.divergence import Diverged
    from ds_linclip.resilience.preemption import Preempted
    from ds_linclip.resilience.watchdog import collective_timeout, watched
    from ds_linclip.trainer import TrainResult, train
    from linclip_eval.training.evaluators import Evaluators


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    if "RANK" in os.environ:  # started by a launcher, which may be killed before it ends its ranks
        end_with_launcher()
    try:
        config = load_config(arguments.config, arguments.overrides)
        mesh = Mesh.create(config.parallel, collective_timeout(config.watchdog))
    except ValueError as error:
        return _fail_before_start(error)
    try:
        evaluator = mesh.agree(partial(_open_evaluators, config, mesh))
        with watched(config, mesh) as progress:
            result = train(config, mesh, evaluator, progress)
    except AgreedError as error:
        return _end_together(mesh, f"error: {error}", ExitCode.USER_ERROR)
    except Diverged as error:
        return _end_together(mesh, f"error: {error}", ExitCode.DIVERGED)
    except Preempted as reason:
        return _end_together(mesh, f"{reason}; start again to resume", ExitCode.PREEMPTED)
    except AgreedCrash as error:
        return _end_together(mesh, f"error: {error}", ExitCode.FAILED)
    if mesh.rank == 0:
        print(_summary(config, result), flush=True)
    mesh.close()
    return ExitCode.FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file, or the name of a config of the package")
    parser.add_argument("overrides", nargs="*", help="settings, such as optim.lr=1e-3")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher, not used")
    return parser


def _end_together(mesh: Mesh, message: str, code: ExitCode) -> int:
    """Print a message on rank 0. All ranks wait for it, since the launcher ends the others once one
    has left."""
    if mesh.rank == 0:
        print(message, file=sys.stderr, flush=True)
    mesh.barrier()
    return code


def _fail_before_start(error: ValueError) -> int:
    """Print an error on one rank of each node. The others wait for it, since the launcher ends all
    ranks of a node once one has left."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(60)
    return ExitCode.USER_ERROR


def _open_evaluators(config: Config, mesh: Mesh) -> Evaluators | None:
    return Evaluators.from_config(config, device=mesh.device, group=mesh.dp.group)


def _summary(config: Config, result: TrainResult) -> str:
    rows = [("steps", f"{result.steps}")]
    if result.last:
        rows.append(("loss", f"{result.last['train/loss']:.4f}"))
        rows.append(("samples/s", format_figure(result.last["perf/samples_per_second"])))
    scores = result.evaluation.items()
    rows += [
        (tag.removeprefix("eval/"), str(value) if isinstance(value, int) else f"{value:.4f}")
        for tag, value in scores
    ]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {value:>10}" for name, value in rows)
    if result.data_findings:
        table = "\n  ".join([f"{table}\n\ndata:", *result.data_findings])
    tensorboard = Path(sys.executable).with_name("tensorboard")
    return (
        f"\n{config.name}\n{table}\n\n"
        f"run folder:  {config.run_dir}\n"
        f"tensorboard: {tensorboard} --logdir {config.run_dir / 'tensorboard'}"
    )


if __name__ == "__main__":
    sys.exit(main())
