"""Settings of self-attention: one dataclass per kind, chosen by its ``kind``.

Each says with class variables what it allows, so that a configuration is checked before anything is
allocated. The computation of a kind is the module of its name in ``ds_linclip/model/attention``.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

__all__ = [
    "ATTENTION_KINDS",
    "Attention",
    "AttentionSettings",
    "DepthwiseLocal",
    "FrequencyAttention",
    "LayerAttention",
    "LinearAttention",
    "Local",
    "NoLocal",
    "SoftmaxAttention",
    "StateAttention",
]


@dataclass(kw_only=True, frozen=True)
class NoLocal:
    """No local part."""

    kind: Literal["none"] = "none"


@dataclass(kw_only=True, frozen=True)
class DepthwiseLocal:
    """A depthwise convolution of the values, added to the output of attention.

    In the image tower it runs over the grid of patches, with zeros beyond the grid and for dropped
    patches; the class token has none. In the text tower it runs over a token and those before it.
    """

    kind: Literal["depthwise"] = "depthwise"
    #: Side of the square of patches, or number of tokens of a text; odd.
    size: int = 3


#: The local part of an attention.
Local = NoLocal | DepthwiseLocal


@dataclass(kw_only=True, frozen=True)
class AttentionSettings:
    """What all kinds have in common.

    Attributes:
        kind: Chooses the kind; the name of its module in ``ds_linclip/model/attention``.
        head_dims: Sizes of a head that the kind can run.
        may_be_causal: Whether a text tower may use it.
        splits_tokens: Whether the tokens of an image may be on several ranks (``parallel.cp``).
    """

    kind: str
    head_dims: ClassVar[range] = range(1, 2**16)
    may_be_causal: ClassVar[bool] = True
    splits_tokens: ClassVar[bool] = False

    @property
    def needs_grid(self) -> bool:
        """Whether it must know where in the image the patches lie."""
        return False

    @property
    def has_weights(self) -> bool:
        """Whether a head's output is a sum of its values times numbers, and not matrices."""
        return True

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        yield from ()

    def __str__(self) -> str:
        """Return the kind and its settings."""
        settings = asdict(self)
        kind = settings.pop("kind")
        shown = ", ".join(f"{name} {_shown(value)}" for name, value in settings.items())
        return f"{kind} ({shown})" if shown else str(kind)


@dataclass(kw_only=True, frozen=True)
class StateAttention(AttentionSettings):
    """Kinds that sum phi(k) v^T over the keys, in O(N) time and memory for N tokens."""

    head_dims: ClassVar[range] = range(16, 257)
    splits_tokens: ClassVar[bool] = True

    #: Apply RMSNorm with a learned gain to the output of every head, before the output projection.
    head_norm: bool = False
    #: A local part that is added to the output of attention.
    local: Local = NoLocal()

    @property
    def needs_grid(self) -> bool:
        """Whether it must know where in the image the patches lie."""
        return self.local.kind != "none"

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        if isinstance(self.local, DepthwiseLocal) and (
            self.local.size < 1 or self.local.size % 2 == 0
        ):
            yield "local.size", "be odd and positive"


@dataclass(kw_only=True, frozen=True)
class SoftmaxAttention(AttentionSettings):
    """Softmax attention, torch's SDPA: O(N^2) time for N tokens. The attention of open_clip."""

    kind: Literal["softmax"] = "softmax"


@dataclass(kw_only=True, frozen=True)
class LinearAttention(StateAttention):
    """Linear attention with an explicit score, Eq. 4 and Eq. 7 of arXiv 2604.10064.

    Queries and keys are L2-normalized per head, and `feature_map` gives the score of a query q and
    a key k, where x = q.k.
    """

    kind: Literal["linear"] = "linear"
    #: `affine`: 1 + x (arXiv 2604.10064). `quadratic`: 1 + x + x^2 / 2, slower. `relu` and
    #: `softplus`: phi(q).phi(k), with phi applied to every entry.
    feature_map: Literal["affine", "quadratic", "relu", "softplus"] = "affine"
    #: Divide the weighted sum of values by the sum of scores (Eq. 4). Otherwise the output is the
    #: weighted sum itself (Eq. 7).
    normalized: bool = False
    #: Factor on the scores in Eq. 7; 0.5 brings 1 + x into [0, 1]. No effect on Eq. 4.
    score_scale: float = 0.5
    #: Exponent alpha: the output of Eq. 7 is multiplied by (number of keys)^-alpha. No effect on
    #: Eq. 4.
    length_exponent: float = 0.0


@dataclass(kw_only=True, frozen=True)
class FrequencyAttention(AttentionSettings):
    """RWKV-7's recurrence on the real and the imaginary part of a Fourier transform.

    The idea is FRWKV's, arXiv 2512.07539; the recurrence is that of arXiv 2503.14456, in O(N) time
    and memory for N tokens.
    """

    kind: Literal["frequency"] = "frequency"
    #: What is transformed. `features`: those of every token and head; the recurrence runs over the
    #: tokens, in images also from the last to the first. `tokens`, for images: the grid of patches;
    #: the recurrence runs over the frequencies, from low to high, and then the class token.
    axis: Literal["features", "tokens"] = "features"
    #: Side of the state on which a token's transition acts. `right`: on keys, as in RWKV-7, so that
    #: a repeated key is overwritten. `paper`: on values, as in FRWKV's released code, where it is
    #: not; such attention has no weights that `linclip eval diagnostics` could measure.
    side: Literal["right", "paper"] = "right"

    @property
    def needs_grid(self) -> bool:
        """Whether it must know where in the image the patches lie."""
        return self.axis == "tokens"

    @property
    def has_weights(self) -> bool:
        """Whether a head's output is a sum of its values times numbers, and not matrices."""
        return self.side == "right"

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        if causal and self.axis == "tokens":
            yield "axis", "be features: a transform over the tokens of a text shows later ones"


#: The attention of a layer.
Attention = FrequencyAttention | LinearAttention | SoftmaxAttention
#: The settings of every kind, by its name.
ATTENTION_KINDS: dict[str, Any] = {each.kind: each for each in get_args(Attention)}


@dataclass(kw_only=True)
class LayerAttention:
    """The attention of some layers of a tower."""

    #: The layers, counted from 0 as in a Python index or slice: `0::4` is every fourth, `-2:` the
    #: last two, `5` one.
    layers: str = ""
    #: Their attention; `kind` is required.
    attention: Attention = LinearAttention()

    def numbers(self, num_layers: int) -> range:
        """Return the layers' numbers in a tower of ``num_layers``.

        Raises:
            ValueError: when ``layers`` is neither an index nor a slice, or names no layer.
        """
        try:
            parts = [int(part) if part.strip() else None for part in self.layers.split(":")]
            if len(parts) == 1 and parts[0] is not None:
                index = range(num_layers)[parts[0]]
                return range(index, index + 1)
            found = range(num_layers)[slice(*parts)] if 2 <= len(parts) <= 3 else range(0)
        except (ValueError, IndexError):
            found = range(0)
        if not found:
            raise ValueError(
                f"layers ({self.layers!r}) must be an index or a slice of the {num_layers} layers, "
                "such as 0::4, -2: or 5"
            )
        return found


def _shown(value: object) -> str:
    if isinstance(value, dict):
        kind = value.pop("kind")
        return " ".join([kind, *(f"{k} {v}" for k, v in value.items())])
    return str(value)
