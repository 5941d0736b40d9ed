"""Runs on two ranks that it forks; what it finds goes to ``<folder>/results.json``.

One start, many checks: see test_memory.py, which reads the file.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from bench_memory import QUICK, QUICK_ZERO, Layout, fork_ranks, run
from bench_memory_report import MemoryReport

from ds_linclip.config import Config, load_config
from ds_linclip.model import CLIP
from ds_linclip.optim import build_optimizer
from ds_linclip.parallel.engine import initialize_engine
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.stages import stage_units

VIT_B16 = Path(__file__).parents[2] / "ds_configs" / "train" / "vit_b16.yaml"
LAYOUTS = [
    Layout(ranks=2, precision=precision, stage=stage, micro_batches=micro_batches)
    for precision, micro_batches in (("fp32", 1), ("bf16", 2))
    for stage in (1, 2, 3)
]
#: What is offloaded -> the overrides; every one trains at every stage that has it.
OFFLOADS = {
    "optimizer": ["zero.offload_optimizer=cpu"],
    "optimizer_and_param": ["zero.offload_optimizer=cpu", "zero.offload_param=cpu"],
    "param": ["zero.offload_param=cpu"],
}
STEPS = 4


def main(folder: Path) -> None:
    rows = {layout.name: run(layout, QUICK, QUICK_ZERO) for layout in LAYOUTS}
    plans = {
        name: [
            {
                "kept": r.kept,
                "kept_planned": r.kept_planned,
                "step": r.step,
                "step_planned": r.step_planned,
            }
            for r in same
        ]
        for name, same in rows.items()
    }
    facts = {"device": "a CPU", "deepspeed": "", "date_utc": "", "commit": ""}
    MemoryReport(facts, [row for same in rows.values() for row in same]).write(folder)
    differences = {
        f"zero{stage}_{micro_batches}": offload_differences(stage, micro_batches)
        for stage in (1, 2, 3)
        for micro_batches in (1, 2)
    }
    pipeline = offload_differences(1, 2, "parallel.pp=2")
    results = {"memory": plans, "offload": differences, "pipeline": pipeline}
    (folder / "results.json").write_text(json.dumps(results))


def offload_differences(stage: int, micro_batches: int, *overrides: str) -> dict[str, list[float]]:
    """Per way of offloading: largest relative difference of a loss, and of a weight."""
    common = [
        *(f"zero.stage={stage}", f"train.micro_batch_size={4 // micro_batches}"),
        *overrides,
    ]
    losses, weights = train(common)
    found = {}
    for name, offload in OFFLOADS.items():
        if "param" in name and stage < 3:
            continue
        other_losses, other_weights = train([*common, *offload])
        apart = (other_weights - weights).norm() / weights.norm()
        found[name] = [(other_losses / losses - 1).abs().max().item(), apart.item()]
    return found


def train(overrides: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        is_pipeline = "parallel.pp=2" in overrides
        fixed = [
            *(f"output_dir={folder}", "parallel.device=cpu", "zero.deepspeed_config=null"),
            *("eval.data=null", "train.precision=fp32"),
            f"train.global_batch_size={4 if is_pipeline else 8}",
        ]
        config = load_config(VIT_B16, [*fixed, *QUICK, *overrides])
        fork_ranks(2, train_rank, config)
        return torch.load(Path(folder, "trained.pt"))


def train_rank(rank: int, config: Config) -> None:
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
        if rank == 0:
            torch.save((torch.stack(losses), weights), Path(config.output_dir, "trained.pt"))
    mesh.barrier()
    mesh.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
