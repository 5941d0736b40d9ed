"""Check every node before a run, with the config and the overrides of the training:
``deepspeed --hostfile HOSTS --module linclip_launch.preflight CONFIG.yaml key=value ...``;
``python -m linclip_launch.preflight CONFIG.yaml`` checks this process alone.

Prints one table. Exit codes: 0, ready to train; 2, a person must fix something.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ds_linclip.process.import_gc import gc_paused

with gc_paused():
    import torch

    from ds_linclip.parallel.mesh import select_device
    from ds_linclip.preflight import network_probe, node_checks, storage_checks, table
    from ds_linclip.preflight.rendezvous import Rendezvous, RendezvousError
    from ds_linclip.process.parent_death import end_with_parent
    from linclip_eval.zero_shot.training_evaluator import HeldOutEvaluator


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    if "RANK" in os.environ:
        end_with_parent()
    # Raise in the main thread, so that the folder of the write test is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results: list[table.CheckResult] = []
    rendezvous, is_speaker = None, os.environ.get("RANK", "0") == "0"
    try:
        rendezvous = Rendezvous.join(arguments.timeout)
        rendezvous.wait_for_all()
        for result in _check(arguments, rendezvous):
            results.append(result)  # one by one: those before an error stay
    except RendezvousError as error:
        problems = table.problems_if(
            [(error.host, str(error))],
            f"all ranks must answer within {arguments.timeout:g} s",
            "see whether these hosts are up, allow ssh and start python; --timeout gives more",
        )
        results.append(table.CheckResult(check="answers", found=str(error), problems=problems))
        is_speaker |= not error.is_known_to_rank_zero
    if is_speaker:
        print(f"\n{table.format_table(results)}", flush=True)
        if arguments.json:
            hosts = rendezvous.hosts if rendezvous else []
            _write(arguments.json, table.format_json(results, hosts))
    if rendezvous is not None:
        rendezvous.close()
    return table.exit_code_of(results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("config", help="YAML experiment")
    add("overrides", nargs="*", help="dotted assignments such as optim.lr=1e-3")
    add("--json", type=Path, help="file for the table with all its numbers")
    limit = "seconds within which all ranks must arrive, and finish each check; default %(default)s"
    add("--timeout", type=float, default=120.0, help=limit)
    room = "least free room for checkpoints and for the cache; default: what they need"
    add("--min-free-gib", type=float, default=0.0, help=room)
    skew = "difference between clocks from which on to warn; default %(default)s"
    add("--max-skew-seconds", type=float, default=1.0, help=skew)
    add("--local_rank", type=int, help="set by the deepspeed launcher, not used")
    return parser


def _check(arguments: argparse.Namespace, rendezvous: Rendezvous) -> Iterator[table.CheckResult]:
    """Yield the results of all checks, in an order in which later ones can rely on earlier ones."""
    loaded, config = node_checks.check_config(rendezvous, arguments.config, arguments.overrides)
    yield loaded
    if loaded.problems or config is None:
        yield from table.skipped("needs the config", "everything else")
        return
    yield node_checks.check_layout(rendezvous.hosts, config)
    nodes, can_communicate = node_checks.check_nodes(rendezvous, config)
    yield from nodes
    if not can_communicate:
        yield from table.skipped("needs the devices", "network")
    elif rendezvous.world_size > 1:
        device = select_device(config.parallel)
        yield from network_probe.check_network(rendezvous, device, arguments.max_skew_seconds)
    yield storage_checks.check_output_folder(rendezvous, config)
    yield from node_checks.check_disk_space(rendezvous, config, arguments.min_free_gib * 2**30)
    yield storage_checks.check_training_data(rendezvous, config)
    if config.eval.data is not None:
        open_evaluation = partial(HeldOutEvaluator.from_config, config, device=torch.device("cpu"))
        yield storage_checks.check_held_out_data(rendezvous, config.eval.data, open_evaluation)


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content)
    except OSError as error:
        print(f"error: --json ({path}) cannot be written: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads whose check did not finish are still there, and would be waited for.
    os._exit(code)
