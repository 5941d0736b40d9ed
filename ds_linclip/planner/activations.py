"""Activation memory of a rank, measured by a step on meta tensors, which take no memory.

The code of training runs (model, checkpointing, loss, autograd), and the bytes of tensors that are
alive at the same time are counted: the batch, what autograd saves, temporaries of layers and
operators, the loss with the features of all ranks, gradients until DeepSpeed takes them. Memory
inside torch's own kernels is not seen (cuBLAS workspaces, for example); the linear-attention
operators are traced through their Triton or torch implementation.
"""

import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.distributed._tools.fake_collectives  # collectives of meta tensors
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_linclip.config import Config
from ds_linclip.engine.pipeline import Stage
from ds_linclip.engine.pipeline_stages import stage_units
from ds_linclip.loss.grad_cache import ContrastiveLoss, surrogate
from ds_linclip.model import CLIP
from ds_linclip.model.freeze import lock_towers
from ds_linclip.parallel.context_parallel import token_slice
from ds_linclip.parallel.mesh import Mesh

__all__ = ["meta_model", "trace_activations"]

_META = torch.device("meta")
_16_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def meta_model(config: Config, mesh: Mesh) -> CLIP:
    """Return this rank's part of the model as it is trained, on the meta device."""
    with _META, torch.random.fork_rng(devices=[]):
        model = CLIP(
            config.model,
            replace(mesh, device=_META),
            loss=config.loss.kind,
            units=stage_units(config, mesh.pp),
        )
    lock_towers(model, config.init)
    model.recompute_activations(config.train.activation_checkpointing)
    model.choose_backend("triton" if mesh.device.type == "cuda" else "torch")
    if config.train.precision == "amp_bf16":
        model.compute_in(torch.bfloat16)
        return model
    return model.to(_16_BITS.get(config.train.precision, torch.float32))


def trace_activations(config: Config, mesh: Mesh, model: CLIP) -> tuple[list[tuple[int, int]], int]:
    """Return the bytes of tensors beside weights, optimizer state and DeepSpeed's buffers in a step
    of :class:`~ds_linclip.engine.engine.Engine` with the model of :func:`meta_model`.

    Of several micro-batches one is run, or as many as a pipeline's stage has in flight; images have
    the largest size that the run will use.

    Returns:
        The step in phases that each end when DeepSpeed takes a parameter's gradient, as pairs: the
        number of elements whose gradients were taken before, and the peak bytes in the phase. Then
        the bytes left after the backward: the batch, features.
    """
    live = _LiveBytes(parameter.untyped_storage() for parameter in model.parameters())
    peaks: list[tuple[int, int]] = []
    taken = 0

    def take(parameter: Tensor) -> None:
        nonlocal taken
        peaks.append((taken, live.take_peak()))
        taken += parameter.numel()
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in trained]
    step = _pipeline_step if mesh.pp.size > 1 else _plain_step
    with _META, live:
        kept = step(config, mesh, model)
        peaks.append((taken, live.take_peak()))
        rest = live.now
    del kept
    for hook in hooks:
        hook.remove()
    return peaks, rest


def _plain_step(config: Config, mesh: Mesh, model: CLIP) -> Any:
    """Take a step like ``PlainEngine``; return what outlives the backward."""
    num, batch = config.num_micro_batches(mesh.dp.size), _batch(config, mesh)
    first = tuple(tensor.chunk(num)[0] for tensor in batch)
    with torch.set_grad_enabled(num == 1):
        outputs = _repeated(model(*first), num)
    _, gradients = ContrastiveLoss(config.loss, mesh)(outputs, _targets(config, mesh))
    output = outputs[0] if num == 1 else model(*first)
    loss = num * surrogate(output, gradients[0])
    torch.autograd.backward([loss])
    return batch, outputs, gradients


def _pipeline_step(config: Config, mesh: Mesh, model: CLIP) -> Any:
    """Take a step like ``PipelineEngine``; return what outlives the backward."""
    num, stage = config.num_micro_batches(mesh.dp.size), Stage(model)
    batch = _batch(config, mesh) if mesh.pp.rank == 0 else ()
    received = _received_buffers(config, mesh, model, num)

    def inputs() -> tuple[Tensor, ...]:
        """Return copies, as DeepSpeed copies what it loads and what it receives."""
        if mesh.pp.rank == 0:
            return tuple(tensor.chunk(num)[0].clone() for tensor in batch)
        copies = (tensor.clone() for tensor in received)
        return tuple(x.requires_grad_(x.is_floating_point()) for x in copies)

    with torch.no_grad():
        features = stage(inputs())
    gradients: list[tuple[Tensor, ...]] = []
    if model.is_last:
        _, gradients = ContrastiveLoss(config.loss, mesh)(
            _repeated(features, num), _targets(config, mesh)
        )
    in_flight = [stage(inputs()) for _ in range(min(mesh.pp.size - mesh.pp.rank, num))]
    if model.is_last:
        torch.autograd.backward([num * surrogate(in_flight.pop(0), gradients[0])])
    else:
        outputs = [tensor for tensor in in_flight.pop(0) if tensor.is_floating_point()]
        torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    return batch, received, features, gradients, in_flight


def _repeated(outputs: tuple[Tensor, ...], num: int) -> list[tuple[Tensor, ...]]:
    """Return outputs of ``num`` micro-batches, given those of the first."""
    more = ((*map(torch.empty_like, outputs[:2]), *outputs[2:]) for _ in range(num - 1))
    return [outputs, *more]


def _targets(config: Config, mesh: Mesh) -> tuple[Tensor, ...]:
    """Return a teacher's features and scale, of the student's size; empty without a teacher."""
    if config.teacher.model is None:
        return ()
    local = config.train.global_batch_size // mesh.dp.size
    features = torch.empty(2, local, config.model.embed_dim)
    return *features.unbind(), torch.empty(())


def _batch(config: Config, mesh: Mesh) -> tuple[Tensor, ...]:
    """Return this rank's images and texts and, with patch dropout, the patches to keep."""
    vision, size = config.model.vision, config.largest_image_size
    local = config.train.global_batch_size // mesh.dp.size
    images = torch.empty(local, 3, *size)
    texts = torch.empty(local, config.model.text.context_length, dtype=torch.int64)
    if vision.patch_dropout == 0:
        return images, texts
    return images, texts, torch.empty(local, vision.num_kept_patches_at(size), dtype=torch.int64)


def _received_buffers(config: Config, mesh: Mesh, model: CLIP, num: int) -> tuple[Tensor, ...]:
    """Return the buffers in which a later pipeline stage receives a micro-batch."""
    if mesh.pp.rank == 0:
        return ()
    vision, text = config.model.vision, config.model.text
    micro_batch = config.train.global_batch_size // mesh.dp.size // num
    start, dtype = stage_units(config, mesh.pp).start, next(model.parameters()).dtype
    product_dtype = torch.bfloat16 if config.train.precision == "amp_bf16" else dtype
    texts = torch.empty(micro_batch, text.context_length, dtype=torch.int64)
    if start <= vision.layers + 1:
        num_tokens = vision.num_kept_tokens_at(config.largest_image_size)
        held = token_slice(num_tokens, mesh.cp.rank, mesh.cp.size)
        shape = micro_batch, held.stop - held.start, vision.width
        tokens = torch.empty(shape, dtype=dtype), texts
        if not any(each.needs_grid for each in vision.attentions):
            return tokens
        rows, columns = (side // vision.patch_size for side in config.largest_image_size)
        grid = torch.empty(rows, columns, dtype=torch.uint8)
        if vision.patch_dropout == 0:
            return *tokens, grid
        num_kept = vision.num_kept_patches_at(config.largest_image_size)
        return *tokens, grid, torch.empty(micro_batch, num_kept, dtype=torch.int64)
    image = torch.empty(micro_batch, config.model.embed_dim, dtype=product_dtype)
    if start == vision.layers + 2:
        return image, texts
    words = torch.empty(micro_batch, text.context_length, text.width, dtype=dtype)
    return image, texts, words


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes ``now`` alive of storages that operators allocate, except ``known`` ones."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.now, self._peak = 0, 0
        self._alive: dict[int, Any] = {storage._cdata: storage for storage in known}
        #: Bytes that a custom operator allocates inside, by its arguments.
        self._inside: dict[Any, int] = {}

    def take_peak(self) -> int:
        """Return the peak since the last call."""
        peak, self._peak = max(self._peak, self.now), 0
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = OPDEFS.get(func.name())
        if operator is None:
            result = func(*args, **kwargs)
        else:
            result = self._run_inside(operator, func, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _run_inside(self, operator: Any, func: Any, args: Any, kwargs: Any) -> Any:
        key = func, *map(_signature, tree_leaves((args, kwargs)))
        if key in self._inside:
            self._peak = max(self._peak, self.now + self._inside[key])
            return func(*args, **kwargs)
        before, at_start = self._peak, self.now
        self._peak = at_start
        with self:
            result = operator._init_fn(*args, **kwargs)
        self._inside[key] = self._peak - at_start
        self._peak = max(self._peak, before)
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def remove(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, remove)
        self.now += size
        self._peak = max(self._peak, self.now)


def _signature(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return argument
