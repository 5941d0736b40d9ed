"""Runs on forked ranks: steps that are not finite, trainings that end or rewind because of them.

See test_not_finite.py, which reads what is written here.
"""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.config import Config, load_config
from ds_linclip.data import Batch
from ds_linclip.data.broadcast import broadcast_batches
from ds_linclip.engine.engine import Engine
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer, ema_decay
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.model import CLIP
from ds_linclip.monitoring.metrics import StepMeter
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.resilience.divergence import Diverged
from ds_linclip.trainer import train

#: What one step that is not finite is done to, on two ranks.
FORMS = {
    "fp32_zero1_no_clipping": ["train.precision=fp32", "optim.clip_grad_norm=0"],
    "fp32_zero1_lamb": ["train.precision=fp32", "optim.kind=lamb"],
    "bf16_zero1": ["train.precision=bf16"],
    "bf16_zero1_lion": [
        *("train.precision=bf16", "train.micro_batch_size=2", "optim.kind=lion"),
    ],
    "fp16_zero1": ["train.precision=fp16"],
    "fp32_zero2_lamb": ["train.precision=fp32", "zero.stage=2", "optim.kind=lamb"],
    "bf16_zero2_accumulated": [
        *("train.precision=bf16", "zero.stage=2", "train.micro_batch_size=2"),
    ],
    "bf16_zero2_offload": [
        *("train.precision=bf16", "zero.stage=2", "zero.offload_optimizer=cpu"),
    ],
    "fp32_zero3_lamb": ["train.precision=fp32", "zero.stage=3", "optim.kind=lamb"],
    "bf16_zero3_lion": ["train.precision=bf16", "zero.stage=3", "optim.kind=lion"],
    "fp16_zero3": ["train.precision=fp16", "zero.stage=3"],
    "fp32_tp2": ["train.precision=fp32", "parallel.tp=2"],
    "bf16_cp2": ["train.precision=bf16", "parallel.cp=2"],
    "fp32_pp2": ["train.precision=fp32", "parallel.pp=2", "train.micro_batch_size=2"],
    "bf16_pp2_lion": [
        *("train.precision=bf16", "parallel.pp=2", "train.micro_batch_size=2", "optim.kind=lion"),
    ],
}
BATCH = 8
WHERE_BAD = 7  # the row of the global batch with the bad pixel: the last rank's


def steps_that_are_not_finite(config_file: str, overrides: list[str], folder: Path) -> None:
    """Take two steps, save, take a bad and a good one, load, repeat the good one; in every form."""
    results = {}
    for name in FORMS:
        config = load_config(
            config_file, [*overrides, f"output_dir={folder}", f"name={name}", *FORMS[name]]
        )
        # CPUs support fp16, although DeepSpeed denies it.
        with patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True):
            results[name] = one_form(config)
    mesh = Mesh.create()
    (folder / f"rank{mesh.rank}.json").write_text(json.dumps(results))
    mesh.barrier()
    mesh.close()


def one_form(config: Config) -> dict[str, Any]:
    mesh = Mesh.create(config.parallel)
    engine, checkpoints = make_engine(config, mesh), CheckpointManager(config, mesh, {})
    steps = 0
    while steps - engine.skipped_steps < 2:  # fp16 has to find its loss scale first
        step(engine, config, mesh, steps)
        steps += 1
    start = state_of(engine)
    checkpoints.save(engine, steps, {})
    skips_before = engine.skipped_steps
    seen: dict[str, Any] = {"steps_before": steps, "skips_before": skips_before}

    seen["loss_of_bad_step"] = step(engine, config, mesh, steps, is_bad=True)
    seen["was_skipped"] = engine.was_skipped
    seen["skips"] = engine.skipped_steps - skips_before
    seen["changed_by_bad_step"] = changed(start, state_of(engine))

    first = step(engine, config, mesh, steps + 1)
    after = state_of(engine)
    seen["good_was_skipped"] = engine.was_skipped
    seen["changed_by_good_step"] = changed(start, after)

    newest = checkpoints.newest()
    assert newest is not None
    seen["step_loaded"], _ = checkpoints.load(engine, newest)
    seen["skips_loaded"] = engine.skipped_steps
    seen["changed_by_load"] = changed(start, state_of(engine))
    seen["loss_again"] = [first, step(engine, config, mesh, steps + 1)]
    seen["changed_again"] = changed(after, state_of(engine))
    return seen


def make_engine(config: Config, mesh: Mesh) -> Engine:
    torch.manual_seed(0)
    model = CLIP(config.model, mesh, units=stage_units(config, mesh.pp))
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
    model.train()
    return engine


def step(engine: Engine, config: Config, mesh: Mesh, number: int, *, is_bad: bool = False) -> float:
    generator = torch.Generator().manual_seed(number)
    height, width = config.model.vision.image_size
    images = torch.randn(BATCH, 3, height, width, generator=generator)
    length = config.model.text.context_length
    texts = torch.randint(1, 40000, (BATCH, length), generator=generator)
    if is_bad:
        images[WHERE_BAD, 0, 3, 3] = torch.nan
    local = BATCH // mesh.dp.size
    mine = slice(mesh.dp.rank * local, (mesh.dp.rank + 1) * local)
    lr, decay = config.optim.lr, ema_decay(number, config.optim.ema_decay)
    return engine.step((images[mine], texts[mine]), lr=lr, ema_decay=decay).item()


def state_of(engine: Engine) -> list[Tensor]:
    """Return copies of this rank's weights, master weights, optimizer state and averages."""
    deepspeed = engine.deepspeed_engine
    held = [getattr(p, "ds_tensor", p) for p in deepspeed.module.parameters()]
    for master, state in deepspeed.optimizer.optimizer.state.items():
        held.append(master)
        held += [torch.as_tensor(state[name]) for name in sorted(state)]
    return [tensor.detach().clone() for tensor in held]


def changed(before: list[Tensor], after: list[Tensor]) -> int:
    """Return how many tensors differ in any bit."""
    assert len(before) == len(after)
    # As bytes: the unwritten padding of ZeRO's partitions may hold NaN, unequal to itself.
    pairs = zip(before, after, strict=True)
    return sum(not _bytes(a).equal(_bytes(b)) for a, b in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def end_for_skipped_steps(config: Config) -> None:
    """Train with a bad pixel on the last rank from the fifth batch on; then resume without."""
    mesh = Mesh.create(config.parallel)

    def poisoned(*arguments: Any) -> Iterator[Batch]:
        for number, batch in enumerate(broadcast_batches(*arguments), start=arguments[3]):
            if number >= 4 and mesh.rank == mesh.world_size - 1:
                batch.images[-1, 0, 0, 0] = torch.nan
            yield batch

    message = None
    try:
        with patch("ds_linclip.trainer.broadcast_batches", poisoned):
            train(config, mesh)
    except Diverged as error:
        message = str(error)
    kept = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*"))
    (config.run_dir / f"ended-{mesh.rank}.json").write_text(json.dumps([message, kept]))
    mesh.barrier()
    train(config, mesh)
    mesh.close()


def rewind_after_a_spike(whole: Config, again: Config, bad: int) -> None:
    """Train with a loss ten times too large on batch ``bad``, where a save is requested, too; then
    again from the last checkpoint but one."""
    mesh = Mesh.create(whole.parallel)
    current = [0]

    def watched(*arguments: Any) -> Iterator[Batch]:
        start, skipped = arguments[3:]
        for step, batch in enumerate(broadcast_batches(*arguments), start=start):
            assert batch.images.shape[2:] == whole.image_size_at(step)
            current[0] = step + skipped
            if current[0] == bad - 1 and mesh.rank == 0:
                os.kill(os.getpid(), signal.SIGUSR1)  # all ranks know of it one step later
            yield batch

    class Jumping(StepMeter):
        def read(self, loss: Tensor) -> dict[str, float]:
            values = super().read(loss)
            return values | {"train/loss": values["train/loss"] * (10 if current[0] == bad else 1)}

    with (
        patch("ds_linclip.trainer.broadcast_batches", watched),
        patch("ds_linclip.trainer.StepMeter", Jumping),
    ):
        train(whole, mesh)
        if mesh.rank == 0:
            checkpoints = again.run_dir / "checkpoints"
            shutil.copytree(whole.run_dir / "checkpoints", checkpoints)
            shutil.rmtree(checkpoints / f"step-{whole.train.steps:08d}")
        mesh.barrier()
        train(again, mesh)
    mesh.close()
