"""Settings of the terms of the loss and of the teacher of a distillation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

__all__ = [
    "ContrastiveTerm",
    "FeatureTerm",
    "LayerTerm",
    "LossTerm",
    "SimilarityTerm",
    "TeacherConfig",
]


@dataclass(kw_only=True, frozen=True)
class _Term:
    """A term of the loss.

    Attributes:
        kind: Chooses the term.
        needs_teacher: Whether it compares with a teacher's features.
    """

    needs_teacher: ClassVar[bool] = False
    #: Factor on the term at the first step.
    weight: float = 1.0
    #: Factor on the term at the last step, between which it changes linearly; null: `weight`.
    final_weight: float | None = None

    def weight_at(self, step: int, steps: int) -> float:
        """Return the factor in the 0-based ``step`` of all ``steps``."""
        if self.final_weight is None or steps < 2:
            return self.weight
        return self.weight + (self.final_weight - self.weight) * step / (steps - 1)


@dataclass(kw_only=True, frozen=True)
class ContrastiveTerm(_Term):
    """The contrastive loss of `loss.kind`."""

    kind: Literal["contrastive"] = "contrastive"


@dataclass(kw_only=True, frozen=True)
class FeatureTerm(_Term):
    """Cosine distance of image and text features to the teacher's (CLIP-KD, arXiv 2307.12732); the
    teacher must have the same `embed_dim`."""

    kind: Literal["features"] = "features"
    needs_teacher: ClassVar[bool] = True


@dataclass(kw_only=True, frozen=True)
class SimilarityTerm(_Term):
    """KL divergence between the probabilities that teacher and student give every text for an
    image and every image for a text, over the global batch (MobileCLIP, arXiv 2311.17049)."""

    kind: Literal["similarity"] = "similarity"
    needs_teacher: ClassVar[bool] = True
    #: Temperature by which both models' cosines are divided; null: each model's own logit scale.
    temperature: float | None = None


@dataclass(kw_only=True, frozen=True)
class LayerTerm(_Term):
    """Layer-wise transfer: the attention of every layer learns the output of the teacher's layer
    for the teacher's input, and nothing else is trained (LoLCATs, arXiv 2410.10254). It stands
    alone; the teacher must have the student's layers, widths, image size and tokenizer."""

    kind: Literal["layers"] = "layers"
    needs_teacher: ClassVar[bool] = True


#: A term of the loss.
LossTerm = ContrastiveTerm | FeatureTerm | SimilarityTerm | LayerTerm


@dataclass(kw_only=True)
class TeacherConfig:
    """A frozen model that the terms of the loss compare with."""

    #: The teacher: the path of a run folder, a checkpoint or a hub folder, or open_clip's
    #: `NAME:TAG`; null: none. Images are resized and normalised as it needs them. It must read the
    #: student's token ids.
    model: str | None = None
    #: Precision of the teacher's weights and products.
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
