"""Context parallelism: adjoint forward and backward, and a tower whose tokens are split."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ds_linclip.parallel.context_parallel import first_token, sum_over_ranks, token_slice
from linclip_kernels import linear_attention, linear_attention_from_state, linear_attention_state

WORLD_SIZE = 4
CONTEXT_SIZES = (1, 2, 4)
WIDTH, HEADS, BATCH = 12, 2, 4
#: Name -> tokens of an image with its class token, and the form of attention.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "eq7": (11, {}),
    "eq7-alpha": (11, {"length_exponent": 0.5}),
    "eq4": (11, {"normalized": True}),
    "eq4-quadratic": (8, {"normalized": True, "feature_map": "quadratic"}),
    "eq4, fewer tokens than ranks": (3, {"normalized": True}),
    "eq4, one token": (1, {"normalized": True}),
    "eq7-alpha, fewer tokens than ranks": (2, {"length_exponent": 0.5}),
}


class Tower(nn.Module):
    """Two attention layers between projections, on this rank's tokens; on all without a group."""

    def __init__(
        self, num_tokens: int, form: dict[str, Any], group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.form, self.group, self.num_tokens = form, group, num_tokens
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(num_tokens, WIDTH))
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)]) for _ in range(2)
        )

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [B, N - 1, W] -> features [B, W] and this rank's tokens [B, n, W]."""
        x = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], dim=1)
        x = x + self.positions
        if self.group is not None:
            x = x[:, token_slice(self.num_tokens, self.group.rank(), self.group.size())]
        for qkv, out in self.layers:
            q, k, v = qkv(x).unflatten(-1, (HEADS, 3, WIDTH // HEADS)).unbind(3)  # [B, n, H, D]
            x = x + out(self.attend(q, k, v).flatten(2)).tanh()
        mean = sum_over_ranks(x.sum(1), self.group) / self.num_tokens
        return first_token(x, self.group) * mean, x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.group is None:
            return linear_attention(q, k, v, **self.form)
        feature_map = self.form.get("feature_map", "affine")
        state = linear_attention_state(k, v, feature_map=feature_map)
        return linear_attention_from_state(q, sum_over_ranks(state, self.group), **self.form)


def run_tower(
    case: str, samples: slice, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return features, tokens and gradients of a tower from a fixed seed."""
    num_tokens, form = CASES[case]
    torch.manual_seed(0)
    tower = Tower(num_tokens, form, group).double()
    patches = torch.randn(BATCH, num_tokens - 1, WIDTH, dtype=torch.float64)[samples]
    features, tokens = tower(patches)
    features.exp().mean(1).log().mean().backward()
    gradients = [parameter.grad for parameter in tower.parameters()]
    return features.detach(), tokens.detach(), [grad for grad in gradients if grad is not None]


def four_ranks(rank: int, folder: Path) -> None:
    """Run one of four processes; context groups consist of neighbouring ranks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE
    )
    results: dict[Any, Any] = {}
    for size in CONTEXT_SIZES:
        group, _ = dist.new_subgroups(size)
        assert group is not None
        results["adjoint", size] = [
            inner_products(lambda x, group=group: sum_over_ranks(x, group), group),
            inner_products(lambda x, group=group: first_token(x, group), group),
        ]
        per_group = BATCH * size // WORLD_SIZE
        first = rank // size * per_group
        for case in CASES:
            features, tokens, gradients = run_tower(case, slice(first, first + per_group), group)
            for grad in gradients:  # as the engine does, over data and context ranks
                dist.all_reduce(grad)
                grad /= WORLD_SIZE
            results[case, size] = features, tokens, gradients
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def inner_products(function: Any, group: dist.ProcessGroup) -> tuple[float, float]:
    """Return <f(x), g> and <x, f'(g)>, summed over ranks that hold 3 - rank tokens each."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    y = function(x)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (d_x,) = torch.autograd.grad(y, x, g)
    products = torch.stack([(y.detach() * g).sum(), (x.detach() * d_x).sum()])
    dist.all_reduce(products, group=group)
    return products[0].item(), products[1].item()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("four_ranks")
    mp.set_forkserver_preload([token_slice.__module__, linear_attention.__module__])
    mp.start_processes(four_ranks, args=(folder,), nprocs=WORLD_SIZE, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.distributed
@pytest.mark.parametrize("size", CONTEXT_SIZES)
def test_backward_is_the_adjoint_over_ranks(ranks: list[dict[Any, Any]], size: int) -> None:
    for result in ranks:
        for forward, backward in result["adjoint", size]:
            assert forward == pytest.approx(backward, rel=1e-12)


@pytest.mark.distributed
@pytest.mark.parametrize("size", CONTEXT_SIZES)
@pytest.mark.parametrize("case", CASES)
def test_split_tower_equals_the_whole_one(
    ranks: list[dict[Any, Any]], case: str, size: int
) -> None:
    whole_features, whole_tokens, whole_gradients = run_tower(case, slice(None), None)
    per_group = BATCH * size // WORLD_SIZE
    for rank, result in enumerate(ranks):
        features, tokens, gradients = result[case, size]
        samples = slice(rank // size * per_group, (rank // size + 1) * per_group)
        place = token_slice(CASES[case][0], rank % size, size)
        assert_equal(features, whole_features[samples])
        assert_equal(tokens, whole_tokens[samples, place])
        assert len(gradients) == len(whole_gradients)
        for grad, expected in zip(gradients, whole_gradients, strict=True):
            assert_equal(grad, expected)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_single_rank_needs_no_communication() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert sum_over_ranks(x, None) is x
    assert torch.equal(first_token(x, None), x[:, 0])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 11, 12, 196])
def test_every_token_has_one_rank(num_tokens: int, size: int) -> None:
    slices = [token_slice(num_tokens, rank, size) for rank in range(size)]
    tokens = list(range(num_tokens))
    assert [token for part in slices for token in tokens[part]] == tokens
    counts = [part.stop - part.start for part in slices]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_group_is_named(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=rf"rank \({rank}\) must be in 0\.\.size - 1"):
        token_slice(5, rank, size)
