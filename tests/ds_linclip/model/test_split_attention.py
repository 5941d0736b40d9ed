"""Every kind of attention with its heads, or an image's tokens, split over two ranks."""

from pathlib import Path
from typing import Any

import pytest

from ds_linclip.parallel.context_parallel import token_slice
from ds_linclip.parallel.mesh import Mesh
from helpers.attention_definitions import CASES
from helpers.split_layers import Result, run_layer, run_split
from linclip_kernels.linear_attention.reference import relative_rms

HEADS_SPLIT = [
    (name, causal)
    for name, case in CASES.items()
    for causal in (False, True)
    if (case.is_causal if causal else case.is_bidirectional)
]
TOKENS_SPLIT = [
    (name, False)
    for name, case in CASES.items()
    if case.is_bidirectional and case.settings.splits_tokens
    if not any(case.settings.problems_when_split())
]


@pytest.fixture(scope="module")
def tensor_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Result]]:
    return run_split("tp", HEADS_SPLIT, Path(tmp_path_factory.mktemp("tp")))


@pytest.fixture(scope="module")
def context_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Result]]:
    return run_split("cp", TOKENS_SPLIT, Path(tmp_path_factory.mktemp("cp")))


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "causal"), HEADS_SPLIT)
def test_split_heads_give_the_whole_layer(tensor_ranks, name, causal):
    whole = run_layer(Mesh.create(), name, causal=causal)
    for rank, results in enumerate(tensor_ranks):
        found = results[name, causal]
        assert relative_rms(found.output, whole.output) <= 1e-12
        assert relative_rms(found.grad_input, whole.grad_input) <= 1e-12
        assert found.gradients.keys() == whole.gradients.keys()
        for parameter, expected in whole.gradients.items():
            if parameter in found.split:
                expected = expected.chunk(2, found.split[parameter])[rank]
            assert_near(found.gradients[parameter], expected, parameter)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "causal"), TOKENS_SPLIT)
def test_split_tokens_give_the_whole_layer(context_ranks, name, causal):
    whole = run_layer(Mesh.create(), name, causal=causal)
    both = [results[name, causal] for results in context_ranks]
    for rank, found in enumerate(both):
        held = token_slice(10, rank, 2)
        assert relative_rms(found.output, whole.output[:, held]) <= 1e-12
        assert relative_rms(found.grad_input, whole.grad_input[:, held]) <= 1e-12
    for parameter, expected in whole.gradients.items():
        total = sum(found.gradients[parameter] for found in both)
        assert_near(total, expected, parameter)


def assert_near(found: Any, expected: Any, what: str) -> None:
    error = (found - expected).square().mean().sqrt()
    assert error <= 1e-11 * max(1, expected.square().mean().sqrt()), what
