"""The process groups of one run, created once and passed on as one object.

Only this package imports megatron's ``parallel_state``; all other code uses :class:`Mesh`.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from ds_linclip.config import ParallelConfig, check_ranks
from ds_linclip.process import consensus

__all__ = ["DEFAULT_TIMEOUT", "Axis", "Mesh", "prepare_for_deepspeed", "select_device"]

T = TypeVar("T")

#: Time-out of collectives, unless the caller of :meth:`Mesh.create` chooses another.
DEFAULT_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Axis:
    """This process's position on one axis of the mesh, and the process group of the axis."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """The device of this process and its position on every parallel axis.

    Ranks are numbered along the tensor axis first, then context, data and pipeline. Ranks that
    differ on any axis but the data axis process the same samples; contrastive negatives come from
    the data axis only.
    """

    device: torch.device  #: This rank's GPU, or the CPU.
    rank: int
    world_size: int
    dp: Axis
    tp: Axis
    pp: Axis
    cp: Axis
    #: Data x context: ranks with the same weights and different gradients, which are averaged over
    #: it; ZeRO splits its state over it.
    replicas: Axis
    #: Tensor x context: ranks of one pipeline stage that process the same samples.
    peers: Axis
    #: How long a collective may wait before its backend gives up.
    timeout: timedelta

    @classmethod
    def create(
        cls, config: ParallelConfig | None = None, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> "Mesh":
        """Start torch.distributed and the groups of all axes, or reuse those that exist.

        A process started by a launcher (``RANK`` and ``WORLD_SIZE`` in the environment) joins the
        others: nccl between GPUs, gloo between CPUs. Any other process becomes a world of one,
        without using the network.

        Args:
            config: The sizes of the axes and the device; None: the defaults.
            timeout: The time-out of every process group. It must be passed because defaults differ:
                10 minutes with DeepSpeed and for nccl, 30 with megatron and for gloo.

        Raises:
            ValueError: when the axes do not multiply to the number of ranks, or when there are
                fewer GPUs than ranks on this node.
        """
        config = config or ParallelConfig()
        launched = _is_launched()
        world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
        check_ranks(config, dist.get_world_size() if dist.is_initialized() else world_size)
        _order_kernel_launches(config)
        device = select_device(config)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            if launched:
                import deepspeed  # takes seconds

                prepare_for_deepspeed()
                deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
            else:
                dist.init_process_group(
                    backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
                )
        mesh = cls._with_axes(config, device, timeout)
        mesh.set_timeouts()
        return mesh

    @classmethod
    @contextmanager
    def planned(
        cls, config: ParallelConfig, device: torch.device, rank: int, world_size: int
    ) -> Iterator["Mesh"]:
        """Yield the mesh of one rank of a world whose other ranks do not exist.

        Its groups use torch's fake backend: they have sizes and ranks, but nothing is sent.

        Raises:
            ValueError: when the axes do not multiply to the number of ranks.
        """
        check_ranks(config, world_size)
        _order_kernel_launches(config)
        dist.init_process_group("fake", rank=rank, world_size=world_size)
        mesh = cls._with_axes(config, device, DEFAULT_TIMEOUT)
        try:
            yield mesh
        finally:
            mesh.close()

    @classmethod
    def _with_axes(cls, config: ParallelConfig, device: torch.device, timeout: timedelta) -> "Mesh":
        _create_axes(config, timeout)
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
            timeout=timeout,
        )

    def alone(self) -> "Mesh":
        """Return a mesh with axes of this process alone, for a model that is whole on every rank.

        Its collectives over all ranks (:meth:`agree` and others) are still those of this mesh.
        """
        own = _axis(dist.new_group([dist.get_rank()], use_local_synchronization=True))
        return replace(self, dp=own, tp=own, pp=own, cp=own, replicas=own, peers=own)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The number of ranks on every axis, by the axis's name."""
        return {axis: getattr(self, axis).size for axis in ("dp", "tp", "pp", "cp")}

    def with_whole_sequences(self) -> "Mesh":
        """Return this mesh for sequences that every context-parallel rank runs as a whole."""
        return replace(self, cp=replace(self.cp, rank=0, size=1))

    @property
    def is_first_of_its_data(self) -> bool:
        """Whether this is the first of the ranks that process the same samples."""
        return self.tp.rank == self.cp.rank == self.pp.rank == 0

    def set_timeouts(self) -> None:
        """Set the mesh's time-out on every process group that this process belongs to.

        DeepSpeed creates groups of its own with torch's default: call this after
        ``deepspeed.initialize``.
        """
        for group in distributed_c10d._world.pg_map:
            group.set_timeout(self.timeout)

    def new_cpu_group(self) -> dist.ProcessGroup | None:
        """Return a gloo group of all ranks with connections of its own; None in a world of one.

        Collectives on it may run in another thread while training uses the other groups. All ranks
        must create their groups in the same order.
        """
        if self.world_size == 1:
            return None
        return dist.new_group(backend="gloo", timeout=self.timeout)

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
        """Destroy the process groups; the mesh must not be used afterwards."""
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()

    def mpu(self) -> Any:
        """Return the ``mpu`` argument of ``deepspeed.initialize`` for an engine without pipeline:
        DeepSpeed reads the process groups of all axes from it."""
        return _DeepSpeedGroups()


def prepare_for_deepspeed() -> None:
    """Set what DeepSpeed reads from its environment; call it before any other DeepSpeed function.

    DeepSpeed's CPU all-reduce is switched off, as compiling it takes minutes the first time.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # required even in a world of one


def select_device(config: ParallelConfig) -> torch.device:
    """Return this rank's own GPU, or the CPU.

    Where there are GPUs, "auto" selects the CPU only if ``DS_ACCELERATOR=cpu`` is set.

    Raises:
        ValueError: when there are fewer GPUs than ranks on this node.
    """
    num_gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    is_cpu_preferred = num_gpus == 0 or os.environ.get("DS_ACCELERATOR") == "cpu"
    if config.device == "cpu" or (config.device == "auto" and is_cpu_preferred):
        # DeepSpeed selects a device by itself, and would use a GPU that must stay unused.
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    needed, number = 1, 0
    if _is_launched():  # the deepspeed launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
        needed = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        number = int(os.environ.get("LOCAL_RANK", 0))
    if num_gpus < needed:
        raise ValueError(
            f"parallel.device ({config.device}) needs a GPU for each of the {needed} ranks on this "
            f"node, found {num_gpus}"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


class _DeepSpeedGroups:
    """megatron's ``parallel_state`` with the functions that DeepSpeed expects of an ``mpu``.

    To DeepSpeed the data-parallel group is the one that averages gradients: data x context.
    """

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


def _order_kernel_launches(config: ParallelConfig) -> None:
    """Have kernels start in the order of their launches: megatron overlaps the reduction of an
    input's gradient with the weight's gradient. Call this before CUDA is initialized."""
    if config.tp > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)


def _is_launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _create_axes(config: ParallelConfig, timeout: timedelta) -> None:
    """Create megatron's groups; existing ones are replaced if their sizes differ."""
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
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
        create_gloo_process_groups=False,
    )
