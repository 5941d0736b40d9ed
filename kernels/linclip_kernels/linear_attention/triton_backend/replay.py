"""Launches that are planned once for every kind of call, and repeated with other tensors.

To plan a call, and to let Triton bind its arguments, takes many times as long as to launch it. But
the plan depends on shapes, strides, dtypes and options alone, and so do the kernels that Triton
compiles, with the alignment of pointers. Hence a plan is made from stand-ins without memory, and a
call puts its tensors in their places.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from linclip_kernels.linear_attention.triton_backend.partition import Chip, Launch, run

__all__ = ["MAX_PLANS", "launch"]

_logger = logging.getLogger(__name__)
#: How many plans are kept, those used last. A training run has a few.
MAX_PLANS = 128

#: Takes an argument of a kernel from a list of values.
Pick = Callable[[list[Any]], Any]
#: Takes the tensors and options of a call, and the keywords ``boundaries`` and ``chip``; returns a
#: new tensor that the launches fill beside those of the call, or None, and the launches.
Planner = Callable[..., tuple[Tensor | None, list[Launch]]]


def launch(
    planner: Planner,
    tensors: Sequence[Tensor | None],
    *options: Any,
    boundaries: list[int] | None = None,
) -> Any:
    """Run the launches of a planner, which is called once for every kind of call.

    Args:
        planner: A function at module level. Its launches may take the tensors of the call, and new
            ones that it makes with torch.empty, but no parts of them; each as an argument of its
            own, or as a field of a tuple.
        tensors: The planner's first arguments, inputs and outputs, on one device; not None first.
        options: Its other arguments, which are hashable.
        boundaries: Boundaries of the sequences, which seldom repeat: with them every call plans.

    Returns:
        The planner's new tensor, filled, or None.
    """
    first = tensors[0]
    assert first is not None
    device = first.device
    if boundaries is not None:
        chip = Chip.of(device)
        filled, launches = planner(*tensors, *options, boundaries=boundaries, chip=chip)
        run(launches, device)
        return filled
    # All that Triton specialises a kernel for, and more than the partition depends on.
    kinds = tuple(
        [
            None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)
            for x in tensors
        ]
    )
    return _plan(planner, device, options, kinds).run(tensors)


class _Plan:
    """The launches of one kind of call.

    Their arguments are chosen by index from one list of values: first the tensors of the call, then
    numbers and other constants, and new tensors.
    """

    def __init__(
        self,
        planner: Planner,
        device: torch.device,
        options: tuple[Any, ...],
        kinds: tuple[tuple[Any, ...] | None, ...],
    ) -> None:
        stand_ins = [None if kind is None else _stand_in(*kind) for kind in kinds]
        filled, launches = planner(*stand_ins, *options, boundaries=None, chip=Chip.of(device))
        for kind in kinds:
            if kind is not None and not _is_wide(*kind):
                _logger.warning(
                    "linear attention: a tensor %s with the strides %s, or its first address, "
                    "does not allow accesses of 16 bytes; kernels read it in narrower, slower ones",
                    *(tuple(kind[0]), kind[1]),
                )
        self._device = device
        self._values: list[Any] = [None] * len(stand_ins)
        self._new: list[tuple[int, torch.Size, torch.dtype]] = []
        storages = {_storage(x): i for i, x in enumerate(stand_ins) if x is not None}
        self._launches = [
            _Repeated(each, {name: self._pick(x, storages) for name, x in each.arguments.items()})
            for each in launches
        ]
        self._filled = None if filled is None else self._index(filled, storages)

    def _pick(self, argument: Any, storages: dict[int, int]) -> Pick:
        """Return the function that takes an argument, or the fields of one, from the values."""
        if isinstance(argument, tuple) and any(isinstance(x, Tensor) for x in argument):
            return itemgetter(*(self._index(x, storages) for x in argument))
        return itemgetter(self._index(argument, storages))

    def _index(self, value: Any, storages: dict[int, int]) -> int:
        if isinstance(value, Tensor):
            assert value.device.type == "meta", "a plan keeps no tensors of its own"
            assert value.storage_offset() == 0, "a launch takes no parts of tensors"
            storage = _storage(value)
            if storage in storages:
                return storages[storage]
            is_whole = value.is_contiguous() and value.nbytes == value.untyped_storage().nbytes()
            assert is_whole, "a launch takes whole tensors"
            storages[storage] = len(self._values)
            self._new.append((len(self._values), value.shape, value.dtype))
            value = None
        assert _is_constant(value), "beside tensors and tuples of them there are only numbers"
        self._values.append(value)
        return len(self._values) - 1

    def run(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        """Run the launches with the tensors of a call."""
        values, device = self._values.copy(), self._device
        values[: len(tensors)] = tensors
        for i, shape, dtype in self._new:
            values[i] = torch.empty(shape, dtype=dtype, device=device)
        if device.type != "meta":
            with _on(device):
                for each in self._launches:
                    each(values)
        return None if self._filled is None else values[self._filled]


#: A pure function of hashable values; the cache is safe in autograd's threads.
_plan = lru_cache(MAX_PLANS)(_Plan)


class _Repeated:
    """A launch that takes its arguments from a list of values."""

    def __init__(self, launch: Launch, picks: dict[str, Pick]) -> None:
        self._kernel, self._picks = launch.kernel, [picks[x] for x in launch.kernel.arg_names]
        self._named = {
            name: (pick, getattr(type(launch.arguments[name]), "_make", None))
            for name, pick in picks.items()
        }
        self._options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        self._grid = (*launch.grid, 1, 1)[:3]
        self._compiled: Callable[..., None] | None = None

    def __call__(self, values: list[Any]) -> None:
        if self._compiled is not None:
            self._compiled(*[pick(values) for pick in self._picks])
            return
        arguments = {
            name: pick(values) if make is None else make(pick(values))
            for name, (pick, make) in self._named.items()
        }
        kernel = self._kernel[self._grid](**arguments, **self._options)
        # In the interpreter there is no compiled kernel. On AMD the kernel to take depends on the
        # size of the memory that a tensor is a view of, too, and Triton chooses at every launch.
        if isinstance(kernel, CompiledKernel) and torch.version.hip is None:
            self._compiled = kernel[self._grid]


def _stand_in(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, _is_aligned: bool
) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _is_wide(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, is_aligned: bool
) -> bool:
    """Return whether the rows of a tensor [B, N, H, D] begin at multiples of 16 bytes."""
    if len(shape) != 4 or dtype == torch.float32 or shape[-1] % 8:
        return True  # states, and widths that no address would help
    return is_aligned and strides[-1] == 1 and all(x % 8 == 0 for x in strides[:-1])


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, int | float | str)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a CUDA device is the current one."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
