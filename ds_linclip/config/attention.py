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
    "FastAttention",
    "FocusedAttention",
    "FrequencyAttention",
    "GatedDeltaAttention",
    "HedgehogAttention",
    "InlineAttention",
    "LayerAttention",
    "LinearAttention",
    "Local",
    "LunaAttention",
    "MilaAttention",
    "NoLocal",
    "PolaformerAttention",
    "PredictedLocal",
    "QtAttention",
    "SoftmaxAttention",
    "StateAttention",
    "WindowAttention",
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


@dataclass(kw_only=True, frozen=True)
class PredictedLocal:
    """The local residual of InLine (arXiv 2412.06590): a convolution of the values whose weights
    are predicted from the mean of the layer's input, added to the output of attention.

    A two-layer MLP per head, with GELU between, gives 3 x 3 weights for every channel of an image.
    The mean is over all tokens, and patches have the residual, the class token has none. In the
    text tower the mean is that of a token and those before it, and gives every token 3 weights per
    channel, for itself and the two tokens before it.
    """

    kind: Literal["predicted"] = "predicted"


#: The local part of an attention.
Local = NoLocal | DepthwiseLocal | PredictedLocal


@dataclass(kw_only=True, frozen=True)
class AttentionSettings:
    """What all kinds have in common.

    Attributes:
        kind: Chooses the kind; the name of its module in ``ds_linclip/model/attention``.
        head_dims: Sizes of a head that the kind can run.
        splits_tokens: Whether the tokens of an image may be on several ranks (``parallel.cp``).
    """

    kind: str
    head_dims: ClassVar[range] = range(1, 2**16)
    splits_tokens: ClassVar[bool] = False

    @property
    def needs_grid(self) -> bool:
        """Whether it must know where in the image the patches lie."""
        return False

    @property
    def has_weights(self) -> bool:
        """Whether a head's output is a sum of its values, each times a number, not a matrix."""
        return True

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        yield from ()

    def problems_when_split(self) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks if the tokens are on several ranks."""
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

    def problems_when_split(self) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks if the tokens are on several ranks."""
        if self.local.kind != "none":
            yield "local.kind", "be none: neighbours would lie on different ranks; take parallel.tp"


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
        """Whether a head's output is a sum of its values, each times a number, not a matrix."""
        return self.side == "right"

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        if causal and self.axis == "tokens":
            yield "axis", "be features: a transform over the tokens of a text shows later ones"


@dataclass(kw_only=True, frozen=True)
class GatedDeltaAttention(AttentionSettings):
    """Gated DeltaNet, a linear attention whose state forgets and overwrites (arXiv 2412.06464).

    A text is scanned once; an image forwards and backwards, row by row, and the outputs of both
    scans are averaged.
    """

    kind: Literal["gated_delta"] = "gated_delta"
    #: Taps of the depthwise convolution of queries, keys and values: the token and those before it
    #: in the scan.
    conv_size: int = 4
    #: Multiply the normalized output by silu of a projection of the layer's input, which has as
    #: many weights as that of the queries.
    gate: bool = True
    #: How a GPU scans: `torch`, or `fla`, the kernels of flash-linear-attention. Other devices use
    #: torch.
    implementation: Literal["torch", "fla"] = "torch"

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        if self.conv_size < 1:
            yield "conv_size", "be at least 1, the token itself"


@dataclass(kw_only=True, frozen=True)
class WindowAttention(AttentionSettings):
    """Softmax attention of neighbours, in O(N) time for N tokens (arXiv 2004.05150).

    A token of a text sees a window that ends with it; a patch of an image sees a square around it
    and the class token, which sees all. A window that covers everything is softmax attention.
    """

    kind: Literal["window"] = "window"
    #: Number of tokens of a text that a token sees, itself the last of them.
    size: int = 32
    #: Greatest difference of rows, and of columns, of patches that see each other.
    radius: int = 3

    @property
    def needs_grid(self) -> bool:
        """Whether it must know where in the image the patches lie."""
        return True

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        if self.size < 1:
            yield "size", "be at least 1, the token itself"
        if self.radius < 0:
            yield "radius", "not be negative"


@dataclass(kw_only=True, frozen=True)
class FastAttention(StateAttention):
    """FAST (arXiv 2402.07901): the score is the Taylor polynomial of exp(q.k), divided by its sum
    over the keys."""

    kind: Literal["fast"] = "fast"
    #: Order of the polynomial: 1, 1 + x; 2, 1 + x + x^2 / 2, slower.
    order: int = 1
    #: `token`: every query and key is L2-normalized. `max`: queries are divided by the largest norm
    #: among those of their sequence and head, and keys likewise; image tower only, without
    #: `parallel.cp`.
    qk_norm: Literal["token", "max"] = "token"

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        yield from super().problems(causal=causal)
        if self.order not in (1, 2):
            yield "order", "be 1 or 2"
        if causal and self.qk_norm == "max":
            yield "qk_norm", "be token in a text: the largest norm may be that of a later token"

    def problems_when_split(self) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks if the tokens are on several ranks."""
        yield from super().problems_when_split()
        if self.qk_norm == "max":
            yield "qk_norm", "be token: the largest norm may be that of a token of another rank"


@dataclass(kw_only=True, frozen=True)
class InlineAttention(StateAttention):
    """InLine attention (arXiv 2412.06590): scores q.k / sqrt(head_dim) minus their mean over the
    keys, plus one, divided by the number of keys.

    The weights of a row sum to 1 and may be negative. InLine's own local part is `predicted`.
    """

    kind: Literal["inline"] = "inline"


@dataclass(kw_only=True, frozen=True)
class QtAttention(StateAttention):
    """QT-ViT's quadratic Taylor attention (NeurIPS 2024), divided by the sum of scores."""

    kind: Literal["qt"] = "qt"
    #: `compact`: c^2 + cos(q * q, k * k), of squared entries and with a learned c per head, as
    #: released. `full`: 1 + x + x^2 / 2 of x = q.k / sqrt(head_dim), as in the paper; slower, and
    #: inexact in bfloat16 where |q| |k| / sqrt(head_dim) is above about 30.
    form: Literal["compact", "full"] = "compact"
    #: Add GELU(a v + b) of the value v of each token, with a learned gain a and bias b per channel.
    value_part: bool = False


@dataclass(kw_only=True, frozen=True)
class FocusedAttention(StateAttention):
    """Focused linear attention of FLatten Transformer (arXiv 2308.00442), normalized.

    Features are relu(x)^p, per head, rescaled to the norm of relu(x).
    """

    kind: Literal["focused"] = "focused"
    #: The power p, the paper's focusing factor; at 1 features are relu(x).
    power: float = 3.0

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        yield from super().problems(causal=causal)
        if self.power < 1:
            yield "power", "be at least 1"


@dataclass(kw_only=True, frozen=True)
class MilaAttention(StateAttention):
    """Linear attention of MILA (arXiv 2405.16605), also called MLLA.

    Features are elu(x) + 1. Those of the numerator are rotated by the place of the token (RoPE):
    row and column of a patch, position in a text. Those of the denominator are not.
    """

    kind: Literal["mila"] = "mila"
    head_dims: ClassVar[range] = range(16, 257, 4)
    #: Pairs of channels turn by rotation_base^-t radians per patch or token, t from 0 to almost 1.
    rotation_base: float = 10000.0

    @property
    def needs_grid(self) -> bool:
        """Whether it must know where in the image the patches lie."""
        return True

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        yield from super().problems(causal=causal)
        if self.rotation_base < 1:
            yield "rotation_base", "be at least 1"


@dataclass(kw_only=True, frozen=True)
class PolaformerAttention(StateAttention):
    """Polarity-aware linear attention of PolaFormer (arXiv 2501.15061), normalized.

    Features are relu(x)^p and relu(-x)^p with a learned power p per channel. Half of the values
    are weighted by entries of q and k with equal signs, half by those with opposite signs.
    """

    kind: Literal["polaformer"] = "polaformer"
    head_dims: ClassVar[range] = range(16, 129, 2)
    #: Powers are 1 + alpha * sigmoid(learned number), 1 + alpha / 2 at first.
    alpha: float = 4.0
    #: Multiply the output by a linear map of the layer's input, as large as the one that gives the
    #: queries.
    gate: bool = True

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        yield from super().problems(causal=causal)
        if self.alpha < 0:
            yield "alpha", "not be negative"


@dataclass(kw_only=True, frozen=True)
class HedgehogAttention(StateAttention):
    """Linear attention whose learned features are softmaxes over the entries of a head, Hedgehog,
    arXiv 2402.04347.

    A query and a key have the features [softmax(A x), softmax(-A x)], with a matrix A for the
    queries and one for the keys of every head. The output is divided by the sum of scores.
    """

    kind: Literal["hedgehog"] = "hedgehog"
    # The operator takes at most 256 features, two for each entry of a head.
    head_dims: ClassVar[range] = range(16, 129)


@dataclass(kw_only=True, frozen=True)
class LunaAttention(StateAttention):
    """Linear attention with a learned feature map that all heads share, LUNA, arXiv 2512.08061.

    A query and a key x have the features psi_l(w_i.x + b_i), where the psi_l are the outputs of one
    small MLP of a number, without negative values. The output is divided by the sum of scores.
    """

    kind: Literal["luna"] = "luna"
    #: Directions w_i on which queries and keys are projected.
    directions: int = 16
    #: Features psi_l of every direction; 16 <= directions x channels <= 256.
    channels: int = 4
    #: Hidden units of the MLP.
    hidden: int = 64

    def problems(self, *, causal: bool) -> Iterator[tuple[str, str]]:
        """Yield a setting and the rule that its value breaks, for each rule that is broken."""
        yield from super().problems(causal=causal)
        if not 1 <= self.channels <= 256:
            nearest = 1 if self.channels < 1 else 256
            yield "channels", f"be in 1..256: {nearest} would do"
        elif not 16 <= self.directions * self.channels <= 256:
            fewest, most = -(-16 // self.channels), 256 // self.channels
            nearest = min(max(self.directions, fewest), most)
            yield (
                "directions",
                f"be in {fewest}..{most} with {self.channels} channels, for "
                f"16 <= directions x channels <= 256: {nearest} would do",
            )
        if self.hidden < 1:
            yield "hidden", "be at least 1"


#: The attention of a layer.
Attention = (
    FastAttention
    | FocusedAttention
    | FrequencyAttention
    | GatedDeltaAttention
    | HedgehogAttention
    | InlineAttention
    | LinearAttention
    | LunaAttention
    | MilaAttention
    | PolaformerAttention
    | QtAttention
    | SoftmaxAttention
    | WindowAttention
)


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
