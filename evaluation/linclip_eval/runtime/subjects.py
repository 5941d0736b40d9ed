"""Subjects of the runtime measurement: attention alone, a layer, a block, whole towers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ds_linclip.config import Attention, LinearAttention, ModelConfig, SoftmaxAttention
from ds_linclip.interop.hub_folder import parse_config
from ds_linclip.model.attention import attention_class
from ds_linclip.model.block import Block, BlockInit
from ds_linclip.model.towers import TextTransformer, VisionTransformer
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.runtime.measure import Inputs

__all__ = ["ATTENTIONS", "DIRECTIONS", "SUBJECTS", "Inputs", "Subject"]

ATTENTIONS: dict[str, Attention] = {
    "softmax": SoftmaxAttention(),
    "Eq. 7": LinearAttention(),
    "Eq. 4": LinearAttention(normalized=True),
}
DIRECTIONS = ("inference", "training")
#: Name -> description.
SUBJECTS = {
    "attention": "the bare operator on q, k, v [1, N, H, 64]",
    "layer": "a self-attention layer of ViT-B/16's image tower, with its projections",
    "block": "a block of ViT-B/16's image tower, with norms and MLP",
    "vit-s-16": "all blocks and the head of ViT-S/16's image tower",
    "vit-b-16": "all blocks and the head of ViT-B/16's image tower",
    "vit-l-16": "all blocks and the head of ViT-L/16's image tower",
    "text": "all blocks and the head of ViT-B/16's text tower, which is causal",
}
#: Name -> the model of open_clip whose image tower it is.
_IMAGE_TOWERS = {"vit-s-16": "ViT-S-16", "vit-b-16": "ViT-B-16", "vit-l-16": "ViT-L-16"}
#: Features of a head of ``attention``, as in all of these models.
_HEAD_DIM = 64


class Subject:
    """One of :data:`SUBJECTS` with each of :data:`ATTENTIONS`, for one sequence of any length.

    q, k and v of ``attention`` are views of one tensor, as in the model. The embedding of a tower
    is left out: it costs O(N) with any attention, and has a learned position for every token.

    Args:
        what: One of :data:`SUBJECTS`.
        mesh: Mesh of this process alone; holds the device.
        dtype: Type of weights, which are random, and tokens.
        num_heads: Number of heads of ``attention``.
    """

    def __init__(self, what: str, mesh: Mesh, dtype: torch.dtype, *, num_heads: int) -> None:
        config = _config(what)
        self.what, self.device = what, mesh.device
        self.directions: Sequence[str] = DIRECTIONS
        self.growth: Mapping[str, int] = {
            name: 2 if each.kind == "softmax" else 1 for name, each in ATTENTIONS.items()
        }
        self._dtype, self._num_heads = dtype, num_heads
        self._width = config.text.width if what == "text" else config.vision.width
        self._embed_dim = config.embed_dim
        self._modules = {
            name: _make_module(what, attention, mesh).to(mesh.device, dtype)
            for name, attention in ATTENTIONS.items()
        }

    def num_sequences(self, num_tokens: int) -> int:
        """Return 1."""
        return 1

    def inputs(self, num_tokens: int) -> Inputs:
        """Return random inputs of that many tokens."""
        if self.what == "attention":
            heads = 1, num_tokens, self._num_heads
            inputs = self._random(*heads, 3, _HEAD_DIM).unbind(3)  # [1, N, H, D] each, strided
            grad = self._random(*heads, _HEAD_DIM)
        else:
            inputs = (self._random(1, num_tokens, self._width),)
            keeps_tokens = self.what in ("layer", "block")
            shape = (num_tokens, self._width) if keeps_tokens else (self._embed_dim,)
            grad = self._random(1, *shape)
        for x in inputs:
            x.requires_grad_()
        return inputs, grad

    def call(self, attention: str, direction: str, inputs: Inputs) -> Callable[[], object]:
        """Return a forward, or a forward and the gradients of inputs and weights."""
        module, (tensors, grad) = self._modules[attention], inputs
        weights = [] if self.what == "attention" else list(module.parameters())

        def infer() -> object:
            with torch.no_grad():
                return self._forward(module, *tensors)

        def train() -> object:
            return torch.autograd.grad(self._forward(module, *tensors), [*tensors, *weights], grad)

        return infer if direction == "inference" else train

    def _forward(self, module: Any, x: Tensor, *more: Tensor) -> Any:
        if self.what == "attention":
            return module.attend(x, *more)
        if self.what == "text":  # of texts that end with their last token
            texts = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
            texts[:, -1] = 1
            return module(texts, x)
        return module(x)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self._dtype)


def _config(what: str) -> ModelConfig:
    return parse_config(open_clip.get_model_config(_IMAGE_TOWERS.get(what, "ViT-B-16")))


def _make_module(what: str, attention: Attention, mesh: Mesh) -> nn.Module:
    config, init = _config(what), BlockInit.vision()
    vision, text = config.vision, config.text
    vision.attention = text.attention = attention
    if what in ("attention", "layer"):
        inits = {"init_qkv": init.qkv, "init_out": init.attn_out}
        kind = attention_class(attention)
        return kind(vision.width, vision.heads, attention, mesh, causal=False, **inits)
    if what == "block":
        sizes = vision.width, vision.heads, vision.mlp_ratio
        return Block(*sizes, attention, mesh, causal=False, init=init)
    width = config.embed_dim
    if what == "text":
        return TextTransformer(text, width, mesh, units=range(1, text.layers + 2), seed=0)
    return VisionTransformer(vision, width, mesh, units=range(1, vision.layers + 2), seed=0)
