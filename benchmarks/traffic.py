"""Bytes that ranks send each other, counted by axis of the mesh."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CONTROL_BYTES", "TrafficMeter"]

#: Smaller messages are norms, flags and barriers, and are not counted.
CONTROL_BYTES = 64

#: Operator -> index of the argument that holds the largest message: the output of a gather, the
#: input of a reduction, the tensors of a send.
_MESSAGES = {
    "allreduce_": 0,
    "allreduce_coalesced_": 0,
    "reduce_": 0,
    "broadcast_": 0,
    "send": 0,
    "allgather_": 0,
    "_allgather_base_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
}


class TrafficMeter(TorchDispatchMode):
    """Dispatch mode that adds up the bytes of this rank's collectives and sends, by axis.

    The size of a message is that of the whole tensor: the input of an all-reduce or reduce-scatter,
    the output of an all-gather, the tensor of a broadcast or send; receives are not counted.

    Args:
        groups: The axes and their groups; sends are counted as those of "pp".

    Attributes:
        bytes: Bytes by axis; "other" for the rest.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)
        self._by_name = {group.group_name: axis for axis, group in groups.items()}
        # DeepSpeed's pipeline makes groups of its own, with the same ranks.
        self._by_ranks = {_ranks(group): axis for axis, group in groups.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func.name().removeprefix("c10d::").split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in _MESSAGES:
            return
        messages = tree_leaves(args[_MESSAGES[name]])
        size = sum(tensor.nbytes for tensor in messages if isinstance(tensor, Tensor))
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        if size < CONTROL_BYTES or group.size() == 1:
            return
        axis = "pp" if name == "send" else self._by_name.get(group.group_name)
        self.bytes[axis or self._by_ranks.get(_ranks(group), "other")] += size


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))
