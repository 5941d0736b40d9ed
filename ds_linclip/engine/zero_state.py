"""What one rank holds of the weights and of the optimizer's state, by the names of the model.

DeepSpeed flattens parameters, divides the result over the ranks and updates the pieces. Here every
piece gets back the name of its parameter and its place in it, so that what one layout saves, any
other can load.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_linclip.parallel.mesh import Mesh

__all__ = ["FlatTensor", "Piece", "StateShards", "fill_module", "flat_tensors"]

#: State of fp16's dynamic loss scale. In bf16 and fp32 some of DeepSpeed's optimizers have a scale
#: of 1, others none.
_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a flattened parameter within a :class:`FlatTensor`."""

    #: Number of the parameter in ``FlatTensor.parameters``.
    index: int
    #: First element, in the parameter and in the flat tensor.
    start: int
    offset: int
    numel: int

    @property
    def slice(self) -> slice:
        """Its place in the flat tensor."""
        return slice(self.offset, self.offset + self.numel)


@dataclass(frozen=True)
class FlatTensor:
    """A tensor that the optimizer inside DeepSpeed's updates."""

    tensor: Tensor
    #: All that are in it on any rank.
    parameters: Sequence[nn.Parameter]
    #: What this rank has of them; the rest is padding.
    fragments: Sequence[Fragment]


@dataclass(frozen=True)
class Piece:
    """A part of one parameter, or of what tensor parallelism leaves of it here."""

    name: str
    #: Of the parameter on this rank, and the dimension that tensor parallelism splits.
    shape: tuple[int, ...]
    split_dim: int | None
    #: First of its elements in the flattened parameter.
    start: int
    #: By kind, "weight" and the names of the optimizer: flat views into what training works on.
    tensors: Mapping[str, Tensor] = field(repr=False)
    #: Whether this rank is the one to save it: tensor-parallel ranks all hold what is not split.
    is_saved_here: bool

    @property
    def numel(self) -> int:
        return self.tensors["weight"].numel()


def flat_tensors(zero: Any, replica: int) -> Iterator[FlatTensor]:
    """The tensors of DeepSpeed's optimizer ``zero`` on the data-parallel rank ``replica``."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3: every rank has a part of each
        for flat, params in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            fragments, offset = [], 0
            for index, p in enumerate(params):
                start, used = _partition(p, replica)
                fragments.append(Fragment(index, start, offset, used))
                offset += p.partition_numel()
            yield FlatTensor(flat, params, fragments)
        return
    groups = getattr(zero, "bit16_groups", None) or getattr(zero, "bf16_groups", None)
    if groups is None:  # torch's own optimizer
        for p in (p for group in zero.param_groups for p in group["params"]):
            yield FlatTensor(p, [p], [Fragment(0, 0, 0, p.numel())])
        return
    for params, group in zip(groups, zero.param_groups, strict=True):
        (flat,) = group["params"]
        fragments = []
        for index, p in enumerate(params):
            if (link := p._hp_mapping) is not None:
                here = link.get_hp_fragment_address()
                start = link.lp_fragment_address.start
                fragments.append(Fragment(index, start, here.start, here.numel))
        yield FlatTensor(flat, params, fragments)


class StateShards:
    """The state of a run that this rank alone can tell.

    Args:
        engine: DeepSpeed's, at ZeRO stage 1, 2 or 3.
        model: What this rank trains of the model; its names are those of the whole.
        mesh: The ranks that share it.
    """

    def __init__(self, engine: Any, model: nn.Module, mesh: Mesh) -> None:
        self._engine = engine
        self._model = model
        self._mesh = mesh

    def held(self) -> Iterator[Piece]:
        """Everything this rank trains or, locked, keeps. Use each piece before the next one."""
        names = {
            p: name
            for name, p in self._model.named_parameters()
            if not getattr(p, "is_placeholder", False)
        }
        zero = self._engine.optimizer
        for number, flat in enumerate(flat_tensors(zero, self._mesh.replicas.rank)):
            with _in_memory(zero, number):
                state = _states(zero).get(flat.tensor, {})
                like = {k: v for k, v in state.items() if _is_like(v, flat.tensor)}
                for fragment in flat.fragments:
                    p = flat.parameters[fragment.index]
                    if p in names and fragment.numel:
                        whole = {"weight": flat.tensor.detach(), **like}
                        tensors = {kind: tensor[fragment.slice] for kind, tensor in whole.items()}
                        yield self._piece(names[p], p, fragment.start, tensors)
        for p, name in names.items():
            if not p.requires_grad:
                yield self._locked_piece(name, p)

    def scalars(self) -> dict[str, Any]:
        """What is the same on all ranks, as plain data: counters of optimizer and loss scale."""
        zero = self._engine.optimizer
        counters: dict[str, Any] = {}
        for flat in flat_tensors(zero, self._mesh.replicas.rank):
            for name, value in _states(zero).get(flat.tensor, {}).items():
                if isinstance(value, Tensor) and value.ndim == 0:
                    counters[name] = {"tensor": value.item(), "dtype": str(value.dtype)}
                elif isinstance(value, int | float):
                    counters[name] = value
        scaler = getattr(zero, "loss_scaler", None)
        return {
            "optimizer": counters,
            "loss_scaler": {n: getattr(scaler, n) for n in _LOSS_SCALER if hasattr(scaler, n)},
            "skipped_steps": int(self._engine.skipped_steps),
        }

    @torch.no_grad()
    def restore(
        self,
        read: Callable[[Piece, str], Tensor],
        kinds: Sequence[str],
        scalars: Mapping[str, Any],
    ) -> None:
        """Put saved state in the place of the present one; :func:`fill_module` then shows it.

        Args:
            read: Gives the elements of a piece, of one kind.
            kinds: Of the optimizer's state, those that were saved.
            scalars: What :meth:`scalars` gave.
        """
        zero, rank = self._engine.optimizer, self._mesh.replicas.rank
        for number, flat in enumerate(flat_tensors(zero, rank)):
            with _in_memory(zero, number):
                state = _states(zero)[flat.tensor]
                for stale in state.keys() - set(kinds) - set(scalars["optimizer"]):
                    del state[stale]  # nothing was trained yet when this was saved
                for kind in kinds:
                    if kind not in state:
                        state[kind] = torch.zeros_like(flat.tensor, requires_grad=False)
                for name, value in scalars["optimizer"].items():
                    state[name] = _scalar(value, flat.tensor.device)
        for piece in self.held():
            for kind, tensor in piece.tensors.items():
                tensor.copy_(read(piece, kind))
        if (scaler := getattr(zero, "loss_scaler", None)) is not None:
            for name, value in scalars["loss_scaler"].items():
                setattr(scaler, name, value)
        self._engine.skipped_steps = scalars["skipped_steps"]

    def _locked_piece(self, name: str, p: Any) -> Piece:
        replica = self._mesh.replicas.rank
        if not hasattr(p, "ds_tensor"):  # every data-parallel rank has all of it
            weight = {"weight": p.detach().view(-1)}
            return self._piece(name, p, 0, weight, is_first=replica == 0)
        start, used = _partition(p, replica)
        return self._piece(name, p, start, {"weight": p.ds_tensor.detach()[:used]})

    def _piece(
        self,
        name: str,
        p: nn.Parameter,
        start: int,
        tensors: Mapping[str, Tensor],
        *,
        is_first: bool = True,
    ) -> Piece:
        is_split = getattr(p, "tensor_model_parallel", False)
        return Piece(
            name=name,
            shape=tuple(getattr(p, "ds_shape", p.shape)),
            split_dim=getattr(p, "partition_dim") if is_split else None,  # noqa: B009 - megatron's
            start=start,
            tensors=tensors,
            is_saved_here=is_first and (is_split or self._mesh.tp.rank == 0),
        )


@torch.no_grad()
def fill_module(zero: Any) -> None:
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


def _partition(p: Any, replica: int) -> tuple[int, int]:
    """First element and number of elements that ZeRO-3 leaves a rank, without padding."""
    part = p.partition_numel()
    return part * replica, min(part, max(0, p.ds_numel - part * replica))


def _states(zero: Any) -> Any:
    """State of the optimizer inside, by tensor."""
    return zero.optimizer.state


def _is_like(value: Any, tensor: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == tensor.shape


def _scalar(saved: Any, device: torch.device) -> Any:
    if not isinstance(saved, dict):
        return saved
    dtype = getattr(torch, saved["dtype"].removeprefix("torch."))
    return torch.tensor(saved["tensor"], dtype=dtype, device=device)


@contextmanager
def _in_memory(zero: Any, number: int) -> Iterator[None]:
    """Bring a flat tensor and its state back for as long as the context, should they be on NVMe."""
    is_away = getattr(zero, "_swappable_optimizer_subgroup", lambda _: False)(number)
    if is_away:
        zero._optimizer_states_and_gradient_swap_in(number)
    yield
    if is_away:
        zero._optimizer_states_and_gradient_swap_out(number)
