"""``linclip plan``: the layout, memory, time and disk of a run, without starting it."""

import argparse
from dataclasses import fields

from ds_linclip.config import load_config
from ds_linclip.planner.run_plan import Target, plan_run

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Print the plan of a command line.

    Raises:
        ValueError: for a wrong config or device, or, after the plan, when a rank does not fit.
    """
    config = load_config(options.config, options.overrides)
    target = {each.name: getattr(options, each.name) for each in fields(Target)}
    if options.devices is None:
        parallel = config.parallel
        target["devices"] = (parallel.dp or 1) * parallel.tp * parallel.pp * parallel.cp
    plan, problem = plan_run(config, Target(**target))
    print(plan, flush=True)
    if problem is not None:
        raise ValueError(problem)
