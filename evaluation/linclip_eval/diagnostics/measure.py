"""Statistics of the attention and the tokens in every layer of a model.

The weights are those that the layers use, for every kind of attention:
:meth:`~ds_linclip.model.attention.SelfAttention.weights`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_linclip.model import CLIP
from ds_linclip.model.attention import Patches, SelfAttention
from ds_linclip.model.block import Block
from linclip_eval.diagnostics.attention_statistics import (
    attention_statistics,
    contrast_bound,
    token_similarity,
)

__all__ = ["LayerStatistic", "diagnose"]

#: Elements of the matrices whose statistics are computed together: 32 MiB, several copies of it.
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True, kw_only=True)
class LayerStatistic:
    """One statistic of one layer over heads and samples.

    Attributes:
        tower: "vision" or "text".
        layer: 1 is the first block, 0 the input of the first block.
        statistic: A name from :func:`attention_statistics`; "contrast_bound" (affine scores only);
            "uniform_rank", the effective rank of uniform attention; "token_similarity", of the
            block's output; "branch_ratio", the RMS of what attention adds to the residual stream
            over that of the stream before it; or "branch_ratio_at_init", the same of a model of
            this architecture that has not been trained.
        mean, low, high: The mean, the 5 % and the 95 % quantile over heads and samples.
    """

    tower: str
    layer: int
    statistic: str
    mean: float
    low: float
    high: float


@torch.no_grad()
def diagnose(
    model: CLIP, images: Sequence[Tensor], texts: Sequence[Tensor], max_tokens: int = 4096
) -> list[LayerStatistic]:
    """Measure the attention and the tokens of every layer of both towers.

    The model runs unchanged; weights and statistics are float64 on the CPU. Texts are cut after
    their end-of-text token: later tokens have no influence on their feature.

    Args:
        model: The whole model, without context parallelism.
        images: Batches [B, 3, H, W].
        texts: Batches of token ids [B, L].
        max_tokens: The longest sequence allowed; a head needs matrices of its square.

    Raises:
        ValueError: when there are no images or no texts, a sequence has fewer than two tokens or
            more than ``max_tokens``, or attention is not finite.
    """
    towers = _recorders(model, max_tokens)
    with towers["vision"].hooks(), towers["text"].hooks():
        _encode(model, images, texts)
    found = [row for name, tower in towers.items() for row in tower.statistics(name)]
    untrained = _untrained(model)
    towers = _recorders(untrained, max_tokens)
    branches = [tower.branch_hooks("branch_ratio_at_init") for tower in towers.values()]
    with branches[0], branches[1]:
        _encode(untrained, images, texts)
    return found + [row for name, tower in towers.items() for row in tower.statistics(name)]


def _recorders(model: CLIP, max_tokens: int) -> dict[str, "_TowerRecorder"]:
    assert model.visual is not None
    assert model.text is not None
    blocks = {"vision": model.visual.blocks, "text": model.text.blocks}
    return {name: _TowerRecorder(each, max_tokens) for name, each in blocks.items()}


def _untrained(model: CLIP) -> CLIP:
    """Return a model of the same architecture and dtype with its initial weights of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIP(model.config, model.mesh).to(next(model.parameters()).dtype).eval()


def _encode(model: CLIP, images: Sequence[Tensor], texts: Sequence[Tensor]) -> None:
    weight = next(model.parameters())
    for batch in images:
        model.encode_image(batch.to(weight.device, weight.dtype))
    for batch in texts:
        for same_length in _cut_and_group(batch):
            model.encode_text(same_length.to(weight.device))


class _TowerRecorder:
    """Statistics of the tokens and the attention that pass the blocks of a tower."""

    def __init__(self, blocks: nn.ModuleDict, max_tokens: int) -> None:
        self._blocks: list[Block] = list(blocks.values())  # type: ignore[arg-type]
        self._max_tokens = max_tokens
        #: Layer and statistic -> values, one per head or per sequence.
        self._values: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [self._blocks[0].register_forward_pre_hook(self._record_input)]
        for layer, block in enumerate(self._blocks, start=1):
            record = partial(self._record_attention, layer)
            handles.append(block.attn.register_forward_pre_hook(record))
            handles.append(block.register_forward_hook(partial(self._record_output, layer)))
        with self.branch_hooks("branch_ratio"), _removed(handles):
            yield

    @contextmanager
    def branch_hooks(self, statistic: str) -> Iterator[None]:
        """Record only the ratio of the attention branch to the residual stream, by this name."""
        handles = []
        for layer, block in enumerate(self._blocks, start=1):
            record = partial(self._record_branch, layer, statistic)
            handles.append(block.register_forward_pre_hook(self._keep_residual))
            handles.append(block.attn.register_forward_hook(record))
        with _removed(handles):
            yield

    def statistics(self, tower: str) -> Iterator[LayerStatistic]:
        if not self._values:
            inputs = {"vision": "images", "text": "texts"}[tower]
            raise ValueError(f"{inputs} (none) must hold at least one batch for the {tower} tower")
        for (layer, statistic), parts in sorted(self._values.items()):
            values = torch.cat(parts)
            mean = values.mean().item()
            low, high = values.quantile(torch.tensor([0.05, 0.95]).to(values)).tolist()
            yield LayerStatistic(
                tower=tower, layer=layer, statistic=statistic, mean=mean, low=low, high=high
            )

    def _record_input(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        num_tokens = inputs[0].shape[1]
        if not 2 <= num_tokens <= self._max_tokens:
            raise ValueError(
                f"sequence ({num_tokens} tokens) must have 2 to {self._max_tokens} tokens "
                "(max_tokens): attention is measured as whole matrices"
            )
        self._record_output(0, block, inputs, inputs[0])

    def _keep_residual(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._residual = inputs[0]

    def _record_branch(
        self, layer: int, statistic: str, _: nn.Module, inputs: tuple[Any, ...], branch: Tensor
    ) -> None:
        squares = [x.cpu().double().square().mean(dim=(1, 2)) for x in (branch, self._residual)]
        self._values[layer, statistic].append((squares[0] / squares[1]).sqrt())  # [B]

    def _record_output(
        self, layer: int, _: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> None:
        similarity = token_similarity(output.cpu().double())
        self._values[layer, "token_similarity"].append(similarity)

    def _record_attention(
        self, layer: int, attention: SelfAttention, inputs: tuple[Tensor, Patches | None]
    ) -> None:
        x, patches = inputs
        num_tokens, settings, causal = x.shape[1], attention.settings, attention.causal
        has_bound = settings.kind == "linear" and settings.feature_map == "affine"
        with _in_float64(attention):
            weights = attention.weights(x.double(), patches).cpu().flatten(0, 1)  # [B * H, N, N]
            vectors = attention.project(x.double()) if has_bound else ()
        if not weights.isfinite().all():
            raise ValueError(f"attention (layer {layer}) must be finite")
        for part in weights.split(max(1, _CHUNK_ELEMENTS // num_tokens**2)):
            for statistic, values in attention_statistics(part, causal=causal).items():
                self._values[layer, statistic].append(values)
        if has_bound:
            q, k, _ = (each.cpu().transpose(1, 2).flatten(0, 1) for each in vectors)
            bound = contrast_bound(q, k, causal=causal)
            self._values[layer, "contrast_bound"].append(bound)
        uniform_rank = _uniform_rank(num_tokens, causal).expand(len(x))
        self._values[layer, "uniform_rank"].append(uniform_rank)


@contextmanager
def _in_float64(module: nn.Module) -> Iterator[None]:
    """Convert the weights of a module, and back at the end."""
    dtype = next(module.parameters()).dtype
    module.double()
    try:
        yield
    finally:
        module.to(dtype)


@contextmanager
def _removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@cache
def _uniform_rank(num_tokens: int, causal: bool) -> Tensor:
    weights = torch.ones(1, num_tokens, num_tokens, dtype=torch.float64)
    weights = weights.tril() if causal else weights
    return attention_statistics(weights, causal=causal)["effective_rank"]


def _cut_and_group(texts: Tensor) -> Iterator[Tensor]:
    """Cut token ids [B, L] after the end of text (the largest id) and yield groups [b, l] of equal
    length."""
    lengths = texts.argmax(dim=-1) + 1
    for length in lengths.unique().tolist():
        yield texts[lengths == length, :length]
