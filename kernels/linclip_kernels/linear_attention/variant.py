"""The variant of linear attention to compute, as one value."""

from typing import NamedTuple

__all__ = ["DENOMINATOR_EPS", "NORM_EPS", "Variant"]

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
        """Whether the weight of a row's only key, score / score, is set to 1: 1 + q.k may be 0."""
        return self.feature_map == "affine" and (self.normalized or self.centered)

    @property
    def has_length_factor(self) -> bool:
        """Whether rows are scaled by a power of their number of keys."""
        return not self.normalized and self.length_exponent != 0

    @property
    def has_inverse_length(self) -> bool:
        """Whether rows are divided by their number of keys."""
        return not self.normalized and self.length_exponent == 1
