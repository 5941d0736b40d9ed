"""One rank of ``linclip preflight``, which checks every node with the config of a training run:
``deepspeed --hostfile HOSTS --module linclip_launch.preflight CONFIG key=value ...``.

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
from linclip_launch.cli import parse

with gc_paused():
    import torch

    from ds_linclip.parallel.mesh import select_device
    from ds_linclip.preflight import network_probe, node_checks, storage_checks, table
    from ds_linclip.preflight.rendezvous import Rendezvous, RendezvousError
    from ds_linclip.process.parent_death import end_with_launcher
    from linclip_eval.training.evaluators import Evaluators


def check(arguments: argparse.Namespace) -> int:
    """Run all checks together with the other ranks, print the table, and return the exit code."""
    if "RANK" in os.environ:
        end_with_launcher()
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
    sets = [each.data for each in (config.eval, *config.eval.sets)]
    held_out = [each for each in (*sets, config.eval.validation.shards) if each is not None]
    if held_out:
        open_evaluation = partial(Evaluators.from_config, config, device=torch.device("cpu"))
        where = ", ".join(held_out)
        yield storage_checks.check_held_out_data(rendezvous, where, open_evaluation)


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content)
    except OSError as error:
        print(f"error: --json ({path}) cannot be written: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    code = check(parse(["preflight", *words])[0])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads whose check did not finish are still there, and would be waited for.
    os._exit(code)
