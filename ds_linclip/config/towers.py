"""The towers of the model: their architecture, in open_clip's names."""

from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Literal

from ds_linclip.config.attention import Attention, LayerAttention, LinearAttention

__all__ = ["ModelConfig", "TextTower", "VisionTower"]

#: Activation of an MLP.
_Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


class _Layers:
    """The attention of a tower's layers."""

    attention: Attention
    attention_by_layer: list[LayerAttention]
    layers: int

    @property
    def attentions(self) -> list[Attention]:
        """The attention of every layer."""
        found = [self.attention] * self.layers
        for each in self.attention_by_layer:
            for number in each.numbers(self.layers):
                found[number] = each.attention
        return found

    @property
    def attention_text(self) -> str:
        """The attention of all layers, in words."""
        runs = [(str(each), len(list(same))) for each, same in groupby(self.attentions)]
        if len(runs) == 1:
            return runs[0][0]
        stops = accumulate(length for _, length in runs)
        return "; ".join(
            f"{_numbered(stop - length, stop - 1)}: {text}"
            for (text, length), stop in zip(runs, stops, strict=True)
        )


@dataclass(kw_only=True)
class VisionTower(_Layers):
    """The image tower, a ViT. Field names are those of open_clip's `vision_cfg`."""

    #: (height, width) in pixels. In a file or on the command line a single number means a square.
    image_size: tuple[int, int] = (224, 224)
    #: Side of a square patch in pixels.
    patch_size: int = 16
    #: Size of a token's embedding.
    width: int = 768
    #: Number of transformer blocks.
    layers: int = 12
    #: Size of one attention head; must divide `width`.
    head_width: int = 64
    #: Hidden size of the MLP, as a multiple of `width`.
    mlp_ratio: float = 4.0
    #: Fraction of the patches of every training image that is dropped (FLIP, arXiv 2212.00794).
    patch_dropout: float = 0.0
    #: Activation of the MLPs: `gelu`; `gelu_tanh`, its approximation by tanh; `quick_gelu`,
    #: x sigmoid(1.702 x), of OpenAI's weights.
    activation: _Activation = "gelu"
    #: Added to the variance in every LayerNorm.
    norm_eps: float = 1e-5
    #: Initial value of LayerScale (arXiv 2103.17239), a learned factor per channel on what
    #: attention and the MLP add; null: no LayerScale.
    ls_init_value: float | None = None
    #: Add a class token, before the patches. Without one there is a bias of the patch embedding,
    #: as in SigLIP.
    class_token: bool = True
    #: What the features are read from. `tok`: the class token. `avg`: the mean of the patches.
    #: `map`: attention pooling, where a learned query sees all patches, then an MLP (SigLIP, arXiv
    #: 2303.15343).
    pool_type: Literal["tok", "avg", "map"] = "tok"
    #: Leave out the LayerNorm before the blocks.
    no_ln_pre: bool = False
    #: With `pool_type: avg`: the LayerNorm after the blocks runs on the mean, not on every patch.
    final_ln_after_pool: bool = False
    #: `linear`: a projection to `embed_dim`. `none`: none; `width` must be `embed_dim`.
    proj_type: Literal["linear", "none"] = "linear"
    #: The attention of every layer; `kind` chooses one of the kinds below.
    attention: Attention = field(default_factory=LinearAttention)
    #: Layers with another attention, such as `[{layers: '-2:', attention: {kind: softmax}}]`; the
    #: last entry that names a layer counts.
    attention_by_layer: list[LayerAttention] = field(default_factory=list)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_width

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image of the configured size."""
        return self.num_tokens_at(self.image_size)

    def num_tokens_at(self, image_size: tuple[int, int]) -> int:
        """Return the number of tokens of an image of that (height, width)."""
        return self.num_class_tokens + self.num_patches_at(image_size)

    def num_patches_at(self, image_size: tuple[int, int]) -> int:
        """Return the number of patches of an image of that (height, width)."""
        height, width = image_size
        return (height // self.patch_size) * (width // self.patch_size)

    def num_kept_patches_at(self, image_size: tuple[int, int]) -> int:
        """Return how many patches of a training image `patch_dropout` keeps."""
        return max(1, int(self.num_patches_at(image_size) * (1 - self.patch_dropout)))

    def num_kept_tokens_at(self, image_size: tuple[int, int]) -> int:
        """Return the number of tokens of a training image of that (height, width)."""
        return self.num_class_tokens + self.num_kept_patches_at(image_size)

    @property
    def num_class_tokens(self) -> int:
        """Number of tokens before those of the patches, 0 or 1."""
        return int(self.class_token)

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return False

    @property
    def norms_pooled(self) -> bool:
        """Whether the last LayerNorm runs on the pooled token alone; for the class token that is
        the same as running on all."""
        return self.final_ln_after_pool or self.pool_type == "tok"


@dataclass(kw_only=True)
class TextTower(_Layers):
    """The text tower, a transformer. Field names are those of open_clip's `text_cfg`."""

    #: Tokens per caption; longer captions are cut off.
    context_length: int = 77
    #: Vocabulary size of open_clip's tokenizer.
    vocab_size: int = 49408
    #: Size of a token's embedding.
    width: int = 512
    #: Number of attention heads; must divide `width`.
    heads: int = 8
    #: Number of transformer blocks.
    layers: int = 12
    #: Hidden size of the MLP, as a multiple of `width`.
    mlp_ratio: float = 4.0
    #: Activation of the MLPs: `gelu`; `gelu_tanh`, its approximation by tanh; `quick_gelu`,
    #: x sigmoid(1.702 x), of OpenAI's weights.
    activation: _Activation = "gelu"
    #: Added to the variance in every LayerNorm.
    norm_eps: float = 1e-5
    #: Initial value of LayerScale (arXiv 2103.17239), a learned factor per channel on what
    #: attention and the MLP add; null: no LayerScale.
    ls_init_value: float | None = None
    #: Let every token see all tokens of a text, padding too, as in SigLIP; otherwise those before.
    no_causal_mask: bool = False
    #: Token that the features are read from. `argmax`: that with the largest id, CLIP's end of
    #: text. `last`, `first`: that at the last or the first position.
    pool_type: Literal["argmax", "last", "first"] = "argmax"
    #: Add a bias to the projection.
    proj_bias: bool = False
    #: Name on the Hugging Face hub of the tokenizer of imported weights; null: CLIP's own.
    hf_tokenizer_name: str | None = None
    #: How open_clip cleans a text before that tokenizer, such as `canonicalize`.
    hf_tokenizer_clean: str | None = None
    #: The attention of every layer; `kind` chooses one of the kinds below.
    attention: Attention = field(default_factory=LinearAttention)
    #: Layers with another attention, such as `[{layers: '-2:', attention: {kind: softmax}}]`; the
    #: last entry that names a layer counts.
    attention_by_layer: list[LayerAttention] = field(default_factory=list)

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return not self.no_causal_mask


@dataclass(kw_only=True)
class ModelConfig:
    """Both towers and their shared embedding space."""

    #: Size of the image and text features, in the space that both towers share.
    embed_dim: int = 512
    vision: VisionTower = field(default_factory=VisionTower)
    text: TextTower = field(default_factory=TextTower)


def _numbered(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"
