"""Train CLIP: ``deepspeed launch/train.py CONFIG.yaml key=value ...``.

SIGTERM to any rank: all save the step that they stand at and leave. SIGUSR1: save and go on. Exit
codes: see :class:`ds_linclip.exit_codes.ExitCode`.
"""

import argparse
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

from ds_linclip.config import Config, load_config
from ds_linclip.data import DataError
from ds_linclip.exit_codes import ExitCode
from ds_linclip.health import Diverged
from ds_linclip.orphans import end_with_parent
from ds_linclip.parallel.mesh import AgreedError, Mesh
from ds_linclip.requests import Preempted
from ds_linclip.trainer import TrainResult, train
from ds_linclip.watchdog import watched
from linclip_eval.held_out import HeldOutEvaluator


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "config", help="YAML experiment, for example ds_configs/train/embedded.yaml"
    )
    parser.add_argument("overrides", nargs="*", help="dotted assignments such as optim.lr=1e-3")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher, not used")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    if "RANK" in os.environ:  # started by a launcher, which is to end its ranks and may be killed
        end_with_parent()
    try:
        config = load_config(arguments.config, arguments.overrides)
        mesh = Mesh.create(config.parallel)
    except ValueError as error:
        return _fail_before_start(error)
    try:
        evaluator = mesh.agree(partial(_open_evaluator, config, mesh))
        with watched(config, mesh) as progress:
            result = train(config, mesh, evaluator, progress)
    except AgreedError as error:
        return _end_together(mesh, f"error: {error}", ExitCode.USER_ERROR)
    except Diverged as error:
        return _end_together(mesh, f"error: {error}", ExitCode.DIVERGED)
    except Preempted as reason:
        return _end_together(mesh, f"{reason}; start again to go on", ExitCode.PREEMPTED)
    except DataError as error:
        # The other ranks wait for this one: leave at once, and the launcher ends them. The line is
        # one write, or those of several ranks mix.
        sys.stderr.write(f"error: rank {mesh.rank}: {error}\n")
        sys.stderr.flush()
        os._exit(ExitCode.USER_ERROR)
    if mesh.rank == 0:
        print(_summary(config, result), flush=True)
    mesh.close()
    return ExitCode.FINISHED


def _end_together(mesh: Mesh, message: str, code: ExitCode) -> int:
    """Rank 0 speaks for all; none leaves before it has, since the launcher then ends the rest."""
    if mesh.rank == 0:
        print(message, file=sys.stderr, flush=True)
    mesh.barrier()
    return code


def _fail_before_start(error: ValueError) -> int:
    """One rank of each node speaks; the others wait for it, since the launcher ends all ranks of a
    node as soon as one has left."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(60)
    return ExitCode.USER_ERROR


def _open_evaluator(config: Config, mesh: Mesh) -> HeldOutEvaluator | None:
    if config.eval.data is None:
        return None
    return HeldOutEvaluator.from_config(config, device=mesh.device, group=mesh.dp.group)


def _summary(config: Config, result: TrainResult) -> str:
    rows = [("steps", f"{result.steps}")]
    if result.last:
        rows += [
            ("loss", f"{result.last['train/loss']:.4f}"),
            ("samples/s", f"{result.last['perf/samples_per_second']:.0f}"),
        ]
    rows += [
        (tag.removeprefix("eval/"), f"{value:.4f}") for tag, value in result.evaluation.items()
    ]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {value:>10}" for name, value in rows)
    tensorboard = Path(sys.executable).with_name("tensorboard")
    board = config.run_dir / "tensorboard"
    return (
        f"\n{config.name}\n{table}\n\n"
        f"run folder:  {config.run_dir}\n"
        f"tensorboard: {tensorboard} --logdir {board}"
    )


if __name__ == "__main__":
    sys.exit(main())
