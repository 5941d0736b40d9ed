"""Checks of an attention against its definition, made before anything is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linclip_eval.results import markdown_table
from linclip_kernels.linear_attention.reference import ATOL, relative_rms

__all__ = ["Check", "check_tensors", "correctness_table", "output_and_gradients"]


@dataclass(frozen=True)
class Check:
    """Relative RMS of one tensor against the float64 definition, and what the rule allows."""

    subject: str
    num_tokens: int
    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN does not pass

    def __str__(self) -> str:
        place = f"{self.subject}, N = {self.num_tokens}, {self.tensor}"
        return f"{place}: relative RMS {self.error:.2e}, allowed {self.allowed:.2e}"


def output_and_gradients(function: Callable[..., Tensor], packed: Tensor) -> list[Tensor]:
    """Return o, dq, dk, dv [B, N, H, D] of a function of q, k, v.

    ``packed`` is q, k, v and the output gradient, [B, N, H, 4, D].
    """
    *inputs, grad = packed.detach().unbind(3)
    leaves = [x.requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check_tensors(
    subject: str,
    num_tokens: int,
    found: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
) -> list[Check]:
    """Check o, dq, dk, dv: allowed is twice the error of a plain computation, and a rounding.

    Args:
        subject, num_tokens: Name of the computation and N, for messages.
        found, plain, exact: The results to check; the definition in their dtype, and in float64.
    """
    checks = []
    for name, value, rough, truth in zip(("o", "dq", "dk", "dv"), found, plain, exact, strict=True):
        allowed = 2 * relative_rms(rough, truth) + ATOL[value.dtype]
        checks.append(Check(subject, num_tokens, name, relative_rms(value, truth), allowed))
    return checks


def correctness_table(checks: Sequence[Check]) -> str:
    """Return a line for every subject, with its worst tensor."""
    lines = []
    for subject in dict.fromkeys(check.subject for check in checks):
        same = [check for check in checks if check.subject == subject]
        worst = max(same, key=lambda check: check.error / check.allowed)
        lengths = ", ".join(map(str, dict.fromkeys(check.num_tokens for check in same)))
        place = f"{worst.tensor}, N = {worst.num_tokens}"
        verdict = "pass" if all(check.passed for check in same) else "FAIL"
        lines.append(
            [subject, lengths, f"{worst.error:.1e}", f"{worst.allowed:.1e}", place, verdict]
        )
    header = ["", "N", "error", "allowed", "where", ""]
    return markdown_table(header, lines, align="llrrll")
