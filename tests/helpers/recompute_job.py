"""Runs on every rank of test_recompute.py: one step, its memory and its operators."""

from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ds_linclip.config import (
    LinearAttention,
    ModelConfig,
    ParallelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
)
from ds_linclip.model import CLIP
from ds_linclip.model.block import Recompute
from ds_linclip.parallel.mesh import Mesh

#: Words in the names of operators that "selective" must not run again.
COSTLY = ("mm", "matmul", "linear", "attention", "c10d")


def small_config(kind: Literal["linear", "softmax"], head_norm: bool = False) -> ModelConfig:
    attention = LinearAttention(head_norm=head_norm) if kind == "linear" else SoftmaxAttention()
    return ModelConfig(
        embed_dim=24,
        vision=VisionTower(
            image_size=(32, 32),
            patch_size=4,
            width=64,
            layers=3,
            head_width=16,
            attention=attention,
        ),
        text=TextTower(
            context_length=12, vocab_size=60, width=64, heads=4, layers=2, attention=attention
        ),
    )


class Watch(TorchDispatchMode):
    """Counts the calls of costly operators and the memory that results of operators hold."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if any(word in name for word in COSTLY):
            self.counts[name] += 1
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._seen[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    def held(self) -> int:
        """Bytes of results that are still there."""
        return sum(size for reference, size in self._seen.values() if not reference.expired())


def measure(
    parallel: ParallelConfig,
    kind: Literal["linear", "softmax"],
    recompute: Recompute,
    *,
    drop: bool,
) -> dict[str, Any]:
    """Return gradients, bytes held after the forward, and operators of one step."""
    mesh = Mesh.create(parallel)
    torch.manual_seed(0)
    model = CLIP(small_config(kind, head_norm=drop), mesh)
    model.recompute_activations(recompute)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    texts = torch.randint(0, 60, (8, 12), generator=generator)
    kept = torch.rand(8, 64, generator=generator).argsort(1)[:, :29].sort(1).values
    with Watch() as watch:
        image, text, scale = model(images, texts, *([kept] if drop else []))
        held = watch.held()
        (scale.exp()[0] * image @ text.T).log_softmax(1).diagonal().sum().backward()
    return {
        "gradients": {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        },
        "held": held,
        "operators": dict(watch.counts),
    }


def all_measures(parallel: ParallelConfig, folder: Path) -> None:
    kinds: tuple[Literal["linear", "softmax"], ...] = ("linear", "softmax")
    found = {
        (kind, drop, recompute): measure(parallel, kind, recompute, drop=drop)
        for kind in kinds[: 1 if parallel.cp > 1 else 2]
        for drop in (False, True)
        for recompute in get_args(Recompute)
    }
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
