"""Check every node before a run, with the config and the overrides of the training:
``deepspeed --hostfile HOSTS --module linclip_launch.preflight CONFIG.yaml key=value ...``;
``python -m linclip_launch.preflight CONFIG.yaml`` checks this process alone.

Prints one table. Exit codes: 0, ready to train; 2, something that a person must mend.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ds_linclip.process.import_gc import quick_start

with quick_start():
    import torch

    from ds_linclip.config import Config, load_config
    from ds_linclip.preflight import (
        Judge,
        Table,
        WriteTest,
        count_shards,
        free_space,
        look_at_machine,
        open_first_shards,
    )
    from ds_linclip.preflight.network_probe import listen, measure_clocks, measure_links, reach
    from ds_linclip.preflight.rendezvous import Failed, Meeting, MeetingError
    from ds_linclip.process.parent_death import end_with_parent
    from linclip_eval.zero_shot.training_evaluator import HeldOutEvaluator


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    if "RANK" in os.environ:
        end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was made is removed first
    table, meeting, is_speaker = Table([]), None, os.environ.get("RANK", "0") == "0"
    try:
        meeting = Meeting.join(arguments.timeout)
        meeting.wait_for_all()
        table = Table(meeting.hosts)
        _check(arguments, meeting, table)
    except MeetingError as error:
        remedy = "see whether these hosts are up, can log in and start python; --timeout gives more"
        rule = f"all ranks must answer within {arguments.timeout:g} s"
        table.fail("answers", str(error), rule, remedy, error.host)
        is_speaker |= not error.is_known_to_rank_zero
    if is_speaker:
        print(f"\n{table.text()}", flush=True)
        if arguments.json:
            _write(arguments.json, table)
    if meeting is not None:
        meeting.close()
    return table.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML experiment")
    parser.add_argument("overrides", nargs="*", help="dotted assignments such as optim.lr=1e-3")
    parser.add_argument("--json", type=Path, help="file for the table with all its numbers")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="seconds within which all ranks must come, and answer each question; "
        "default %(default)s",
    )
    parser.add_argument(
        "--min-free-gib",
        type=float,
        default=0.0,
        help="room that checkpoints and the cache must have at least; default: what they need",
    )
    parser.add_argument(
        "--max-skew-seconds",
        type=float,
        default=1.0,
        help="between clocks, beyond which to warn; default %(default)s",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher, not used")
    return parser


def _check(arguments: argparse.Namespace, meeting: Meeting, table: Table) -> None:
    """Everything, in an order in which later checks can rely on earlier ones."""
    judge = Judge(table, meeting.hosts)
    loaded: list[Config] = []

    def read_config() -> str:
        loaded.append(load_config(arguments.config, arguments.overrides))
        content = json.dumps(asdict(loaded[0]), default=str, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    if not judge.config(meeting.ask("config", read_config), arguments.config):
        table.skip("everything else", why="the config comes first")
        return
    config = loaded[0]
    judge.layout(config)
    machines = meeting.ask("machine", partial(look_at_machine, config))
    if judge.machines(machines):
        _check_links(meeting, table, machines[meeting.rank].device, arguments.max_skew_seconds)
    else:
        table.skip("links", why="devices come first")
    _check_storage(meeting, judge, config)
    spaces = meeting.ask("space", partial(free_space, config), meeting.leaders)
    judge.spaces(spaces, arguments.min_free_gib * 2**30)
    judge.data(
        meeting.ask("all shards", partial(count_shards, config), [0]),
        meeting.ask("first shards", partial(open_first_shards, config), meeting.leaders),
    )
    if config.eval.data is not None:
        open_evaluation = partial(HeldOutEvaluator.from_config, config, device=torch.device("cpu"))
        opened = meeting.ask("held-out data", partial(_time, open_evaluation), meeting.leaders)
        judge.evaluation(opened, config.eval.data)


def _check_links(meeting: Meeting, table: Table, device: torch.device, max_skew: float) -> None:
    if meeting.world_size == 1:
        return
    judge = Judge(table, meeting.hosts)
    after = ("process group", "clocks", "all-reduce")
    with listen() as server:
        # Leaders look at the host before theirs, the first one at the last.
        doors = meeting.ask("listen", lambda: (meeting.address, server.getsockname()[1]))
        leaders = meeting.leaders if len(meeting.leaders) > 1 else []
        before = dict(zip(leaders, [*leaders[-1:], *leaders], strict=False))
        target = doors[before.get(meeting.rank, 0)]
        reached = meeting.ask("reach", lambda: reach(*target, timeout=10), leaders)
    if not judge.ports(reached, meeting.master):
        table.skip(*after, why="ports come first")
        return
    backend = "gloo and nccl" if device.type == "cuda" else "gloo"
    connected = meeting.ask("process group", partial(_time, partial(meeting.connect, device)))
    if not judge.process_group(connected, backend):
        table.skip(*after[1:], why="the process group comes first")
        return
    judge.clocks(meeting.ask("clocks", partial(measure_clocks, meeting.leaders)), max_skew)
    links = meeting.ask("links", partial(measure_links, meeting.hosts, device))
    judge.links(links)


def _check_storage(meeting: Meeting, judge: Judge, config: Config) -> None:
    test = WriteTest(config, meeting.hosts, meeting.rank)
    written: list[float | Failed] = []
    seen: list[float | Failed | None] = []
    try:
        made = meeting.ask("make a folder", test.make, [0])
        if not isinstance(made[0], Failed):
            written = meeting.ask("write", partial(test.write, made[0]))
            good = [rank for rank, each in enumerate(written) if not isinstance(each, Failed)]
            seen = meeting.ask("see", partial(test.see, made[0], good), good)
    finally:
        test.remove()
    judge.storage(made, written, seen, config.output_dir)


def _write(path: Path, table: Table) -> None:
    try:
        path.write_text(table.json())
    except OSError as error:
        print(f"error: --json ({path}) cannot be written: {error}", file=sys.stderr, flush=True)


def _time(fn: Callable[[], object]) -> float:
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # What did not end within its time is still there, and would be waited for.
    os._exit(code)
