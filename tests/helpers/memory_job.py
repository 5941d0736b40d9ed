"""Measure memory on two forked ranks; write memory.json and the report into a folder.

One start, many checks: see test_memory.py, which reads the files.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.memory.bench_memory import QUICK, QUICK_ZERO, run
from benchmarks.memory.report import totals, write_memory_report
from ds_linclip.config import load_config
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers import REPOSITORY

VIT_B16 = REPOSITORY / "ds_configs" / "train" / "vit_b16.yaml"
COMMON = ["train.precision=fp32", "train.global_batch_size=2", "train.micro_batch_size=1"]
#: Name -> overrides without offloading, and those of every way to offload.
OPTIMIZER, PARAM = "zero.offload_optimizer=cpu", "zero.offload_param=cpu"
OFFLOADS = {
    "zero2": (["zero.stage=2", "train.micro_batch_size=2"], [[OPTIMIZER]]),
    "zero3": (["zero.stage=3"], [[OPTIMIZER, PARAM]]),
    "pipeline": (["parallel.pp=2", "train.micro_batch_size=4"], [[OPTIMIZER]]),
}
STEPS = 3


def main(folder: Path) -> None:
    rows = {
        f"zero{stage}": run(2, [*QUICK, *COMMON, f"zero.stage={stage}"], QUICK_ZERO)
        for stage in (1, 2, 3)
    }
    facts = {"device": "a CPU", "date_utc": "today", "commit": "unknown", "command": "memory_job"}
    write_memory_report(folder, facts, [row for same in rows.values() for row in same])
    run_ranks(2, compare_offloading, folder)
    memory = {
        name: [[*totals(row, "kept")[::-1], *totals(row, "step")[::-1]] for row in same]
        for name, same in rows.items()
    }
    (folder / "memory.json").write_text(json.dumps(memory))


def compare_offloading(folder: Path) -> None:
    """Write the largest relative difference of a loss, and of the weights, for every offloading."""
    found: dict[str, list[float]] = {}
    for name, (common, ways) in OFFLOADS.items():
        losses, weights = train(common)
        for way in ways:
            other_losses, other_weights = train([*common, *way])
            apart = (other_weights - weights).norm() / weights.norm()
            key = " ".join([name, *way])
            found[key] = [(other_losses / losses - 1).abs().max().item(), apart.item()]
    mesh = Mesh.create()
    (folder / f"offload{mesh.rank}.json").write_text(json.dumps(found))
    mesh.close()


def train(overrides: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses [STEPS] and the final weights, flat in one tensor."""
    fixed = ["zero.deepspeed_config=null", "parallel.device=cpu", "eval.data=null"]
    fixed += ["train.precision=fp32", "train.global_batch_size=8"]
    config = load_config(VIT_B16, [*fixed, *QUICK, *overrides])
    mesh = Mesh.create(config.parallel)
    torch.manual_seed(0)
    model = CLIP(config.model, mesh, units=stage_units(config, mesh.pp))
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
    local, length = config.train.global_batch_size // mesh.dp.size, config.model.text.context_length
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(1 + step * mesh.dp.size + mesh.dp.rank)
        images = torch.randn(local, 3, *config.model.vision.image_size, generator=generator)
        texts = torch.randint(config.model.text.vocab_size, (local, length), generator=generator)
        losses.append(engine.step((images, texts), lr=1e-3))
    with engine.evaluation_model() as whole:
        weights = torch.cat([p.flatten() for p in whole.parameters()])
    return torch.stack(losses), weights


if __name__ == "__main__":
    main(Path(sys.argv[1]))
