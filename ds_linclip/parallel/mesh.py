"""The process groups of one run, made once and passed on as one object.

Only this package imports megatron's ``parallel_state``; everyone else asks the :class:`Mesh`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ds_linclip.config import ParallelConfig, check_ranks
from ds_linclip.process import consensus

__all__ = ["Axis", "Mesh", "select_device"]

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """This process's place on one axis of the mesh."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: its device and its place on every axis.

    Ranks are numbered tensor first, then context, data, pipeline. Peers on all axes but data see
    the same samples; contrastive negatives come from the data axis only.

    Attributes:
        device: This rank's GPU, or the CPU.
        rank, world_size: Of this process, of all.
        dp, tp, pp, cp: The axes.
        replicas: Ranks that hold the same weights and get different gradients, data x context:
            gradients are averaged over them, and ZeRO splits its state over them.
        peers: Ranks of one pipeline stage that see the same samples, tensor x context.
    """

    device: torch.device
    rank: int
    world_size: int
    dp: Axis
    tp: Axis
    pp: Axis
    cp: Axis
    replicas: Axis
    peers: Axis

    @classmethod
    def create(cls, config: ParallelConfig | None = None) -> "Mesh":
        """Start torch.distributed and the groups of all axes, or reuse those already there.

        A process started by a launcher (``RANK`` and ``WORLD_SIZE`` in the environment) joins the
        others: nccl between GPUs, gloo between CPUs. Any other process becomes a world of one,
        without touching the network.

        Raises:
            ValueError: when the axes do not multiply to the number of ranks, or when there are
                fewer GPUs than ranks on this node.
        """
        config = config or ParallelConfig()
        launched = _is_launched()
        if dist.is_initialized():
            world_size = dist.get_world_size()
        else:
            world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
        check_ranks(config, world_size)
        _order_launches(config)
        device = select_device(config)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            if launched:
                _join_launched_group(backend)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return cls._with_axes(config, device)

    @classmethod
    @contextmanager
    def planned(
        cls, config: ParallelConfig, device: torch.device, rank: int, world_size: int
    ) -> Iterator["Mesh"]:
        """A rank's place among others that do not exist, for as long as the context.

        Its groups, of torch's fake backend, have sizes and ranks; nothing is sent.

        Raises:
            ValueError: when the axes do not multiply to the number of ranks.
        """
        check_ranks(config, world_size)
        _order_launches(config)
        dist.init_process_group("fake", rank=rank, world_size=world_size)
        mesh = cls._with_axes(config, device)
        try:
            yield mesh
        finally:
            mesh.close()

    @classmethod
    def _with_axes(cls, config: ParallelConfig, device: torch.device) -> "Mesh":
        _split_axes(config)
        state = parallel_state
        return cls(
            device=device,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            dp=_axis(state.get_data_parallel_group()),
            tp=_axis(state.get_tensor_model_parallel_group()),
            pp=_axis(state.get_pipeline_model_parallel_group()),
            cp=_axis(state.get_context_parallel_group()),
            replicas=_axis(state.get_data_parallel_group(with_context_parallel=True)),
            peers=_axis(state.get_tensor_and_context_parallel_group()),
        )

    @property
    def is_first_of_its_data(self) -> bool:
        """Whether this is the first of the ranks that see the same samples."""
        return self.tp.rank == self.cp.rank == self.pp.rank == 0

    def agree(
        self, work: Callable[[], T], errors: tuple[type[Exception], ...] = (ValueError,)
    ) -> T:
        """Run ``work`` on every rank of the mesh, as :func:`ds_linclip.process.consensus.agree`."""
        return consensus.agree(work, dist.group.WORLD, errors)

    def gather(self, value: T) -> list[T]:
        """Return the value of every data-parallel rank, in rank order, on every rank."""
        return consensus.gather(value, self.dp.group)

    def gather_all(self, value: T) -> list[T]:
        """Return the value of every rank of the mesh, in rank order, on every rank."""
        return consensus.gather(value, dist.group.WORLD)

    def from_rank_zero(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its result on every rank.

        Raises:
            AgreedError: on every rank, when ``work`` raised ValueError.
        """
        return consensus.from_first_rank(work, dist.group.WORLD)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """End the process groups; the last thing a process does with its mesh."""
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()

    def prepare_for_deepspeed(self) -> None:
        """What DeepSpeed finds in its surroundings; call it right before anything of DeepSpeed."""
        _switch_off_shared_memory_op()
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, even in a world of one

    def mpu(self) -> Any:
        """What ``deepspeed.initialize`` takes as ``mpu`` of an engine without a pipeline."""
        self.prepare_for_deepspeed()
        return _DeepSpeedGroups()


def select_device(config: ParallelConfig) -> torch.device:
    """This rank's own GPU, or the CPU. Where there are GPUs, "auto" never falls back to the CPU
    unless DeepSpeed is told to (``DS_ACCELERATOR=cpu``).

    Raises:
        ValueError: when there are fewer GPUs than ranks on this node.
    """
    launched = _is_launched()
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


class _DeepSpeedGroups:
    """megatron's ``parallel_state`` as DeepSpeed asks it: data parallel is all that averages
    gradients, the context axis included."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()


def _order_launches(config: ParallelConfig) -> None:
    """megatron overlaps the sum of an input's gradient with that of the weight, which needs kernels
    to start in the order of their launches."""
    if config.tp > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)


def _is_launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _join_launched_group(backend: str) -> None:
    import deepspeed

    _switch_off_shared_memory_op()
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _switch_off_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its CPU all-reduce, which takes minutes the first time."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _split_axes(config: ParallelConfig) -> None:
    """megatron's groups; made anew where those that stand were split otherwise."""
    if parallel_state.model_parallel_is_initialized():
        sizes = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if sizes == (config.tp, config.cp, config.pp):
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        context_parallel_size=config.cp,
        pipeline_model_parallel_size=config.pp,
        create_gloo_process_groups=False,
    )
