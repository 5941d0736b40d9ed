"""Classifiers on frozen image features: nearest neighbours and a linear probe.

Both see features of length 1 as ``encode_image`` gives them.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

from linclip_eval.features import Features, best_ranks, similarities
from linclip_eval.zero_shot.evaluate import likeliest

__all__ = ["Accuracy", "LinearProbe", "ProbeFit", "knn", "linear_probe"]

_TEMPERATURE = 0.07
_VALIDATION_SHARE = 0.2
#: The strengths are 1e-6 to 1e6 in eight steps per decade; the search starts with every sixteenth.
_STEPS_PER_DECADE, _LAST_STEP, _FIRST_STRIDE = 8, 96, 16
_IMAGES_AT_ONCE = 4096
#: Of nearest neighbours, images x classes at a time.
_MAX_VOTES = 2**22


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Where a classifier puts the true classes of the test images.

    Attributes:
        labels: [N] true classes.
        ranks: [N] place of the true class among all classes, from 1; one more than there are where
            the classifier cannot give it, or the image cannot be read.
    """

    labels: NDArray[np.int64]
    ranks: NDArray[np.int64]

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def topk(self, k: int) -> float:
        """Share of the images whose class is among the k likeliest."""
        return float((self.ranks <= k).mean())

    @property
    def mean_per_class_recall(self) -> float:
        """Mean top-1 accuracy of the classes that have test images, each with the same weight."""
        samples = np.bincount(self.labels)
        hits = np.bincount(self.labels[self.ranks == 1], minlength=len(samples))
        seen = samples > 0
        return float((hits[seen] / samples[seen]).mean())


@dataclass(frozen=True, kw_only=True)
class ProbeFit:
    """One fit of the search for a strength.

    Attributes:
        strength: lambda of the penalty lambda / 2 |W|^2 beside the cross-entropy, summed over the
            images: 1 / C of scikit-learn.
        validation_top1: Accuracy on the training images that were held back.
        num_iterations: Of L-BFGS.
        converged: Whether it ended by itself.
    """

    strength: float
    validation_top1: float
    num_iterations: int
    converged: bool


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """The linear probe, fitted with the best strength.

    Attributes:
        accuracy: On the test images.
        strength: As of :class:`ProbeFit`.
        num_iterations: Of the last fit, on all training images.
        converged: Whether that ended by itself.
        search: The fits that the strength was chosen by, weakest first.
    """

    accuracy: Accuracy
    strength: float
    num_iterations: int
    converged: bool
    search: tuple[ProbeFit, ...]

    @property
    def num_unconverged(self) -> int:
        """How many of the fits, the last one included, were cut off."""
        return sum(not fit.converged for fit in self.search) + (not self.converged)


def knn(
    train: Features,
    test: Features,
    *,
    num_neighbors: Sequence[int] = (10, 20, 100, 200),
    device: torch.device | str,
) -> dict[int, Accuracy]:
    """Classify test images by their nearest training images, as DINO (arXiv 2104.14294, 4.1).

    Every neighbour gives its class exp(cosine / 0.07) votes. A class without votes is never right.
    Of equal cosines the earlier image goes first, of equal votes the lower class.

    Args:
        train, test: Features by the same model.
        num_neighbors: A classifier for each.
        device: Where cosines are computed.

    Returns:
        Number of neighbours -> accuracy.

    Raises:
        ValueError: for more neighbours than training images, or features that are not finite.
    """
    for k in num_neighbors:
        if not 1 <= k <= len(train.images):
            raise ValueError(
                f"num_neighbors ({k}) must be in [1, {len(train.images)}], the training images"
            )
    _check_finite(train, test)
    train_labels = torch.from_numpy(train.labels)
    num_classes = 1 + int(max(train.labels.max(), test.labels.max()))
    ranks = {k: np.empty(len(test.images), np.int64) for k in num_neighbors}
    for rows, cosines in similarities(test.images, train.images, device=device):
        neighbors = likeliest(cosines, max(num_neighbors))
        # Counted on the CPU, where votes are added in the same order every time.
        votes = (cosines.gather(1, neighbors).cpu() / _TEMPERATURE).exp()
        classes = train_labels[neighbors.cpu()]
        size = max(1, _MAX_VOTES // num_classes)
        for start, k in product(range(0, len(votes), size), num_neighbors):
            part = slice(start, start + size)
            scores = votes.new_zeros(len(votes[part]), num_classes)
            scores.scatter_add_(1, classes[part, :k], votes[part, :k])
            scores.masked_fill_(scores == 0, -math.inf)
            ranks[k][rows][part] = _ranks_of(scores, test.labels[rows][part])
    return {k: _accuracy(test, found) for k, found in ranks.items()}


def linear_probe(
    train: Features, test: Features, *, seed: int = 0, max_iterations: int = 1000
) -> LinearProbe:
    """Multinomial logistic regression, as CLIP's linear probe (arXiv 2103.00020, A.3).

    scikit-learn's L-BFGS, in float64, on features that are not standardised. A random fifth of the
    training images is held back, and the L2 strength with the best accuracy on it is chosen, the
    larger of equals; the last fit is on all training images. The search is that of A.3: every
    second decade from 1e-6 to 1e6, then twice as fine around the best, down to eight steps per
    decade. Unlike A.3, the features are those behind the projection into the space shared with
    texts.
    Args:
        train, test: Features by the same model.
        seed: Chooses the images that are held back.
        max_iterations: Limit of every fit; a fit that reaches it counts as not converged.

    Raises:
        ValueError: for training images of one class only, or features that are not finite.
    """
    _check_finite(train, test)
    if len(np.unique(train.labels)) < 2:
        raise ValueError(f"training images ({len(train.labels)}) must be of two classes or more")
    order = np.random.default_rng(seed).permutation(len(train.labels))
    num_held_back = max(1, round(_VALIDATION_SHARE * len(order)))
    held_back, rest = order[:num_held_back], order[num_held_back:]
    images, labels = train.images.astype(np.float64), train.labels
    progress = tqdm(desc="linear probe", unit="fit", delay=5, leave=False)

    def validate(strength: float) -> ProbeFit:
        model, converged = _fit(images[rest], labels[rest], strength, max_iterations)
        ranks = _predict(model, images[held_back], labels[held_back])
        progress.update()
        return ProbeFit(
            strength=strength,
            validation_top1=float((ranks == 1).mean()),
            num_iterations=int(model.n_iter_.max()),
            converged=converged,
        )

    with progress:
        search = _search(validate)
        strength = _best(search).strength
        model, converged = _fit(images, labels, strength, max_iterations)
    ranks = _predict(model, test.images.astype(np.float64), test.labels)
    return LinearProbe(
        accuracy=_accuracy(test, ranks),
        strength=strength,
        num_iterations=int(model.n_iter_.max()),
        converged=converged,
        search=search,
    )


def _search(validate: Callable[[float], ProbeFit]) -> tuple[ProbeFit, ...]:
    fits: dict[float, ProbeFit] = {}
    strengths = [10.0 ** (step / _STEPS_PER_DECADE - 6) for step in range(_LAST_STEP + 1)]
    stride, steps = _FIRST_STRIDE, list(range(0, _LAST_STEP + 1, _FIRST_STRIDE))
    while stride:
        for step in steps:
            if 0 <= step <= _LAST_STEP:
                fits[strengths[step]] = validate(strengths[step])
        best = strengths.index(_best(list(fits.values())).strength)
        stride //= 2
        steps = [best - stride, best + stride]
    return tuple(fits[strength] for strength in sorted(fits))


def _best(fits: Sequence[ProbeFit]) -> ProbeFit:
    return max(fits, key=lambda fit: (fit.validation_top1, fit.strength))


def _fit(
    images: NDArray[np.float64], labels: NDArray[np.int64], strength: float, max_iterations: int
) -> tuple[LogisticRegression, bool]:
    """The model, and whether its fit ended by itself."""
    model = LogisticRegression(C=1 / strength, max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(images, labels)
    cut_off = [each for each in caught if issubclass(each.category, ConvergenceWarning)]
    for each in caught:
        if each not in cut_off:
            warnings.warn(each.message, stacklevel=2)
    return model, not cut_off


def _predict(
    model: LogisticRegression, images: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Ranks of the true classes."""
    num_classes = 1 + int(max(labels.max(), model.classes_.max()))
    ranks = []
    for start in range(0, len(labels), _IMAGES_AT_ONCE):
        rows = slice(start, start + _IMAGES_AT_ONCE)
        logits = torch.from_numpy(model.decision_function(images[rows]))
        if logits.ndim == 1:  # of two classes: by how much the second is ahead
            logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
        scores = logits.new_full((len(logits), num_classes), -math.inf)
        scores[:, model.classes_] = logits
        ranks.append(_ranks_of(scores, labels[rows]))
    return np.concatenate(ranks)


def _ranks_of(scores: Tensor, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    right = torch.zeros_like(scores, dtype=torch.bool)
    right.scatter_(1, torch.from_numpy(labels)[:, None], True)
    ranks: NDArray[np.int64] = best_ranks(scores, right).numpy()
    return ranks


def _accuracy(test: Features, ranks: NDArray[np.int64]) -> Accuracy:
    """With the images that cannot be read, which count as wrong."""
    never = np.iinfo(np.int64).max
    return Accuracy(
        labels=np.concatenate([test.labels, test.unreadable_labels]),
        ranks=np.concatenate([ranks, np.full(len(test.unreadable_labels), never)]),
    )


def _check_finite(train: Features, test: Features) -> None:
    for name, features in (("training", train), ("test", test)):
        if features.num_nonfinite:
            raise ValueError(
                f"features of {name} images must be finite; {features.num_nonfinite} of "
                f"{len(features.images)} are not"
            )
