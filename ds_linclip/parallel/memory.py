"""What the tensors of training take on a rank, counted by kind."""

import gc
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_linclip.parallel.engine import Engine

__all__ = ["KINDS", "MemoryMeter"]

KINDS = ("weights", "gradients", "optimizer", "buckets")

#: Address of a storage -> its bytes.
_Storages = dict[int, int]


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of live tensors, every storage once.

    Within the context it looks at every collective and before every step of the wrapped optimizer,
    and keeps what it saw when there was most of it. Kinds are those of
    :class:`~ds_linclip.parallel.plan.RankPlan`; "buckets" are DeepSpeed's, and messages that are no
    gradient or weight themselves.

    Attributes:
        most: Bytes by kind at the fullest moment.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine.deepspeed_engine
        self.most = dict.fromkeys(KINDS, 0)

    def live(self) -> dict[str, int]:
        """Bytes by kind, now; with "other" for what else Python knows, activations for example."""
        gc.collect()
        everything = (o for o in gc.get_objects() if issubclass(type(o), Tensor))
        return self._count(other=_storages(everything))

    def __enter__(self) -> "MemoryMeter":
        inner = self._engine.optimizer.optimizer
        self._hook = inner.register_step_pre_hook(lambda *_: self._look())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._look(tree_leaves(args))
        return result

    def _look(self, messages: Iterable[Any] = ()) -> None:
        found = self._count(buckets=_storages(messages))
        if sum(found.values()) > sum(self.most.values()):
            self.most = found

    def _count(self, **further: _Storages) -> dict[str, int]:
        zero = self._engine.optimizer
        parameters = list(self._engine.module.parameters())
        master = list(_master_weights(zero))
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
            "optimizer": _storages(
                [*master, *tree_leaves([list(each.values()) for each in state])]
            ),
        }
        counted: set[int] = set()
        found = dict.fromkeys([*KINDS, *further], 0)
        for kind, storages in [*kinds.items(), *further.items()]:
            found[kind] += sum(size for place, size in storages.items() if place not in counted)
            counted |= storages.keys()
        return found


def _master_weights(zero: Any) -> Iterator[Tensor]:
    """Of this rank's part: ZeRO-3 takes them out of the optimizer's groups between steps."""
    for name in (
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
        "fp32_partitioned_groups_flat",
    ):
        yield from getattr(zero, name, [])


def _of(owners: Iterable[Any], *names: str) -> Iterator[Any]:
    for owner in owners:
        yield from (getattr(owner, name, None) for name in names)


def _storages(tensors: Iterable[Any]) -> _Storages:
    found: _Storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found
