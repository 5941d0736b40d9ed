"""Layer-wise attention transfer: every layer learns the output of a teacher's layer.

The first stage of turning softmax attention into linear attention (LoLCATs, arXiv 2410.10254,
section 3.1; MOHAWK, arXiv 2408.10189, stage 2): no layer sees another's error, so all learn at
once, and only attention is trained.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_linclip.model.attention import SelfAttention
from ds_linclip.model.clip import CLIP

__all__ = ["transfer_attention"]


def transfer_attention(model: CLIP, teacher: CLIP) -> None:
    """Train the attention of ``model`` on the layers of ``teacher``, and freeze all else.

    A call of the model then returns, instead of features, the errors of its layers: [B, image
    layers] and [B, text layers]. The error of a layer is the squared distance of its attention's
    output from the teacher's for the teacher's input, relative to the size of the teacher's output
    in the same sample. Encoding images and texts stays as it is.

    Args:
        model: The student, whole but for its heads, which may be split over ranks.
        teacher: A model of the same widths and layers, whole on this rank.

    Raises:
        ValueError: when their layers differ.
    """
    ours, theirs = _attentions(model), _attentions(teacher)
    if [(n, each.width) for n, each in ours.items()] != [(n, a.width) for n, a in theirs.items()]:
        raise ValueError("the teacher must have the layers and the widths of the model")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for attention in ours.values():
        attention.requires_grad_(True)
    for parameter in model.logit_parameters():
        parameter.requires_grad_(True)

    def errors(images: Tensor, texts: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        assert teacher.visual is not None
        with torch.no_grad(), _calls_of(theirs) as calls:
            pixels = images.to(next(teacher.parameters()).dtype)
            teacher.visual(pixels, teacher.visual.grid(pixels, *kept))
            teacher.encode_text(texts)
        found: dict[str, list[Tensor]] = {"visual": [], "text": []}
        for name, (arguments, wanted) in calls.items():
            found[name.partition(".")[0]].append(_error(ours[name], arguments, wanted))
        rows = (torch.stack(each, dim=1) for each in found.values())
        return *rows, *(p.view(1) for p in model.logit_parameters())

    model.run_instead(errors)


def _attentions(model: CLIP) -> dict[str, SelfAttention]:
    """Return the attention of every layer by its name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, SelfAttention)}


@contextmanager
def _calls_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Any, Tensor]]]:
    """Yield a dictionary that receives arguments and output of every module that is called."""
    calls: dict[str, tuple[Any, Tensor]] = {}
    with ExitStack() as hooks:
        for name, module in modules.items():

            def note(_: nn.Module, arguments: Any, output: Tensor, name: str = name) -> None:
                calls[name] = arguments, output

            hooks.callback(module.register_forward_hook(note).remove)
        yield calls


def _error(attention: SelfAttention, arguments: Any, wanted: Tensor) -> Tensor:
    """Return the relative squared error of an attention's output in every sample, [B], fp32."""
    x, *places = arguments
    dtype = next(attention.parameters()).dtype
    difference = attention(x.to(dtype), *places).float() - wanted.float()
    size = wanted.float().square().mean((1, 2))
    return difference.square().mean((1, 2)) / size.clamp(min=torch.finfo(torch.float32).tiny)
