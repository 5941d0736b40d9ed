"""Memory of the tensors of training on a rank: together in a step, by kind between steps."""

import ctypes
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from ds_linclip.engine.engine import Engine

__all__ = ["AllocatorRecord", "live_bytes"]


class AllocatorRecord:
    """Record of the memory that the CPU's allocator gives out within the context.

    Memory within operators is included; tensors older than the context are not.
    """

    def __enter__(self) -> "AllocatorRecord":
        # Otherwise memory that other threads free, such as gloo's, would not be counted.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        self._flag = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")
        self._flag.value = True
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        self._flag.value = False

    def most(self, name: str) -> int:
        """Return, after the context, the most bytes at any time in a ``record_function`` of it."""
        profiler: Any = self._profile.profiler
        events = list(_flat(profiler.kineto_results.experimental_event_tree()))
        (part,) = (event for event in events if event.name == name)
        return max(
            event.extra_fields.total_allocated
            for event in events
            if event.tag == _EventType.Allocation
            and part.start_time_ns <= event.start_time_ns <= part.end_time_ns
        )


def live_bytes(engine: Engine) -> dict[str, int]:
    """Return the bytes of live tensors, every storage once.

    Returns:
        Bytes by kind: "weights", "buckets", "gradients" and "optimizer", which a plan has too, and
        "other" tensors that Python knows of.
    """
    gc.collect()
    zero = engine.deepspeed_engine.optimizer
    parameters = list(engine.deepspeed_engine.module.parameters())
    # This rank's master weights: ZeRO-3 keeps them out of the optimizer's groups.
    groups = "single_partition_of_fp32_groups", "fp32_groups_flat_partition"
    groups_of_zero3 = getattr(zero, "fp32_partitioned_groups_flat", [])
    master = [each for name in groups for each in getattr(zero, name, [])] + [*groups_of_zero3]
    state = zero.optimizer.state.values()
    kinds = {
        "weights": _storages(_of(parameters, "data", "ds_tensor")),
        "buckets": _storages(
            tree_leaves([each.buffer for each in getattr(zero, "ipg_buckets", {}).values()])
        ),
        "gradients": _storages(
            [
                *_of(parameters, "grad", "grad_accum"),
                *_of(master, "grad"),
                *tree_leaves(list(getattr(zero, "averaged_gradients", {}).values())),
                *tree_leaves(list(getattr(zero, "all_grad_tensors", {}).values())),
                *_of([zero], "grads_in_partition", "grad_partitions_flat_buffer"),
                *getattr(zero, "fp32_groups_gradients_flat", []),
            ]
        ),
        "optimizer": _storages([*master, *tree_leaves([list(each.values()) for each in state])]),
        "other": _storages(o for o in gc.get_objects() if issubclass(type(o), Tensor)),
    }
    counted: set[int] = set()
    found: dict[str, int] = {}
    for kind, storages in kinds.items():
        found[kind] = sum(size for place, size in storages.items() if place not in counted)
        counted |= storages.keys()
    return found


def _of(owners: Iterable[Any], *names: str) -> Iterator[Any]:
    for owner in owners:
        yield from (getattr(owner, name, None) for name in names)


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Return the bytes of the tensors' storages by address."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _flat(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _flat(event.children)
