"""Linear regression in a prompt: linear attention as one step of gradient descent, and its risk.

A prompt holds n examples (x_j, y_j), y_j = x_j^T beta_j + noise, and a query x whose y is wanted.
Keys x_j, values w_j y_j and the query W^T x give f = x^T W sum_j w_j x_j y_j: the prediction after
one step from zero on sum_j w_j (y_j - x_j^T beta)^2 / 2 with preconditioner W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linclip_kernels import linear_attention_from_state, linear_attention_state

__all__ = [
    "Prompts",
    "Regression",
    "Risk",
    "Step",
    "best_example_weights",
    "best_preconditioner",
    "measure_risks",
    "predict_by_attention",
    "risk_of_step",
]

#: Prompts held at a time.
CHUNK = 10_000


@dataclass(frozen=True)
class Prompts:
    """Prompts of a regression: keys, their values, and the queries with the wanted values."""

    x: Tensor  # [B, n, d]
    y: Tensor  # [B, n]
    query: Tensor  # [B, d]
    target: Tensor  # [B]


@dataclass(frozen=True)
class Regression:
    """A distribution of prompts.

    The tasks of successive positions are a stationary autoregression with correlation
    ``persistence``; the query comes last. At 1 there is one task per prompt.

    Args:
        covariance: [d, d], of x.
        task_covariance: [d, d], of beta.
        noise: Variance of the noise.
        num_examples: n.
        persistence: Correlation of the tasks of neighbours, from 0 to 1.
        heavy_tails: Draw x from the multivariate Laplace distribution instead of the normal one.
    """

    covariance: Tensor
    task_covariance: Tensor
    noise: float
    num_examples: int
    persistence: float = 1.0
    heavy_tails: bool = False

    @property
    def task_correlation(self) -> Tensor:
        """Correlations [n + 1, n + 1] of the tasks of all positions, the query's last."""
        position = torch.arange(self.num_examples + 1, dtype=torch.float64)
        return self.persistence ** (position - position[:, None]).abs()

    @property
    def target_variance(self) -> float:
        """Variance of y, and the risk of the constant prediction 0."""
        return torch.trace(self.covariance @ self.task_covariance).item() + self.noise

    def sample(self, num_prompts: int, generator: torch.Generator) -> Prompts:
        """Draw prompts, in float64."""
        positions, dim = self.num_examples + 1, len(self.covariance)

        def normal(*shape: int) -> Tensor:
            return torch.randn(num_prompts, *shape, dtype=torch.float64, generator=generator)

        x = normal(positions, dim) @ torch.linalg.cholesky(self.covariance).T
        if self.heavy_tails:
            uniform = torch.rand(num_prompts, positions, 1, dtype=x.dtype, generator=generator)
            x = x * (-torch.log1p(-uniform)).sqrt()
        if self.persistence == 1:
            tasks = normal(1, dim)  # [B, 1, d]
        else:
            tasks = torch.linalg.cholesky(self.task_correlation) @ normal(positions, dim)
        tasks = tasks @ torch.linalg.cholesky(self.task_covariance).T
        y = (x * tasks).sum(-1) + self.noise**0.5 * normal(positions)
        return Prompts(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])


@dataclass(frozen=True)
class Step:
    """One step of gradient descent: ``factor`` times a preconditioner [d, d], and weights [n]."""

    name: str
    preconditioner: Tensor
    weights: Tensor
    factor: float = 1.0


@dataclass(frozen=True)
class Risk:
    """Mean squared error of a predictor, from the closed form where there is one, and sampled."""

    setting: str
    num_examples: int
    persistence: float
    predictor: str
    factor: float
    predicted: float | None
    sampled: float
    sampling_error: float


def risk_of_step(regression: Regression, preconditioner: Tensor, weights: Tensor) -> float:
    """Compute E (y - f)^2 of the step f = x^T W sum_j w_j x_j y_j.

    Args:
        regression: The distribution of prompts.
        preconditioner: W [d, d].
        weights: w [n].

    Source: our derivation, docs/theory.md; arXiv 2407.10005 for equal weights and one task.
    """
    covariance = regression.covariance
    signal = covariance @ regression.task_covariance @ covariance
    step = _alignment(regression, weights) * torch.trace(preconditioner @ signal)
    moment = _moment_over_covariance(regression, weights) @ covariance
    size = torch.trace(preconditioner.T @ covariance @ preconditioner @ moment)
    return regression.target_variance - 2 * step.item() + size.item()


def best_preconditioner(regression: Regression, weights: Tensor) -> Tensor:
    """Compute the W [d, d] of the smallest risk for the weights w [n].

    Source: our derivation, docs/theory.md; arXiv 2407.10005 for equal weights and one task.
    """
    moment = _moment_over_covariance(regression, weights)
    scaled = _alignment(regression, weights) * regression.task_covariance
    return torch.linalg.solve(moment, scaled, left=False)


def best_example_weights(regression: Regression) -> Tensor:
    """Compute the weights w [n] of the smallest risk, largest 1: a filter over the distance.

    Raises:
        ValueError: The product of the covariances is no multiple of the identity; the best weights
            then depend on the preconditioner.
    """
    product = regression.covariance @ regression.task_covariance
    scale = product[0, 0]
    identity = torch.eye(len(product), dtype=product.dtype)
    if not torch.allclose(product, scale * identity):
        raise ValueError(
            "covariance @ task_covariance must be a multiple of the identity: "
            "take isotropic covariances"
        )
    correlation = regression.task_correlation
    examples, to_query = correlation[:-1, :-1], correlation[:-1, -1]
    own = _own_terms(regression) + _spread(regression) / scale
    ridge = own * torch.eye(regression.num_examples, dtype=torch.float64)
    weights = torch.linalg.solve(examples + ridge, to_query)
    return weights / weights.max()


def predict_by_attention(prompts: Prompts, preconditioner: Tensor, weights: Tensor) -> Tensor:
    """Compute f [B] with the linear-attention operator: a state of the examples, one query."""
    keys = prompts.x[:, :, None]  # [B, n, 1, d]
    values = (weights * prompts.y)[:, :, None, None]  # [B, n, 1, 1]
    query = (prompts.query @ preconditioner)[:, None, None]  # [B, 1, 1, d]
    state = linear_attention_state(keys, values, qk_norm=False, feature_map="identity")
    out = linear_attention_from_state(
        query, state, qk_norm=False, feature_map="identity", score_scale=1
    )
    return out.flatten()


def measure_risks(
    setting: str,
    regression: Regression,
    steps: Sequence[Step],
    num_prompts: int,
    generator: torch.Generator,
) -> list[Risk]:
    """Measure steps and their rivals on the same prompts.

    The rivals: "ridge", the posterior mean, which no other prediction beats when a prompt has one
    task and x is normal; "Eq. 4" and "Eq. 7", the best multiples of what the product computes.

    Args:
        setting: Name of the distribution of prompts.
        regression: The distribution.
        steps: The steps, by the attention operator.
        num_prompts: Number of prompts.
        generator: The source of the prompts.
    """
    predictors = [(step.name, step.factor) for step in steps]
    predictors += [(rival, 1.0) for rival in ("ridge", "Eq. 4", "Eq. 7")]
    errors: list[list[Tensor]] = [[] for _ in predictors]
    for first in range(0, num_prompts, CHUNK):
        prompts = regression.sample(min(CHUNK, num_prompts - first), generator)
        outputs = [
            predict_by_attention(prompts, step.factor * step.preconditioner, step.weights)
            for step in steps
        ]
        outputs.append(_predict_by_ridge(prompts, regression))
        outputs += [_predict_by_product(prompts, normalized=each) for each in (True, False)]
        for found, out in zip(errors, outputs, strict=True):
            found.append((prompts.target - out).square())
    predicted: list[float | None] = [None] * len(predictors)
    for i, step in enumerate(steps):
        predicted[i] = risk_of_step(regression, step.factor * step.preconditioner, step.weights)
    return [
        Risk(
            setting=setting,
            num_examples=regression.num_examples,
            persistence=regression.persistence,
            predictor=name,
            factor=factor,
            predicted=closed_form,
            sampled=torch.cat(found).mean().item(),
            sampling_error=torch.cat(found).std().item() / num_prompts**0.5,
        )
        for (name, factor), found, closed_form in zip(predictors, errors, predicted, strict=True)
    ]


def _predict_by_product(prompts: Prompts, *, normalized: bool) -> Tensor:
    """Return the best multiple [B] of Eq. 4 or Eq. 7: score 1 + q.k, q and k of unit length."""
    state = linear_attention_state(prompts.x[:, :, None], prompts.y[:, :, None, None])
    query = prompts.query[:, None, None]
    out = linear_attention_from_state(query, state, normalized=normalized).flatten()
    return out * (out @ prompts.target) / (out @ out)


def _predict_by_ridge(prompts: Prompts, regression: Regression) -> Tensor:
    """Return the posterior mean of y [B] given one task per prompt."""
    prior = torch.linalg.inv(regression.task_covariance)
    gram = prompts.x.mT @ prompts.x + regression.noise * prior
    beta = torch.linalg.solve(gram, (prompts.x.mT @ prompts.y[..., None])[..., 0])
    return (prompts.query * beta).sum(-1)


def _alignment(regression: Regression, weights: Tensor) -> Tensor:
    """Return w.r, with r the correlations of the examples' tasks to the query's."""
    return weights @ regression.task_correlation[:-1, -1]


def _moment_over_covariance(regression: Regression, weights: Tensor) -> Tensor:
    """Return E[g g^T] S^-1 with g = sum_j w_j x_j y_j and S the covariance of x."""
    examples = regression.task_correlation[:-1, :-1]
    size = weights @ weights
    factor = weights @ examples @ weights + _own_terms(regression) * size
    product = regression.covariance @ regression.task_covariance
    identity = torch.eye(len(product), dtype=product.dtype)
    return factor * product + size * _spread(regression) * identity


def _own_terms(regression: Regression) -> float:
    """Return the factor of S T S that an example adds to E g g^T beyond that of two examples."""
    return 2 * _tail(regression) - 1


def _spread(regression: Regression) -> float:
    """Return the factor of S that an example adds to E g g^T."""
    noise = regression.noise
    return _tail(regression) * (regression.target_variance - noise) + noise


def _tail(regression: Regression) -> float:
    """Return E |x|^4 over that of the normal distribution with the same covariance."""
    return 2.0 if regression.heavy_tails else 1.0
