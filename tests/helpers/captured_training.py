"""Trains on one device in a process of its own, and prints losses and the number of CUDA graphs.

Usage: python -m helpers.captured_training CONFIG [KEY=VALUE ...]
"""

import json
import sys

from torch._inductor.cudagraph_trees import get_manager

from ds_linclip.config import load_config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.trainer import train


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[2:])
    mesh = Mesh.create(config.parallel)
    train(config, mesh)
    manager = None
    if mesh.device.type == "cuda":
        manager = get_manager(mesh.device.index, create_if_none_exists=False)
    num_graphs = 0 if manager is None else manager.new_graph_id().id
    mesh.close()
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r]
    print(json.dumps({"losses": losses, "graphs": num_graphs}))


if __name__ == "__main__":
    main()
