"""Classifiers on frozen image features: nearest neighbours and a linear probe.

Both take the features of ``encode_image``, normalised to length 1.
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

from ds_linclip.process.progress import progress
from linclip_eval.features import Features, best_ranks, similarities
from linclip_eval.zero_shot.evaluate import stable_topk

__all__ = ["Accuracy", "LinearProbe", "ProbeFit", "knn", "linear_probe"]

_TEMPERATURE = 0.07
_VALIDATION_SHARE = 0.2
#: L2 strengths from 1e-6 to 1e6, eight per decade; the search starts with every sixteenth.
_STEPS_PER_DECADE, _LAST_STEP, _FIRST_STRIDE = 8, 96, 16
_IMAGES_AT_ONCE = 4096
#: The largest number of images x classes whose votes are counted at once.
_MAX_VOTES = 2**22


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The ranks that a classifier gives to the true classes of the test images.

    Attributes:
        labels: [N] true classes.
        ranks: [N] rank of the true class among all classes, from 1. It is larger than the number of
            classes when the classifier does not know the class or the image cannot be read.
    """

    labels: NDArray[np.int64]
    ranks: NDArray[np.int64]

    @property
    def num_samples(self) -> int:
        """The number of test images, unreadable ones included."""
        return len(self.labels)

    def topk(self, k: int) -> float:
        """Return the share of images whose class is among the k most likely."""
        return float((self.ranks <= k).mean())

    @property
    def mean_per_class_recall(self) -> float:
        """Top-1 accuracy averaged over the classes that have test images, with equal weights."""
        samples = np.bincount(self.labels)
        hits = np.bincount(self.labels[self.ranks == 1], minlength=len(samples))
        seen = samples > 0
        return float((hits[seen] / samples[seen]).mean())


@dataclass(frozen=True, kw_only=True)
class ProbeFit:
    """One fit in the search for the L2 strength.

    Attributes:
        strength: The lambda of the penalty lambda / 2 |W|^2, added to the cross-entropy summed over
            the images: 1 / C in scikit-learn.
        validation_top1: Accuracy on the held-out part of the training images.
        num_iterations: The number of L-BFGS iterations.
        converged: Whether L-BFGS converged before its limit of iterations.
    """

    strength: float
    validation_top1: float
    num_iterations: int
    converged: bool


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """The linear probe, fitted with the best L2 strength.

    Attributes:
        accuracy: Its accuracy on the test images.
        strength, num_iterations, converged: Those of the final fit, see :class:`ProbeFit`.
        search: The fits among which the strength was chosen, by increasing strength.
    """

    accuracy: Accuracy
    strength: float
    num_iterations: int
    converged: bool
    search: tuple[ProbeFit, ...]

    @property
    def num_unconverged(self) -> int:
        """The number of fits, the final one included, that did not converge."""
        return sum(not fit.converged for fit in self.search) + (not self.converged)


def knn(
    train: Features,
    test: Features,
    *,
    num_neighbors: Sequence[int] = (10, 20, 100, 200),
    device: torch.device | str,
) -> dict[int, Accuracy]:
    """Classify test images by their nearest training images, as DINO (arXiv 2104.14294, 4.1).

    Every neighbour gives its class exp(cosine / 0.07) votes. A class without votes is never
    predicted. Of equal cosines the earlier image comes first, of equal votes the lower class.

    Args:
        train, test: Features from the same model.
        num_neighbors: The numbers of neighbours k, one classifier for each.
        device: The device that computes cosines.

    Raises:
        ValueError: when a k is not in [1, number of training images].
    """
    for k in num_neighbors:
        if not 1 <= k <= len(train.images):
            raise ValueError(
                f"num_neighbors ({k}) must be in [1, {len(train.images)}], the training images"
            )
    train_labels = torch.from_numpy(train.labels)
    num_classes = 1 + int(max(train.labels.max(), test.labels.max()))
    ranks = {k: np.empty(len(test.images), np.int64) for k in num_neighbors}
    for rows, cosines in similarities(test.images, train.images, device=device):
        neighbors = stable_topk(cosines, max(num_neighbors))
        # Counted on the CPU, where votes are added in the same order every time.
        votes = (cosines.gather(1, neighbors).cpu() / _TEMPERATURE).exp()
        classes = train_labels[neighbors.cpu()]
        size = max(1, _MAX_VOTES // num_classes)
        for start, k in product(range(0, len(votes), size), num_neighbors):
            part = slice(start, start + size)
            scores = votes.new_zeros(len(votes[part]), num_classes)
            scores.scatter_add_(1, classes[part, :k], votes[part, :k])
            scores.masked_fill_(scores == 0, -math.inf)
            ranks[k][rows][part] = _true_class_ranks(scores, test.labels[rows][part])
    return {k: _accuracy(test, found) for k, found in ranks.items()}


def linear_probe(
    train: Features, test: Features, *, seed: int = 0, max_iterations: int = 1000
) -> LinearProbe:
    """Fit a multinomial logistic regression, as CLIP's linear probe (arXiv 2103.00020, A.3).

    The fit is scikit-learn's L-BFGS in float64, on features that are not standardised. A random
    fifth of the training images is held out, and the L2 strength with the best accuracy on it is
    chosen, the larger of equals; the final fit uses all training images. The search is that of A.3:
    every second decade from 1e-6 to 1e6, then twice as fine around the best, down to eight steps
    per decade. Unlike A.3, the features are those after the projection into the space shared with
    texts.

    Args:
        train, test: Features from the same model.
        seed: The seed of the choice of held-out images.
        max_iterations: The limit of every fit; a fit that reaches it counts as not converged.

    Raises:
        ValueError: for training images of one class only.
    """
    if len(np.unique(train.labels)) < 2:
        raise ValueError(f"training images ({len(train.labels)}) must be of two classes or more")
    order = np.random.default_rng(seed).permutation(len(train.labels))
    num_validation = max(1, round(_VALIDATION_SHARE * len(order)))
    validation, rest = order[:num_validation], order[num_validation:]
    images, labels = train.images.astype(np.float64), train.labels
    bar = progress(desc="linear probe", unit="fit", delay=5, leave=False)

    def validate(strength: float) -> ProbeFit:
        model, converged = _fit(images[rest], labels[rest], strength, max_iterations)
        ranks = _predict(model, images[validation], labels[validation])
        bar.update()
        return ProbeFit(
            strength=strength,
            validation_top1=float((ranks == 1).mean()),
            num_iterations=int(model.n_iter_.max()),
            converged=converged,
        )

    with bar:
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
    """Return the fitted model and whether it converged."""
    model = LogisticRegression(C=1 / strength, max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(images, labels)
    others = [each for each in caught if not issubclass(each.category, ConvergenceWarning)]
    for each in others:
        warnings.warn(each.message, stacklevel=2)
    return model, len(others) == len(caught)


def _predict(
    model: LogisticRegression, images: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rank of the true class of every image."""
    num_classes = 1 + int(max(labels.max(), model.classes_.max()))
    ranks = []
    for start in range(0, len(labels), _IMAGES_AT_ONCE):
        rows = slice(start, start + _IMAGES_AT_ONCE)
        logits = torch.from_numpy(model.decision_function(images[rows]))
        if logits.ndim == 1:  # two classes: the lead of the second one
            logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
        scores = logits.new_full((len(logits), num_classes), -math.inf)
        scores[:, model.classes_] = logits
        ranks.append(_true_class_ranks(scores, labels[rows]))
    return np.concatenate(ranks)


def _true_class_ranks(scores: Tensor, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    relevant = torch.zeros_like(scores, dtype=torch.bool)
    relevant.scatter_(1, torch.from_numpy(labels)[:, None], True)
    ranks: NDArray[np.int64] = best_ranks(scores, relevant).numpy()
    return ranks


def _accuracy(test: Features, ranks: NDArray[np.int64]) -> Accuracy:
    """Return the accuracy over all test images; unreadable ones count as wrong."""
    never = np.iinfo(np.int64).max
    return Accuracy(
        labels=np.concatenate([test.labels, test.unreadable_labels]),
        ranks=np.concatenate([ranks, np.full(len(test.unreadable_labels), never)]),
    )
