"""The rules of an architecture, and how rules for single fields are checked."""

import math
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

from ds_linclip.config.attention import Attention
from ds_linclip.config.towers import ModelConfig, TextTower, VisionTower

__all__ = ["Rule", "check_fields", "check_model", "named_attentions", "positive", "require_patches"]

#: A rule for fields on their own, which None always satisfies: a test, in words, the fields.
Rule = tuple[Callable[[Any], bool], str, Iterable[str]]


def positive(*names: str) -> Rule:
    """Return the rule that fields must be greater than 0 and finite."""
    return lambda value: 0 < value < math.inf, "be greater than 0 and finite", names


_TOKENIZER_VOCABULARY = 49408  # open_clip's SimpleTokenizer
_MODEL_RULES: list[Rule] = [
    positive(
        *("vision.width", "vision.layers", "vision.mlp_ratio"),
        *("text.width", "text.layers", "text.mlp_ratio", "embed_dim", "text.vocab_size"),
        *("vision.norm_eps", "text.norm_eps"),
    ),
    (lambda n: n >= 3, "be at least 3: start, one token, end", ["text.context_length"]),
]


def check_model(model: ModelConfig) -> None:
    """Check the rules of an architecture.

    Raises:
        ValueError: naming the field, its value and the rule.
    """
    vision, text = model.vision, model.text
    check_fields(model, _MODEL_RULES, "model.")
    require_patches("model.vision.image_size", vision.image_size, vision.patch_size)
    for name, width, by_name, by in (
        ("model.vision.width", vision.width, "head_width", vision.head_width),
        ("model.text.width", text.width, "heads", text.heads),
    ):
        if by <= 0 or width % by:
            raise ValueError(f"{name} ({width}) must be a positive multiple of {by_name} ({by})")
    _check_pooling(model)
    for name, tower in (("model.vision", vision), ("model.text", text)):
        for path, attention in named_attentions(name, tower):
            _check_attention(path, attention, tower)
            if tower is text and not text.causal and attention.needs_grid:
                raise ValueError(
                    f"{path}.kind ({attention.kind}) needs a grid of patches, or a text with a "
                    "causal mask: set model.text.no_causal_mask=false, or take local.kind=none or "
                    "another kind"
                )


def _check_pooling(model: ModelConfig) -> None:
    vision, name = model.vision, "model.vision.pool_type"
    if vision.class_token and vision.pool_type == "map":
        raise ValueError(f"{name} (map) needs model.vision.class_token=false")
    if not vision.class_token and vision.pool_type == "tok":
        raise ValueError(f"{name} (tok) needs model.vision.class_token=true: take avg or map")
    if vision.final_ln_after_pool and vision.pool_type == "map":
        raise ValueError("model.vision.final_ln_after_pool (true) needs pool_type avg or tok")
    if vision.proj_type == "none" and vision.width != model.embed_dim:
        raise ValueError(
            f"model.vision.proj_type (none) needs model.vision.width ({vision.width}) equal to "
            f"model.embed_dim ({model.embed_dim}): take proj_type=linear"
        )
    if model.text.hf_tokenizer_name is None and model.text.vocab_size < _TOKENIZER_VOCABULARY:
        raise ValueError(
            f"model.text.vocab_size ({model.text.vocab_size}) must be at least "
            f"{_TOKENIZER_VOCABULARY}, the size of the tokenizer's vocabulary"
        )


def named_attentions(name: str, tower: VisionTower | TextTower) -> Iterator[tuple[str, Attention]]:
    """Yield every attention of a tower with the name of its section."""
    yield f"{name}.attention", tower.attention
    for index, each in enumerate(tower.attention_by_layer):
        path = f"{name}.attention_by_layer[{index}]"
        try:
            each.numbers(tower.layers)
        except ValueError as error:
            raise ValueError(f"{path}.{error}") from error
        yield f"{path}.attention", each.attention


def _check_attention(path: str, attention: Attention, tower: VisionTower | TextTower) -> None:
    head_dim, allowed = tower.width // tower.heads, attention.head_dims
    if head_dim not in allowed:
        nearest = min(allowed, key=lambda size: abs(size - head_dim))
        steps = f" in steps of {allowed.step}" if allowed.step > 1 else ""
        raise ValueError(
            f"{path}.kind ({attention.kind}) needs a head dimension in {allowed[0]}.."
            f"{allowed[-1]}{steps}, not ({head_dim}): {nearest} would do"
        )
    for field, rule in attention.problems(causal=tower.causal):
        raise ValueError(f"{path}.{field} ({attrgetter(field)(attention)}) must {rule}")


def check_fields(node: object, rules: Iterable[Rule], prefix: str = "") -> None:
    """Check fields of a dataclass, by their dotted names, against rules for single fields.

    Raises:
        ValueError: naming the first field that breaks one, with ``prefix``, its value and the rule.
    """
    for is_met, rule, names in rules:
        for name in names:
            value = attrgetter(name)(node)
            if value is not None and not is_met(value):
                raise ValueError(f"{prefix}{name} ({value!r}) must {rule}")


def require_patches(name: str, image_size: tuple[int, int], patch_size: int) -> None:
    """Check that images of a (height, width) consist of whole patches.

    Raises:
        ValueError: naming the field ``name``, its value and the rule.
    """
    if patch_size <= 0 or any(side <= 0 or side % patch_size for side in image_size):
        raise ValueError(
            f"{name} {image_size} must be a height and a width that are both a positive multiple "
            f"of patch_size ({patch_size})"
        )
