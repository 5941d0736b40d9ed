"""Runs on two ranks; everything that it measures goes to ``<folder>/rank*.json``.

One start, many checks: see test_optimizers.py, which reads the files. A rank's differences are from
training in one process, which every rank does for itself.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import deepspeed
import timm.optim
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ds_linclip.config import OptimConfig
from ds_linclip.engine.ema import ema_weights, track_ema
from ds_linclip.engine.lamb import Lamb
from ds_linclip.engine.optim import build_optimizer, ema_decay, weight_decay_groups
from ds_linclip.engine.zero_state import ParameterPiece, RankState, fill_module
from ds_linclip.parallel.mesh import Axis, Mesh, prepare_for_deepspeed

STEPS = 11
SKIPPED = 5  # its gradients are not finite: ten steps count
OptimKind = Literal["adamw", "lion", "lamb"]
CONFIG = OptimConfig(lr=0.01, weight_decay=0.1)
DECAY = 0.4  # reached by the warm-up after five steps
CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
#: Name -> the engine's dictionary, without what is common to all.
FORMS: dict[str, dict[str, Any]] = {
    "fp32_zero1": {"zero_optimization": {"stage": 1}},
    "fp32_zero2": {"zero_optimization": {"stage": 2}},
    # Small sub-groups, and no parameter too small to be partitioned.
    "fp32_zero3": {
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 40,
            "stage3_param_persistence_threshold": 0,
        }
    },
    "fp32_zero3_persistent": {"zero_optimization": {"stage": 3}},
    "bf16_zero1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    "bf16_zero1_fp32_gradients": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
    },
    "bf16_zero2": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "bf16_zero3": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "sub_group_size": 40},
    },
    "fp32_zero2_offload": {
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 2, **CPU_OFFLOAD},
    },
    "fp32_zero3_offload": {
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, **CPU_OFFLOAD},
    },
}


class Toy(nn.Module):
    """A model of odd sizes: partitions start and end within parameters, and are padded."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 11)
        self.last = nn.Linear(11, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(F.gelu(self.second(self.norm(self.first(inputs)))))


def main(folder: Path) -> None:
    mesh = Mesh.create()
    results = {}
    for kind in get_args(OptimKind):
        expected, averages = train_in_one_process(kind, STEPS)
        for form in (name for name in FORMS if name.startswith("fp32")):
            results[f"{kind}_{form}"] = whole_run(mesh, kind, form, expected, averages)
    results["lamb_tensor_parallel"] = lamb_on_split_parameters(mesh)
    for form in FORMS:
        results[f"resume_{form}"] = resume(mesh, form, folder / form)
    (folder / f"rank{mesh.rank}.json").write_text(json.dumps(results))
    mesh.barrier()
    mesh.close()


def whole_run(
    mesh: Mesh, kind: OptimKind, form: str, expected: dict[str, Tensor], averages: dict[str, Tensor]
) -> dict[str, float]:
    engine = make_engine(mesh, kind, form)
    train(engine, mesh, range(STEPS))
    weights = module_weights(engine)
    inputs, _ = batch(0)
    expected_outputs = functional_call(Toy(), averages, inputs)
    with ema_weights(engine), torch.no_grad():
        found_averages = module_weights(engine)
        outputs = engine(inputs)
    return {
        "outputs": (outputs - expected_outputs).abs().max().item(),
        "skipped": engine.skipped_steps,
        "weights": largest_difference(weights, expected),
        "averages": largest_difference(found_averages, averages),
        "apart": largest_difference(averages, expected),
        "restored": largest_difference(module_weights(engine), weights),
    }


def make_engine(mesh: Mesh, kind: OptimKind, form: str) -> Any:
    torch.manual_seed(0)
    model = Toy()
    optimizer = build_optimizer(model, dataclasses.replace(CONFIG, kind=kind))
    track_ema(optimizer)
    common = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8 // mesh.replicas.size,
        "gradient_clipping": 1.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
    }
    prepare_for_deepspeed()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=common | FORMS[form],
        mpu=mesh.mpu(),
        dist_init_required=False,
    )
    if isinstance(optimizer, Lamb):
        optimizer.attach(engine, mesh)
    return engine


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(2, 8, 5, generator=generator)
    return inputs, targets[:, :3] if step != SKIPPED else targets[:, :3] * torch.inf


def train(engine: Any, mesh: Mesh, steps: Iterable[int]) -> None:
    share = 8 // mesh.replicas.size
    mine = slice(mesh.replicas.rank * share, (mesh.replicas.rank + 1) * share)
    for step in steps:
        set_schedule(engine.optimizer.param_groups, step)
        inputs, targets = batch(step)
        dtype = engine.get_data_types()[0]
        outputs = engine(inputs[mine].to(dtype)).float()
        engine.backward(F.mse_loss(outputs, targets[mine]))
        engine.step()


def set_schedule(groups: list[dict[str, Any]], step: int) -> None:
    for group in groups:
        group["lr"] = CONFIG.lr / (1 + step)
        group["ema_decay"] = ema_decay(step, DECAY)


def train_in_one_process(
    kind: OptimKind, steps: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights after the last step and their averages, computed by hand."""
    torch.manual_seed(0)
    model = Toy()
    if kind == "lamb":
        optimizer: Any = timm.optim.Lamb(
            weight_decay_groups(model, CONFIG.weight_decay),
            betas=CONFIG.betas,
            eps=CONFIG.eps,
            max_grad_norm=None,
        )
    else:
        optimizer = build_optimizer(model, dataclasses.replace(CONFIG, kind=kind))
    averages: dict[str, Tensor] = {}
    for step in range(steps):
        set_schedule(optimizer.param_groups, step)
        inputs, targets = batch(step)
        if step == SKIPPED:
            continue
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            old = averages.get(name, p.detach())
            averages[name] = decay * old + (1 - decay) * p.detach()
    return {name: p.detach() for name, p in model.named_parameters()}, averages


def lamb_on_split_parameters(mesh: Mesh) -> dict[str, float]:
    """Update one matrix split over two tensor-parallel ranks, and another that both have."""
    generator = torch.Generator().manual_seed(0)
    split, both = torch.randn(2, 6, 4, generator=generator)
    gradients = torch.randn(STEPS, 2, 6, 4, generator=generator)
    reference = [nn.Parameter(split.clone()), nn.Parameter(both.clone())]
    mine = slice(3 * mesh.rank, 3 * mesh.rank + 3)
    parameters = [nn.Parameter(split[mine].clone()), nn.Parameter(both.clone())]
    vars(parameters[0])["tensor_model_parallel"] = True
    groups = [{"params": parameters, "weight_decay": 0.1}]
    optimizer = Lamb(groups, lr=0.1, betas=(0.9, 0.98))
    alone = Axis(rank=0, size=1, group=mesh.tp.group)
    tensor_parallel = dataclasses.replace(mesh, replicas=alone, tp=mesh.dp)
    optimizer.attach(SimpleNamespace(optimizer=optimizer), tensor_parallel)
    whole = timm.optim.Lamb(
        reference, lr=0.1, betas=(0.9, 0.98), weight_decay=0.1, max_grad_norm=None
    )
    for step in range(STEPS):
        for p, gradient in zip(reference, gradients[step], strict=True):
            p.grad = gradient.clone()
        parameters[0].grad, parameters[1].grad = gradients[step, 0, mine], gradients[step, 1]
        optimizer.step()
        whole.step()
    return {
        "split": (parameters[0] - reference[0][mine]).abs().max().item(),
        "both": (parameters[1] - reference[1]).abs().max().item(),
        "way": (reference[0] - split).abs().max().item(),
    }


def module_weights(engine: Any) -> dict[str, Tensor]:
    """Return a copy of the weights that the forward uses, gathered under ZeRO-3."""
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().float().clone() for name, p in parameters.items()}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in found)


def resume(mesh: Mesh, form: str, folder: Path) -> dict[str, float]:
    """Take three steps, save, take one more, load, and repeat that one.

    In 16 bits there is no training in one process to compare with to the last digit: the averages
    are kept by hand from the fp32 weights that DeepSpeed shows.
    """
    whole = make_engine(mesh, "adamw", form)
    by_hand: dict[str, Tensor] = {}
    for step in range(3):
        train(whole, mesh, [step])
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, p in whole.module.named_parameters():
            weights = deepspeed.utils.safe_get_full_fp32_param(p)
            by_hand[name] = decay * by_hand.get(name, weights) + (1 - decay) * weights
    save(whole, mesh, folder)
    train(whole, mesh, [3])

    again = make_engine(mesh, "adamw", form)
    load(again, mesh, folder)
    loaded = module_weights(again)
    with ema_weights(again), torch.no_grad():
        loaded_averages = module_weights(again)
        again(batch(0)[0].to(again.get_data_types()[0]))  # as an evaluation within training does
    train(again, mesh, [3])
    weights, expected = module_weights(again), module_weights(whole)
    with ema_weights(whole), ema_weights(again):
        averages, expected_averages = module_weights(again), module_weights(whole)
    dtype = whole.get_data_types()[0]
    rounded = {name: average.to(dtype).float() for name, average in by_hand.items()}
    return {
        "weights": largest_difference(weights, expected),
        "averages": largest_difference(averages, expected_averages),
        "restored": largest_difference(module_weights(again), weights),
        "not_by_hand": share_that_differs(loaded_averages, rounded),
        "apart": share_that_differs(loaded_averages, loaded),
    }


def save(engine: Any, mesh: Mesh, folder: Path) -> None:
    """Save the state like a checkpoint, in a simple file."""
    state = RankState(engine, engine.module, mesh)
    pieces = [
        (p.name, p.start, {k: t.clone() for k, t in p.tensors.items()}) for p in state.pieces()
    ]
    folder.mkdir(exist_ok=True)
    torch.save((pieces, state.scalars()), folder / f"{mesh.rank}.pt")
    mesh.barrier()


def load(engine: Any, mesh: Mesh, folder: Path) -> None:
    """Load what any number of ranks saved."""
    saved = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
    whole: dict[tuple[str, str], dict[int, Tensor]] = {}
    for pieces, _ in saved:
        for name, start, tensors in pieces:
            for kind, tensor in tensors.items():
                whole.setdefault((name, kind), {})[start] = tensor
    full = {key: torch.cat([parts[s] for s in sorted(parts)]) for key, parts in whole.items()}
    state = RankState(engine, engine.module, mesh)
    kinds = sorted({kind for _, kind in full} - {"weight"})

    def read(piece: ParameterPiece, kind: str) -> Tensor:
        return full[piece.name, kind][piece.start : piece.start + piece.numel]

    state.restore(read, kinds, saved[0][1])
    fill_module(engine.optimizer)


def share_that_differs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the share of values that differ by more than the last bits of fp32."""
    far = torch.cat([((found[n] - expected[n]).abs() > 1e-6).flatten() for n in expected])
    return far.float().mean().item()
