"""Runs under ``deepspeed``: ``remote_job.py CONFIG RUNS [overrides]``, one training after another.

RUNS is JSON, the overrides of each run. One start of the launcher: see test_remote_training.py.
"""

import json
import logging
import sys

from ds_linclip.config import load_config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.trainer import train

if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    config, runs, *overrides = arguments
    logging.basicConfig(level=logging.WARNING)
    mesh = Mesh.create()
    for run in json.loads(runs):
        train(load_config(config, [*overrides, *run]), mesh)
    mesh.barrier()
    mesh.close()
