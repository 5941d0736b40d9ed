"""The losses against a teacher: their definitions, and the whole batch in one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.loss.distillation import feature_loss, similarity_loss
from ds_linclip.parallel.spawn import run_ranks

#: Pairs of a rank, and the sizes of a student's and a teacher's feature.
LOCAL, DIM, TEACHER_DIM = 5, 8, 6


def rows(seed: int, num_pairs: int, dim: int) -> Tensor:
    """Normalized features of images and texts, [2, B, dim]."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, num_pairs, dim, generator=generator).double(), dim=-1)


def inputs(num_pairs: int) -> tuple[list[Tensor], list[Tensor]]:
    """The student's features and scale, which need gradients, and the teacher's."""
    scale, teacher_scale = torch.tensor(9.0).double(), torch.tensor(14.0).double()
    own = [x.clone().requires_grad_() for x in (*rows(0, num_pairs, DIM), scale)]
    return own, [*rows(1, num_pairs, TEACHER_DIM), teacher_scale]


def plain_similarity(own: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Sum over texts of p log(p / q) for every image, and over images for every text; the mean."""
    images, texts, scale = own
    logits = scale * images @ texts.T
    targets = teacher[2] * teacher[0] @ teacher[1].T
    total = logits.new_zeros(())
    for of_student, of_teacher in ((logits, targets), (logits.T, targets.T)):
        for row, wanted in zip(of_student, of_teacher, strict=True):
            p, q = wanted.softmax(0), row.softmax(0)
            total = total + (p * (p / q).log()).sum()
    return total / (2 * len(images))


def results(value: Tensor, own: list[Tensor]) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value, own)]


@pytest.mark.parametrize(("num_pairs", "chunk_size"), [(1, 1), (7, 3), (37, 10), (37, 1024)])
def test_similarity_loss_is_its_definition(num_pairs: int, chunk_size: int) -> None:
    own, teacher = inputs(num_pairs)
    found = results(similarity_loss(*own, *teacher, chunk_size=chunk_size), own)
    for actual, expected in zip(found, results(plain_similarity(own, teacher), own), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def test_similarity_loss_is_zero_and_flat_at_the_teacher() -> None:
    _, teacher = inputs(11)
    own = [x.clone().requires_grad_() for x in teacher]
    value, *gradients = results(similarity_loss(*own, *teacher), own)
    assert abs(value) < 1e-13
    assert max(gradient.abs().max() for gradient in gradients) < 1e-13


def test_similarity_loss_needs_a_row_for_every_pair() -> None:
    own, _ = inputs(5)
    _, teacher = inputs(4)
    with pytest.raises(ValueError, match=r"teacher_images \(4 rows\) must have a row for each of"):
        similarity_loss(*own, *teacher)


def test_feature_loss_is_one_minus_the_mean_cosine() -> None:
    own, (images, texts) = [x.requires_grad_() for x in rows(0, 7, DIM).unbind()], rows(1, 7, DIM)
    cosines = [own[0][i] @ images[i] for i in range(7)] + [own[1][i] @ texts[i] for i in range(7)]
    expected = results(1 - sum(cosines) / 14, own)
    for actual, each in zip(results(feature_loss(*own, images, texts), own), expected, strict=True):
        torch.testing.assert_close(actual, each)
    with pytest.raises(ValueError, match=r"teacher_images \(shape \(7, 6\)\) must have the shape"):
        feature_loss(*own, *rows(1, 7, TEACHER_DIM))


def write_results_of_rank(folder: str) -> None:
    """Write value and gradients of this rank's rows."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own, teacher = inputs(LOCAL * dist.get_world_size())
    held = slice(rank * LOCAL, (rank + 1) * LOCAL)
    mine = [x.detach()[held].clone().requires_grad_() for x in own[:2]]
    mine.append(own[2].detach().requires_grad_())
    value = similarity_loss(
        *mine, teacher[0][held], teacher[1][held], teacher[2], dist.group.WORLD, chunk_size=3
    )
    torch.save(results(value, mine), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_have_the_loss_and_gradients_of_the_whole_batch(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(world_size, write_results_of_rank, str(tmp_path))
    own, teacher = inputs(LOCAL * world_size)
    expected = results(plain_similarity(own, teacher), own)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    values, images, texts, scales = zip(*found, strict=True)
    # Averaging over the ranks is what data parallelism does to gradients.
    actual = torch.stack(values).mean(), torch.cat(images), torch.cat(texts)
    actual = actual[0], *(x / world_size for x in actual[1:]), torch.stack(scales).mean()
    for each, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-10, atol=1e-12)
