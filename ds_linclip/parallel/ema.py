"""The running average of the weights: sharded, saved and restored as the optimizer's state is."""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, optim

__all__ = ["add_ema_to_universal", "ema_weights", "load_universal", "track_ema"]

_KEY = "ema"


def track_ema(optimizer: optim.Optimizer) -> None:
    """Let ``optimizer`` keep the average of what it updates; before ``deepspeed.initialize``.

    The average is in fp32 like the weights that DeepSpeed's optimizer owns: 4 bytes per parameter,
    divided by the ranks from ZeRO-1 on. The first step starts it, every further one moves it by
    ``1 - group["ema_decay"]``, which the training loop sets before the step as it does ``lr``. A
    step that is skipped for an overflow leaves the average alone.
    """
    optimizer.register_step_post_hook(_update)


@contextmanager
def ema_weights(engine: Any) -> Iterator[None]:
    """The averages in place of the weights of ``engine.module``; every rank calls it together.

    Before the first step there is no average and the weights stay. Needs no extra memory: weights
    and averages change places in the optimizer, and DeepSpeed fills the module from there, as it
    does after a step; bit for bit the same again afterwards. No training step within.
    """
    _exchange(engine.optimizer)
    try:
        yield
    finally:
        _exchange(engine.optimizer)


def add_ema_to_universal(checkpoint: Path, universal: Path) -> None:
    """Add the averages to a checkpoint that DeepSpeed has converted; it leaves them out.

    Args:
        checkpoint: folder with what the engine saved. What tensor-parallel ranks hold of a weight
            is put together by its first dimension, as the conversion does.
        universal: folder with the result of the conversion.
    """
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    files = {_places(path): path for path in checkpoint.glob("*zero_pp_rank_*_optim_states.pt")}
    ranks = 1 + max(rank for _, rank in files)
    for place in sorted(files):  # a stage has names of its own; tensor-parallel ranks share them
        saved = torch.load(files[place], map_location="cpu", weights_only=False)
        for name, piece in _pieces(saved["optimizer_state_dict"], checkpoint, place[1], ranks):
            pieces[name].append(piece)
    for name, parts in pieces.items():
        folder, average = universal / "zero" / name, torch.cat(parts)
        weights = torch.load(folder / "fp32.pt", map_location="cpu", weights_only=False)
        if isinstance(weights, dict):  # stages 1 and 2
            torch.save({"param": average.view_as(weights["param"])}, folder / f"{_KEY}.pt")
        else:
            torch.save(average, folder / f"{_KEY}.pt")


def load_universal(engine: Any, folder: Path, tag: str) -> None:
    """Let the engine load ``folder / tag``, a checkpoint in universal form, and its averages.

    Stages 1 and 2 load every file. At stage 3 DeepSpeed 0.19.8 looks for Adam's state alone, gives
    all parameter groups the weight decay of the first, and all sub-groups one and the same tensor
    to count their steps in.
    """
    zero = engine.optimizer
    weight_decays = [group["weight_decay"] for group in zero.param_groups]
    engine.load_checkpoint(str(folder), tag=tag)
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        return
    for group, weight_decay in zip(zero.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay
    for flat, params in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        state = zero.optimizer.state[flat]
        state["step"] = deepcopy(state["step"])
        sources = [folder / tag / "zero" / zero.param_names[p] for p in params]
        if all((source / f"{_KEY}.pt").exists() for source in sources):
            parts = [
                zero.load_hp_checkpoint_state(str(source), _KEY, param=p)
                for source, p in zip(sources, params, strict=True)
            ]
            state[_KEY] = torch.cat(parts).to(flat)


def _places(path: Path) -> tuple[int, int]:
    """Model-parallel rank (pipeline and tensor) and data-parallel rank that saved a file."""
    found = re.search(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_", path.name)
    assert found
    return int(found[2]), int(found[1])


def _pieces(
    saved: dict[str, Any], checkpoint: Path, rank: int, ranks: int
) -> Iterator[tuple[str, Tensor]]:
    """What one rank holds of every parameter's average, by name."""
    if "param_slice_mappings" in saved:  # stages 1 and 2
        states = saved["base_optimizer_state"]["state"]
        for index, addresses in enumerate(saved["param_slice_mappings"]):
            for name, address in addresses.items():
                if _KEY in states.get(index, {}):
                    yield name, states[index][_KEY].narrow(0, address.start, address.numel).clone()
        return
    model = next(checkpoint.glob("*_model_states.pt"))
    shapes = torch.load(model, map_location="cpu", weights_only=False)["param_shapes"]
    states = saved["optimizer_state_dict"]["state"]
    for index, sub_group in enumerate(shapes):
        start = 0
        for name, shape in sub_group.items():
            part = -(-shape.numel() // ranks)
            used = min(part, max(0, shape.numel() - part * rank))  # the rest is padding
            if _KEY in states.get(index, {}):
                yield name, states[index][_KEY].narrow(0, start, used).clone()
            start += part


@torch.no_grad()
def _update(optimizer: optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Runs for every group (ZeRO-1 and 2) or sub-group (ZeRO-3): only what was updated is there."""
    for group in optimizer.param_groups:
        for weights in group["params"]:
            state = optimizer.state.get(weights)
            if not state:  # never updated; an entry here would keep the optimizer from starting
                continue
            if _KEY in state:
                state[_KEY].lerp_(weights, 1 - group["ema_decay"])
            else:
                state[_KEY] = weights.detach().clone()


def _exchange(zero: Any) -> None:
    states = getattr(zero, "optimizer", zero).state
    for weights, state in states.items():
        if _KEY in state:
            weights.data, state[_KEY] = state[_KEY], weights.data
    _fill_module(zero)


@torch.no_grad()
def _fill_module(zero: Any) -> None:
    """Copy the weights that DeepSpeed's optimizer owns into the module, as its ``step`` does."""
    if hasattr(zero, "update_lp_params"):  # stages 1 and 2
        zero.update_lp_params()
    elif hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()
    elif hasattr(zero, "fp32_groups"):  # stage 0 in 16 bits
        for masters, copies in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
            for master, copy in zip(masters, copies, strict=True):
                copy.copy_(master)
