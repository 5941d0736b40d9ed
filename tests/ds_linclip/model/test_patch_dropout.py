"""Patch dropout: the choice of patches, and the image tower's output for them."""

from types import SimpleNamespace

import pytest
import torch
from open_clip.transformer import PatchDropout

from ds_linclip.config import (
    LinearAttention,
    ModelConfig,
    ParallelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
    load_config,
)
from ds_linclip.model import CLIP
from ds_linclip.model.attention import Patches
from ds_linclip.model.patch_dropout import kept_patches, model_inputs
from ds_linclip.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create(ParallelConfig(device="cpu"))


def build(mesh: Mesh, kind: str, patch_dropout: float = 0.0) -> CLIP:
    torch.manual_seed(0)
    attention = SoftmaxAttention() if kind == "softmax" else LinearAttention(normalized=True)
    vision = VisionTower(
        image_size=(32, 24),
        patch_size=8,
        width=32,
        layers=2,
        head_width=16,
        patch_dropout=patch_dropout,
        attention=attention,
    )
    text = TextTower(context_length=8, vocab_size=60, width=32, heads=2, layers=1)
    return CLIP(ModelConfig(embed_dim=16, vision=vision, text=text), mesh)


def test_every_patch_is_kept_equally_often_and_independently():
    samples = torch.arange(20_000)
    kept = kept_patches(samples, num_patches=16, num_kept=4, seed=3)
    chosen = torch.zeros(20_000, 16).scatter_(1, kept, 1.0)
    # Five standard errors of a share of one quarter, and of pairs of patches.
    assert (chosen.mean(0) - 4 / 16).abs().max() < 5 * (0.25 * 0.75 / 20_000) ** 0.5
    pairs = (chosen.T @ chosen / 20_000)[~torch.eye(16, dtype=torch.bool)]
    share = 4 / 16 * 3 / 15
    assert (pairs - share).abs().max() < 5 * (share * (1 - share) / 20_000) ** 0.5
    # Neighbouring samples, and neighbouring seeds, choose independently.
    other = torch.zeros(20_000, 16).scatter_(
        1, kept_patches(samples, num_patches=16, num_kept=4, seed=4), 1.0
    )
    for a, b in ((chosen[1:], chosen[:-1]), (chosen, other)):
        common = (a * b).sum(1).mean()
        assert abs(common - 1.0) < 5 * (0.6 / 20_000) ** 0.5  # hypergeometric: mean 1, var 0.6


@pytest.mark.parametrize("seed", [0, 1, 2, 2**31, 2**62, 2**64])
def test_any_seed_will_do(seed):
    assert kept_patches(torch.arange(3), num_patches=9, num_kept=4, seed=seed).shape == (3, 4)


def test_choice_is_sorted_distinct_and_a_function_of_sample_and_seed():
    samples = torch.tensor([5, 0, 2**40, 5])
    kept = kept_patches(samples, num_patches=49, num_kept=24, seed=1)
    assert (kept[:, 1:] > kept[:, :-1]).all()
    assert kept.min() >= 0
    assert kept.max() < 49
    assert torch.equal(kept[0], kept[3])
    for row, sample in enumerate(samples):
        alone = kept_patches(sample[None], num_patches=49, num_kept=24, seed=1)
        assert torch.equal(alone[0], kept[row])
    rows = kept_patches(torch.arange(500), num_patches=49, num_kept=24, seed=1)
    assert len(rows.unique(dim=0)) == 500


@pytest.mark.parametrize("dropout", [0.1, 0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("size", [(32, 24), (224, 224), (8, 8)])
def test_as_many_are_kept_as_in_open_clip(dropout, size):
    tower = VisionTower(image_size=size, patch_size=8, patch_dropout=dropout)
    theirs = PatchDropout(dropout).train()
    tokens = torch.randn(2, tower.num_tokens, 4)
    kept = theirs(tokens)
    assert torch.equal(kept[:, 0], tokens[:, 0])  # the class token
    assert tower.num_kept_patches_at(size) == kept.shape[1] - 1


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_the_model_sees_the_class_token_and_the_kept_patches_at_their_places(mesh, kind):
    model = build(mesh, kind)
    model.visual.ln_pre = torch.nn.Identity()
    entered = []
    model.visual.blocks["0"].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    images = torch.randn(3, 3, 32, 24)
    kept = torch.tensor([[0, 5, 11], [1, 2, 3], [4, 7, 8]])
    model.visual(images)
    model.visual(images, model.visual.grid(images, kept))
    whole, part = entered
    assert part.shape == (3, 4, 32)
    torch.testing.assert_close(part[:, 0], whole[:, 0])
    torch.testing.assert_close(part[:, 1:], whole[torch.arange(3)[:, None], 1 + kept])


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_keeping_all_patches_changes_nothing(mesh, kind):
    model = build(mesh, kind)
    images = torch.randn(3, 3, 32, 24)
    every = torch.arange(12).expand(3, 12)
    torch.testing.assert_close(model.visual(images, Patches(4, 3, every)), model.visual(images))


def test_evaluation_never_drops(mesh):
    model, whole = build(mesh, "linear", patch_dropout=0.5).eval(), build(mesh, "linear").eval()
    images = torch.randn(3, 3, 32, 24)
    assert torch.equal(model.encode_image(images), whole.encode_image(images))


def test_without_dropout_the_model_gets_no_choice():
    batch = torch.zeros(4, 3, 32, 32), torch.zeros(4, 8)
    dp, pp = SimpleNamespace(rank=1, size=2), SimpleNamespace(rank=0, size=1)
    place = SimpleNamespace(device=torch.device("cpu"), dp=dp, pp=pp)
    plain = load_config("ds_configs/train/embedded.yaml", ["train.global_batch_size=8"])
    assert len(model_inputs(*batch, 0, plain, place)) == 2
    dropped = load_config(
        "ds_configs/train/embedded.yaml",
        ["train.global_batch_size=8", "model.vision.patch_dropout=0.5"],
    )
    first, second = (model_inputs(*batch, number, dropped, place)[2] for number in (0, 1))
    assert first.shape == (4, 32)
    assert not torch.equal(first, second)  # another choice for every batch
    # Samples are counted over the whole run: those of rank 1 of the first batch are 4 to 7.
    expected = kept_patches(torch.arange(4, 8), num_patches=64, num_kept=32, seed=0)
    assert torch.equal(first, expected)


def test_every_patch_may_be_kept_without_a_class_token():
    dp, pp = SimpleNamespace(rank=0, size=1), SimpleNamespace(rank=0, size=1)
    place = SimpleNamespace(device=torch.device("cpu"), dp=dp, pp=pp)
    changes = ["model.vision.class_token=false", "model.vision.pool_type=avg"]
    config = load_config(
        "ds_configs/train/embedded.yaml", [*changes, "model.vision.patch_dropout=0.5"]
    )
    _, _, kept = model_inputs(torch.zeros(64, 3, 32, 32), torch.zeros(64, 8), 0, config, place)
    assert kept.shape == (64, 32)
    assert set(kept.flatten().tolist()) == set(range(64))
