"""The weights and optimizer state that one rank holds, by the model's parameter names.

DeepSpeed flattens the parameters and divides the result over the ranks. Here every part of a flat
tensor is mapped back to the name of its parameter and its position in it, so that any layout can
load what another one saved.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_linclip.parallel.mesh import Mesh

__all__ = ["FlatTensor", "ParameterPiece", "RankState", "fill_module", "flat_tensors"]

#: Attributes of fp16's dynamic loss scaler. In bf16 and fp32 some of DeepSpeed's optimizers have a
#: constant scale of 1, others none.
_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a flattened parameter within a :class:`FlatTensor`."""

    index: int  #: The parameter's index in ``FlatTensor.parameters``.
    start: int  #: First element in the parameter.
    span: slice  #: Its position in the flat tensor.


@dataclass(frozen=True)
class FlatTensor:
    """A tensor that the optimizer inside DeepSpeed's updates."""

    tensor: Tensor  #: The elements on this rank; what no fragment covers is padding.
    parameters: Sequence[nn.Parameter]  #: All that are in it on any rank.
    fragments: Sequence[Fragment]  #: The parts of them that this rank holds.


@dataclass(frozen=True)
class ParameterPiece:
    """Consecutive elements of one parameter and its optimizer state on this rank."""

    name: str  #: The parameter's name in the whole model.
    shape: tuple[int, ...]  #: The parameter's shape on this rank, before ZeRO divides it.
    split_dim: int | None  #: The dimension that tensor parallelism splits, if any.
    start: int  #: First element in the flattened parameter of that shape.
    #: By kind ("weight" and the optimizer's names), flat views of what training updates.
    tensors: Mapping[str, Tensor]
    #: Unsplit parameters are the same on all tensor-parallel ranks; one of them saves.
    is_saved_here: bool

    @property
    def numel(self) -> int:
        return self.tensors["weight"].numel()


def flat_tensors(zero: Any, replica: int = 0) -> Iterator[FlatTensor]:
    """Yield the tensors of an optimizer, DeepSpeed's or torch's, on a data-parallel rank."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3: every rank has a part of each
        for flat, params in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            fragments, offset = [], 0
            for index, p in enumerate(params):
                start, used = _partition(p, replica)
                fragments.append(Fragment(index, start, slice(offset, offset + used)))
                offset += p.partition_numel()
            yield FlatTensor(flat, params, fragments)
        return
    groups = getattr(zero, "bit16_groups", None) or getattr(zero, "bf16_groups", None)
    if groups is None:  # torch's own optimizer
        for p in (p for group in zero.param_groups for p in group["params"]):
            yield FlatTensor(p, [p], [Fragment(0, 0, slice(0, p.numel()))])
        return
    for params, group in zip(groups, zero.param_groups, strict=True):
        (flat,) = group["params"]
        fragments = []
        for index, p in enumerate(params):
            if (link := p._hp_mapping) is not None:
                here = link.get_hp_fragment_address()
                part = slice(here.start, here.start + here.numel)
                fragments.append(Fragment(index, link.lp_fragment_address.start, part))
        yield FlatTensor(flat, params, fragments)


class RankState:
    """The part of the training state that this rank holds, at ZeRO stage 1, 2 or 3.

    ``model`` has the layers that this rank trains, with the parameter names of the whole model.
    """

    def __init__(self, engine: Any, model: nn.Module, mesh: Mesh) -> None:
        self._engine = engine
        self._model = model
        self._mesh = mesh
        self._replica = mesh.replicas.rank

    def pieces(self) -> Iterator[ParameterPiece]:
        """Yield everything this rank trains, and the locked weights it keeps.

        A piece's tensors are valid until the next one is requested.
        """
        names = self._names()
        yield from self._trained_pieces(names)
        for p, name in names.items():
            if not p.requires_grad:
                yield self._locked_piece(name, p)

    def _names(self) -> dict[nn.Parameter, str]:
        return {
            p: name
            for name, p in self._model.named_parameters()
            if not getattr(p, "is_placeholder", False)
        }

    def _trained_pieces(self, names: Mapping[nn.Parameter, str]) -> Iterator[ParameterPiece]:
        zero = self._engine.optimizer
        for flat in self._flat_tensors():
            whole = {"weight": flat.tensor.detach()}
            for kind, value in zero.optimizer.state.get(flat.tensor, {}).items():
                if isinstance(value, Tensor) and value.shape == flat.tensor.shape:
                    whole[kind] = value
            for fragment in flat.fragments:
                p = flat.parameters[fragment.index]
                tensors = {kind: tensor[fragment.span] for kind, tensor in whole.items()}
                if p in names and tensors["weight"].numel():
                    yield self._piece(names[p], p, fragment.start, tensors)

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the optimizer's weights, which DeepSpeed took from the module's, by those from
        which the module's were rounded: this rank's parameters by name, fp32."""
        for piece in self._trained_pieces(self._names()):
            part = slice(piece.start, piece.start + piece.numel)
            piece.tensors["weight"].copy_(weights[piece.name].view(-1)[part])

    def reader(self, parameters: Sequence[nn.Parameter]) -> Callable[[], Tensor]:
        """Return a function that reads the optimizer's values of parameters of one element.

        It returns them in fp32, [n], where the module's own are rounded to its dtype. All data- and
        context-parallel ranks call it together; one of them has each value.
        """
        order = {p: place for place, p in enumerate(parameters)}
        found = [
            (number, flat.tensor, fragment.span.start, order[flat.parameters[fragment.index]])
            for number, flat in enumerate(flat_tensors(self._engine.optimizer, self._replica))
            for fragment in flat.fragments
            if flat.parameters[fragment.index] in order and fragment.span.stop > fragment.span.start
        ]

        @torch.no_grad()
        def read() -> Tensor:
            values = torch.zeros(len(order), device=self._mesh.device)
            for number, tensor, index, place in found:
                with self._in_memory(number):
                    values[place].fill_(tensor[index])  # no wait for the device, if offloaded
            dist.all_reduce(values, group=self._mesh.replicas.group)
            return values

        return read

    def _flat_tensors(self) -> Iterator[FlatTensor]:
        """Yield the tensors of DeepSpeed's optimizer, each in memory, with its state, until the
        next one is requested."""
        for number, flat in enumerate(flat_tensors(self._engine.optimizer, self._replica)):
            with self._in_memory(number):
                yield flat

    @contextmanager
    def _in_memory(self, number: int) -> Iterator[None]:
        """Have a tensor of DeepSpeed's optimizer and its state in memory: NVMe offload swaps
        them."""
        zero = self._engine.optimizer
        is_away = getattr(zero, "_swappable_optimizer_subgroup", lambda _: False)(number)
        if is_away:
            zero._optimizer_states_and_gradient_swap_in(number)
        yield
        if is_away:
            zero._optimizer_states_and_gradient_swap_out(number)

    def scalars(self) -> dict[str, Any]:
        """Return what is equal on all ranks, as plain data: the counters of optimizer and loss
        scaler."""
        zero = self._engine.optimizer
        counters: dict[str, Any] = {}
        for flat in flat_tensors(zero, self._replica):
            for name, value in zero.optimizer.state.get(flat.tensor, {}).items():
                if isinstance(value, Tensor) and value.ndim == 0:
                    counters[name] = {"tensor": value.item(), "dtype": str(value.dtype)}
                elif isinstance(value, int | float):
                    counters[name] = value
        return {"optimizer": counters, **self.skip_counters()}

    def skip_counters(self) -> dict[str, Any]:
        """Return what a skipped step changes: the loss scaler and the number of skipped steps."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return {
            "loss_scaler": {n: getattr(scaler, n) for n in _LOSS_SCALER if hasattr(scaler, n)},
            "skipped_steps": int(self._engine.skipped_steps),
        }

    def set_skip_counters(self, counters: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`skip_counters`."""
        if (scaler := getattr(self._engine.optimizer, "loss_scaler", None)) is not None:
            for name, value in counters["loss_scaler"].items():
                setattr(scaler, name, value)
        self._engine.skipped_steps = counters["skipped_steps"]

    def first_nonfinite(self) -> str | None:
        """Return the name of a parameter with a weight on this rank that is NaN or infinite."""
        for piece in self.pieces():
            if not piece.tensors["weight"].isfinite().all():
                return piece.name
        return None

    @torch.no_grad()
    def restore(
        self,
        read: Callable[[ParameterPiece, str], Tensor],
        kinds: Sequence[str],
        scalars: Mapping[str, Any],
    ) -> None:
        """Replace the present state by a saved one; :func:`fill_module` must be called afterwards.

        Args:
            read: Returns the saved elements of a piece, given the kind.
            kinds: The kinds of optimizer state that were saved.
            scalars: The saved result of :meth:`scalars`.
        """
        zero = self._engine.optimizer
        for flat in self._flat_tensors():
            state = zero.optimizer.state[flat.tensor]
            for stale in state.keys() - set(kinds) - set(scalars["optimizer"]):
                del state[stale]  # the saved run had not taken a step
            for kind in kinds:
                if kind not in state:
                    state[kind] = torch.zeros_like(flat.tensor, requires_grad=False)
            for name, value in scalars["optimizer"].items():
                state[name] = _scalar(value, flat.tensor.device)
        for piece in self.pieces():
            for kind, tensor in piece.tensors.items():
                tensor.copy_(read(piece, kind))
        self.set_skip_counters(scalars)

    def _locked_piece(self, name: str, p: Any) -> ParameterPiece:
        if not hasattr(p, "ds_tensor"):  # every data-parallel rank has all of it
            return self._piece(name, p, 0, {"weight": p.detach().view(-1)}, self._replica == 0)
        start, used = _partition(p, self._replica)
        return self._piece(name, p, start, {"weight": p.ds_tensor.detach()[:used]})

    def _piece(
        self, name: str, p: Any, start: int, tensors: Mapping[str, Tensor], is_first: bool = True
    ) -> ParameterPiece:
        is_split = getattr(p, "tensor_model_parallel", False)
        return ParameterPiece(
            name=name,
            shape=tuple(getattr(p, "ds_shape", p.shape)),
            split_dim=p.partition_dim if is_split else None,
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
    """Return the first element and the number of elements, without padding, of a ZeRO-3 part."""
    part = p.partition_numel()
    return part * replica, min(part, max(0, p.ds_numel - part * replica))


def _scalar(saved: Any, device: torch.device) -> Any:
    if not isinstance(saved, dict):
        return saved
    dtype = getattr(torch, saved["dtype"].removeprefix("torch."))
    return torch.tensor(saved["tensor"], dtype=dtype, device=device)
