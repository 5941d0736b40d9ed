"""The variant of linear attention to compute, as one value."""

from typing import NamedTuple

__all__ = ["DENOMINATOR_EPS", "NORM_EPS", "VARIANT_SCHEMA", "Variant"]

#: Added to |q|^2 and |k|^2 before the inverse square root.
NORM_EPS = 1e-6
#: Smallest denominator of Eq. 4, per key.
DENOMINATOR_EPS = 1e-6


class Variant(NamedTuple):
    """The arguments of :func:`linclip_kernels.linear_attention` that choose the formula."""

    causal: bool = False
    normalized: bool = False
    qk_norm: bool = True
    feature_map: str = "affine"
    score_scale: float = 0.5
    length_exponent: float = 0.0
    qk_scale: float = 1.0
    centered: bool = False

    @property
    def has_constant(self) -> bool:
        """Whether the score is 1 + phi(q).phi(k), not phi(q).phi(k)."""
        return self.feature_map == "affine"

    @property
    def fixes_single_key(self) -> bool:
        """Whether a row's only key has the score 1, whatever q and k are.

        1 + q.k may be 0, and its weight is score / score; a centred score of one key is 1.
        """
        return (self.normalized or self.centered) and self.feature_map == "affine"

    @property
    def has_length_factor(self) -> bool:
        """Whether rows are scaled by a power of their number of keys."""
        return not self.normalized and self.length_exponent != 0

    @property
    def needs_length_factors(self) -> bool:
        """Whether the Triton kernels, which only divide by the number of keys, need a table."""
        return self.has_length_factor and not self.has_inverse_length

    @property
    def has_inverse_length(self) -> bool:
        """Whether rows are divided by their number of keys."""
        return not self.normalized and self.length_exponent == 1

    def without_known_sums(self) -> "Variant":
        """Return the same variant without a division by sums of centred scores: n of n keys."""
        if not (self.centered and self.normalized):
            return self
        return self._replace(normalized=False, score_scale=1.0, length_exponent=1.0)


#: The fields as arguments of an operator of torch, "bool causal, ...".
VARIANT_SCHEMA = ", ".join(
    f"{kind.__name__} {name}" for name, kind in Variant.__annotations__.items()
)
