"""The losses against their definitions, open_clip's, and the whole batch in one process."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ds_linclip.loss.contrastive import clip_loss, siglip_loss
from ds_linclip.parallel.spawn import run_ranks

Loss = Callable[..., Tensor]
NAMES = ("clip", "siglip")
LOSSES: dict[str, Loss] = {"clip": clip_loss, "siglip": siglip_loss}
SCALARS = {"clip": (12.0,), "siglip": (12.0, -3.0)}
#: Pairs of a rank, and size of a feature.
LOCAL, DIM = 5, 8


def plain_clip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """-(log softmax over texts + log softmax over images) / 2 of the pairs, averaged."""
    logits = scale * images @ texts.T
    both = logits.log_softmax(0) + logits.log_softmax(1)
    return -both.diagonal().mean() / 2


def plain_siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """log(1 + exp(-z logits)), z = 1 for the pairs and -1 else: sum over all, mean over images."""
    logits = scale * images @ texts.T + bias
    signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return torch.logaddexp(-signs * logits, torch.zeros_like(logits)).sum() / len(images)


PLAIN: dict[str, Loss] = {"clip": plain_clip, "siglip": plain_siglip}


def batch(
    name: str, num_pairs: int, dim: int = DIM, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Normalised features and the scalars of a loss, all of which need a gradient."""
    rows = torch.randn(2, num_pairs, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)
    scalars = (torch.tensor(value, dtype=dtype) for value in SCALARS[name])
    return [x.requires_grad_() for x in (*F.normalize(rows, dim=-1), *scalars)]


def results(loss: Loss, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Value and gradients."""
    value = loss(*inputs, **options)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest element of its tensor."""
    pairs = zip(actual, expected, strict=True)
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-3) for a, b in pairs]
    return torch.stack(errors).max().item()  # where one is NaN, NaN


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("num_pairs", "chunk_size"),
    [(1, 1), (1, 1024), (7, 1), (12, 4), (37, 10), (37, 36), (37, 37), (37, 1024)],
)
def test_value_and_gradients_are_those_of_the_definition(
    name: str, num_pairs: int, chunk_size: int
) -> None:
    inputs = batch(name, num_pairs)
    actual = results(LOSSES[name], inputs, chunk_size=chunk_size)
    assert [x.shape for x in actual[1:]] == [x.shape for x in inputs]
    assert worst(actual, results(PLAIN[name], inputs)) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_those_of_open_clip(name: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss  # slow, and not for the ranks

    inputs = batch(name, 37)
    theirs = ClipLoss() if name == "clip" else SigLipLoss()
    expected = results(theirs, inputs)
    assert worst(results(LOSSES[name], inputs, chunk_size=16), expected) <= 1e-12
    single = [x.detach().float().requires_grad_() for x in inputs]
    actual = results(LOSSES[name], single, chunk_size=16)
    assert {x.dtype for x in actual} == {torch.float32}
    assert worst([x.double() for x in actual], expected) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    loss = LOSSES[name]
    assert torch.autograd.gradcheck(lambda *x: loss(*x, chunk_size=3), batch(name, 7, 4))


@pytest.mark.parametrize("name", NAMES)
def test_features_need_not_be_contiguous_nor_all_need_a_gradient(name: str) -> None:
    inputs = batch(name, 9)
    expected = results(PLAIN[name], inputs)
    images = inputs[0].detach().T.contiguous().T
    scalars = [x.detach().reshape(1).requires_grad_() for x in inputs[2:]]
    value = LOSSES[name](images, inputs[1], *scalars, chunk_size=4)
    texts_gradient, *gradients = torch.autograd.grad(value, [inputs[1], *scalars])
    assert {x.shape for x in gradients} == {(1,)}
    actual = [value, texts_gradient, *(x.squeeze(0) for x in gradients)]
    assert worst(actual, [expected[0], *expected[2:]]) <= 1e-12
    assert not LOSSES[name](images, *[x.detach() for x in inputs[1:]]).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_gradient_follows_what_the_loss_is_multiplied_by(name: str) -> None:
    inputs = batch(name, 9)
    _, *expected = results(LOSSES[name], inputs)
    loss = LOSSES[name](*inputs)
    for factor in (3.0, -0.5):  # the second time through the same graph
        actual = torch.autograd.grad(factor * loss, inputs, retain_graph=True)
        assert worst(list(actual), [factor * x for x in expected]) <= 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_without_gradient_the_value_is_the_same(name: str) -> None:
    inputs = batch(name, 37)
    with torch.no_grad():
        value = LOSSES[name](*inputs, chunk_size=10)
    assert not value.requires_grad
    assert torch.equal(value, LOSSES[name](*inputs, chunk_size=10))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_is_an_error(name: str) -> None:
    inputs = batch(name, 3)
    # What comes before the loss would pass a wrong second derivative on if this were let through.
    loss = LOSSES[name](inputs[0] ** 3, *inputs[1:])
    with pytest.raises(RuntimeError, match="can be differentiated once: create_graph"):
        torch.autograd.grad(loss, inputs, create_graph=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["identical", "opposite", "matching", "zero"])
def test_extreme_logits_stay_finite(name: str, kind: str) -> None:
    same = F.normalize(torch.ones(20, DIM), dim=-1)
    images, texts = {
        "identical": (same, same),
        "opposite": (same, -same),
        "matching": (torch.eye(20), torch.eye(20)),
        "zero": (0 * same, 0 * same),
    }[kind]
    scalars = [torch.tensor(100.0), torch.tensor(-10.0)][: len(SCALARS[name])]
    inputs = [x.clone().requires_grad_() for x in (images, texts, *scalars)]
    actual = results(LOSSES[name], inputs, chunk_size=8)
    assert all(x.isfinite().all() for x in actual)
    double = [x.detach().double().requires_grad_() for x in inputs]
    # Gradients that cancel are as precise as the terms, which are about as large as the scale.
    for found, expected in zip(actual, results(PLAIN[name], double), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7 * 100)


def test_loss_of_well_classified_pairs_is_not_lost_in_rounding() -> None:
    """exp(-30) beside logits of 30, where the sum of all exponentials would round to the pair's."""
    inputs = [torch.eye(5).requires_grad_() for _ in range(2)] + [
        torch.tensor(30.0, requires_grad=True)
    ]
    value, images, *_ = results(clip_loss, inputs, chunk_size=2)
    assert value.item() == pytest.approx(4 * math.exp(-30), rel=1e-5)
    assert images[0, 0].item() == pytest.approx(30 / 5 * -4 * math.exp(-30), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_is_not_hidden(name: str) -> None:
    inputs = batch(name, 9)
    with torch.no_grad():
        inputs[1][7, 3] = math.nan
    value, images, *_ = results(LOSSES[name], inputs, chunk_size=4)
    assert value.isnan()
    assert images.isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    inputs = batch(name, 9, dtype=torch.float32)
    expected = results(LOSSES[name], inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(LOSSES[name], inputs)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_features_are_summed_in_float32(name: str) -> None:
    inputs = batch(name, 600, 64, torch.float32)
    halved = [x.detach().bfloat16().requires_grad_() for x in inputs[:2]] + inputs[2:]
    value, images, texts, *scalars = results(LOSSES[name], halved, chunk_size=256)
    assert [x.dtype for x in (value, *scalars)] == [torch.float32] * (1 + len(scalars))
    assert images.dtype == texts.dtype == torch.bfloat16
    rounded = [x.detach().double().requires_grad_() for x in halved]
    expected = results(PLAIN[name], rounded)
    actual = [x.double() for x in (value, images, texts, *scalars)]
    assert worst(actual, expected) <= 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.ones(4)}, r"image_features \(shape \(4,\)\) must be \[B, E\]"),
        ({"images": torch.ones(0, 3)}, r"image_features \(shape \(0, 3\)\) .* at least one pair"),
        ({"images": torch.ones(4, 3).half()}, r"image_features \(torch\.float16\) must be float32"),
        ({"images": torch.ones(4, 3).long()}, r"image_features \(torch\.int64\) must be float32"),
        (
            {"texts": torch.ones(5, 3)},
            r"text_features \(shape .*\[5, 3\].*\) must match .*\[4, 3\]",
        ),
        ({"texts": torch.ones(4)}, r"text_features \(shape .*\[4\].*\) must match image_features"),
        (
            {"texts": torch.ones(4, 3).double()},
            r"text_features \(dtype torch\.float64\) must match",
        ),
        ({"texts": torch.ones(4, 3, device="meta")}, r"text_features \(device meta\) must match"),
        ({"scale": torch.ones(2)}, r"logit_scale \(shape \(2,\)\) must be one number"),
        ({"chunk_size": 0}, r"chunk_size \(0\) must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    features: dict[str, Any] = {"images": torch.ones(4, 3), "texts": torch.ones(4, 3)}
    fitting = features | {"scale": torch.tensor(1.0), "chunk_size": 2}
    images, texts, scale, chunk_size = (fitting | change).values()
    with pytest.raises(ValueError, match=message):
        clip_loss(images, texts, scale, chunk_size=chunk_size)
    with pytest.raises(ValueError, match=message):
        siglip_loss(images, texts, scale, torch.tensor(0.0), chunk_size=chunk_size)


def test_bias_must_be_one_number() -> None:
    features = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"logit_bias \(shape \(4, 3\)\) must be one number"):
        siglip_loss(features, features, torch.tensor(1.0), features)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_memory_is_a_small_part_of_that_of_all_logits(name: str) -> None:
    num_pairs, dim = 4096, 64
    inputs = batch(name, num_pairs, dim, torch.float32)
    chunked = peak_bytes(lambda: LOSSES[name](*inputs, chunk_size=512).backward())
    plain = peak_bytes(lambda: PLAIN[name](*inputs).backward())
    assert plain >= 2 * 4 * num_pairs**2  # what is measured sees the logits
    assert chunked <= plain / 8
    # Gradients, multiplied by that of the loss, beside the first ones; tiles.
    assert chunked <= 4 * 4 * num_pairs * dim + 6 * 4 * 512**2


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that tensors took in addition, including those inside of operators."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        work()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    taken = peak = 0
    for _, change in changes:
        taken += change
        peak = max(peak, taken)
    return peak


class Collectives(TorchDispatchMode):
    """Names of the collectives that are run, and the bytes that this rank receives in each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            received = args[0].nbytes if isinstance(args[0], Tensor) else -1
            self.seen.append((func.name(), received))
        return func(*args, **(kwargs or {}))


def collectives(
    loss: Loss, inputs: list[Tensor], group: dist.ProcessGroup, *, watched: bool
) -> list[list[tuple[str, int]]]:
    """Return the traffic of forward, backward, and a forward without gradient; [] if not
    watched."""
    # A mode costs every process a second of imports: one rank's is enough.
    modes = [Collectives() for _ in range(3)] if watched else []
    contexts = iter(modes)
    with next(contexts, nullcontext()):
        value = loss(*inputs, group)
    with next(contexts, nullcontext()):
        value.backward()
    with next(contexts, nullcontext()), torch.no_grad():
        loss(*inputs, group)
    return [mode.seen for mode in modes]


class Gather(torch.autograd.Function):
    """[R, B, E]; the backward sums each slice on its owner."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = local.new_empty(group.size() * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        local = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None


def returned_clip(images: Tensor, texts: Tensor, scale: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Own rows against gathered columns, whose gradients are sent back to their owners."""
    labels = torch.arange(len(images)) + group.rank() * len(images)
    per_image = scale * images @ Gather.apply(texts, group).T
    per_text = scale * texts @ Gather.apply(images, group).T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def returned_siglip(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, group: dist.ProcessGroup
) -> Tensor:
    logits = scale * images @ Gather.apply(texts, group).T + bias
    own = torch.arange(len(images))
    signs = torch.full_like(logits, -1)
    signs[own, own + group.rank() * len(own)] = 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


RETURNED: dict[str, Loss] = {"clip": returned_clip, "siglip": returned_siglip}


def part_of_batch(name: str, num_ranks: int, position: int) -> list[Tensor]:
    """Return the part of the whole group's batch that one rank holds."""
    images, texts, *scalars = batch(name, num_ranks * LOCAL)
    mine = slice(position * LOCAL, (position + 1) * LOCAL)
    return [x.detach().requires_grad_() for x in (images[mine], texts[mine], *scalars)]


def four_ranks(folder: Path) -> None:
    """One of four processes: the losses in groups of one, two and four."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for size in (1, 2, 4):
        group, _ = dist.new_subgroups(size)
        for name in NAMES:
            inputs = part_of_batch(name, size, rank % size)
            found[f"{name} {size}"] = {
                "results": results(LOSSES[name], inputs, group=group, chunk_size=2),
                "again": results(LOSSES[name], inputs, group=group, chunk_size=2),
                "sent back": results(RETURNED[name], inputs, group=group),
                "collectives": collectives(LOSSES[name], inputs, group, watched=rank == 0),
            }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four_ranks")
    run_ranks(4, four_ranks, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_equal_one_process(
    name: str, size: int, all_ranks: list[dict[str, Any]]
) -> None:
    whole = results(PLAIN[name], batch(name, size * LOCAL))
    for first in range(0, 4, size):
        ranks = [found[f"{name} {size}"]["results"] for found in all_ranks[first : first + size]]
        values, images, texts, *scalars = (torch.stack(x) for x in zip(*ranks, strict=True))
        # Features belong to one rank each: the mean over the ranks is a division of its gradient.
        features = [x.flatten(0, 1) / size for x in (images, texts)]
        together = [values.mean(0), *features, *(x.mean(0) for x in scalars)]
        assert worst(together, whole) <= 1e-12


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_the_same_ranks_give_the_same_bits(name: str, all_ranks: list[dict[str, Any]]) -> None:
    for found in all_ranks:
        both = found[f"{name} 4"]
        assert all(map(torch.equal, both["results"], both["again"]))


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_gets_what_sending_gradients_back_gives_it(
    name: str, size: int, all_ranks: list[dict[str, Any]]
) -> None:
    """But for the scalars, whose gradient is only defined as the mean over the ranks."""
    for found in all_ranks:
        actual, expected = (found[f"{name} {size}"][form][:3] for form in ("results", "sent back"))
        assert worst(actual, expected) <= 1e-12


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_communication_is_what_the_docstring_says(
    name: str, size: int, all_ranks: list[dict[str, Any]]
) -> None:
    features = ("c10d::_allgather_base_", size * 2 * LOCAL * DIM * 8)
    log_sums = ("c10d::_allgather_base_", size * 2 * LOCAL * 8)
    forward = [features, log_sums] if name == "clip" else [features]
    expected = [forward, [], [features]] if size > 1 else [[], [], []]
    assert all_ranks[0][f"{name} {size}"]["collectives"] == expected
