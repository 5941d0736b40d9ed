"""The process groups of one run, made once and passed on as one object.

Only this package imports megatron's ``parallel_state``; everyone else asks the :class:`Mesh`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ds_linclip.config import ParallelConfig

__all__ = ["AgreedError", "Mesh"]

T = TypeVar("T")


class AgreedError(ValueError):
    """A user's error that every rank knows of and raises at the same point."""


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: its device and its place on the data and tensor axes.

    Ranks of one tensor-parallel group see the same samples; contrastive negatives come from
    ``dp_group`` only.
    """

    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup

    @classmethod
    def create(cls, config: ParallelConfig | None = None) -> "Mesh":
        """Start torch.distributed and the groups of both axes, or reuse those already there.

        A process started by a launcher (``RANK`` and ``WORLD_SIZE`` in the environment) joins the
        others: nccl between GPUs, gloo between CPUs. Any other process becomes a world of one,
        without touching the network.

        Raises:
            ValueError: when the ranks do not fit ``config.dp`` and ``config.tp``, or when there are
                fewer GPUs than ranks on this node.
        """
        config = config or ParallelConfig()
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        if dist.is_initialized():
            world_size = dist.get_world_size()
        else:
            world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
        _check_sizes(config, world_size)
        device = _select_device(config, launched)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            if launched:
                _join_launched_group(backend)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        _split_axes(config.tp)
        return cls(
            device=device,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            dp_group=parallel_state.get_data_parallel_group(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def agree(self, fn: Callable[[], T], errors: tuple[type[Exception], ...] = (ValueError,)) -> T:
        """Run ``fn`` on every rank; if it fails on any, every rank raises the same error.

        An error that one rank alone finds (a missing file, say) would otherwise leave the others
        waiting for it. Every rank must call this at the same point.

        Args:
            fn: what to run; returns this rank's result.
            errors: the exceptions that travel. Any other one is a bug and ends its own rank.

        Raises:
            AgreedError: with the message of the lowest failing rank, naming the failing ranks
                unless all of them failed.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = fn()
        except errors as error:
            failure = error
        message = str(failure) if failure is not None else None
        messages: list[str | None] = [message]
        if self.world_size > 1:
            messages = [None] * self.world_size
            dist.all_gather_object(messages, message)
        failed = [rank for rank, text in enumerate(messages) if text is not None]
        if not failed:
            return cast(T, result)
        where = ""
        if len(failed) < self.world_size:
            ranks = ", ".join(map(str, failed))
            where = f" (on rank{'s' if len(failed) > 1 else ''} {ranks} of {self.world_size})"
        raise AgreedError(f"{messages[failed[0]]}{where}") from failure

    def gather(self, value: T) -> list[T]:
        """What every data-parallel rank gives, which can be pickled, in rank order, to all."""
        values = [value] * self.dp_size
        if self.dp_size > 1:
            dist.all_gather_object(values, value, group=self.dp_group)
        return values

    def from_rank_zero(self, fn: Callable[[], T]) -> T:
        """Run ``fn`` on rank 0 and give its result, which can be pickled, to every rank.

        Raises:
            AgreedError: on every rank, when ``fn`` raised ValueError.
        """
        result = self.agree(lambda: fn() if self.rank == 0 else None)
        received = [result]
        if self.world_size > 1:
            dist.broadcast_object_list(received, src=0)
        return cast(T, received[0])

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """End the process groups; the last thing a process does with its mesh."""
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()

    def mpu(self) -> Any:
        """What ``deepspeed.initialize`` takes as ``mpu``; ask for it right before that call."""
        _switch_off_shared_memory_op()
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, even in a world of one
        return _DeepSpeedGroups()


class _DeepSpeedGroups:
    """megatron's ``parallel_state`` with the three questions that DeepSpeed asks besides."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())


def _check_sizes(config: ParallelConfig, world_size: int) -> None:
    if config.tp < 1 or world_size % config.tp:
        raise ValueError(
            f"parallel.tp ({config.tp}) must divide the number of ranks ({world_size})"
        )
    dp_size = world_size // config.tp
    if config.dp is not None and config.dp != dp_size:
        raise ValueError(
            f"parallel.dp ({config.dp}) must equal the number of ranks divided by parallel.tp "
            f"({world_size} / {config.tp} = {dp_size})"
        )


def _select_device(config: ParallelConfig, launched: bool) -> torch.device:
    """This rank's own GPU, or the CPU. Where there are GPUs, "auto" never falls back to the CPU
    unless DeepSpeed is told to (``DS_ACCELERATOR=cpu``)."""
    num_gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    asked_of_deepspeed = os.environ.get("DS_ACCELERATOR")
    if config.device == "cpu" or (
        config.device == "auto" and (num_gpus == 0 or asked_of_deepspeed == "cpu")
    ):
        # DeepSpeed otherwise looks for itself, and would take a GPU that is to stay unused.
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    # The deepspeed launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    local_size = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    needed = int(local_size or 1) if launched else 1
    if num_gpus < needed:
        raise ValueError(
            f"parallel.device ({config.device}) needs a GPU for each of the {needed} ranks on this "
            f"node, found {num_gpus}"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if launched else 0)
    torch.cuda.set_device(device)
    return device


def _join_launched_group(backend: str) -> None:
    import deepspeed

    _switch_off_shared_memory_op()
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _switch_off_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its CPU all-reduce, which takes minutes the first time."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _split_axes(tp: int) -> None:
    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_tensor_model_parallel_world_size() == tp:
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, create_gloo_process_groups=False
    )
