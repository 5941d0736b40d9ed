from pathlib import Path
from typing import Any

import pytest
import torch

from ds_linclip.config import (
    LinearAttention,
    ModelConfig,
    ParallelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
)
from ds_linclip.interop.state_dict import from_open_clip, to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.parallel.tensor_parallel import (
    column_parallel,
    row_parallel,
    vocab_parallel_embedding,
)
from ds_linclip.process.consensus import AgreedError

#: Both ranks and the parent build this from the same seed; the towers differ in attention.
CONFIG = ModelConfig(
    embed_dim=24,
    vision=VisionTower(
        image_size=(32, 32),
        patch_size=8,
        width=64,
        layers=2,
        head_width=16,
        attention=LinearAttention(head_norm=True),
    ),
    text=TextTower(
        context_length=12,
        vocab_size=60,
        width=48,
        heads=4,
        layers=2,
        attention=SoftmaxAttention(),
    ),
)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create(ParallelConfig(device="cpu"))


def test_unlaunched_process_is_a_world_of_one(mesh: Mesh) -> None:
    assert mesh.device == torch.device("cpu")
    assert (mesh.rank, mesh.world_size) == (0, 1)
    assert (mesh.dp.rank, mesh.dp.size, mesh.tp.rank, mesh.tp.size) == (0, 1, 0, 1)
    assert torch.distributed.get_world_size(mesh.dp.group) == 1


def test_creating_the_mesh_again_reuses_its_groups(mesh: Mesh) -> None:
    again = Mesh.create(ParallelConfig(device="cpu", dp=1))
    assert again == mesh


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ParallelConfig(device="cpu", dp=2),
            r"parallel\.dp \(2\) x .* must equal the number of ranks \(1\): .*dp=1 would do, or 2",
        ),
        (
            ParallelConfig(device="cpu", tp=2, cp=3, pp=5),
            r"tp \(2\) x .*cp \(3\) x .*pp \(5\) = 30 must divide the number of ranks \(1\): st",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_ranks_are_named(config: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh.create(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpus_are_counted() -> None:
    message = r"parallel\.device \(cuda\) needs a GPU for each of the 1 ranks .*, found 0"
    with pytest.raises(ValueError, match=message):
        Mesh.create(ParallelConfig(device="cuda"))


def test_agree_returns_the_result_or_raises_the_error(mesh: Mesh) -> None:
    assert mesh.agree(lambda: 7) == 7

    def read() -> None:
        raise OSError("no such shard")

    with pytest.raises(AgreedError, match=r"^no such shard$"):
        mesh.agree(read, errors=(ValueError, OSError))
    with pytest.raises(OSError, match="no such shard"):
        mesh.agree(read)


def test_mpu_has_what_deepspeed_needs(mesh: Mesh) -> None:
    mpu = mesh.mpu()
    assert mpu.get_data_parallel_group() is mesh.replicas.group
    assert mpu.get_data_parallel_world_size() == 1
    assert mpu.get_data_parallel_group_ranks() == [0]
    assert (mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()) == (0, 1)
    assert not hasattr(mpu, "get_slice_parallel_rank")


def test_layers_equal_torchs_layers(mesh: Mesh) -> None:
    normal = torch.nn.init.normal_
    x = torch.randn(2, 5, 6, requires_grad=True)
    for build in (column_parallel, row_parallel):
        layer = build(mesh, 6, 4, init=normal, bias_init=normal)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert build(mesh, 6, 4, init=normal).bias.abs().sum() == 0
    table = vocab_parallel_embedding(mesh, 10, 3, init=normal)
    ids = torch.tensor([[1, 9], [0, 3]])
    assert torch.equal(table(ids), table.weight[ids])


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def run_model(mesh: Mesh) -> dict[str, Any]:
    """Return features, unsplit weights and unsplit gradients of a model from a fixed seed."""
    torch.manual_seed(0)
    model = CLIP(CONFIG, mesh)
    weights = to_open_clip(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    texts = torch.randint(0, 60, (4, 12), generator=generator)
    image_features, text_features, log_scale = model(images, texts)
    logits = log_scale.exp() * image_features @ text_features.T
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    gradients = to_open_clip(model)
    from_open_clip(model, weights)  # and back: the split is the inverse of the gather
    reloaded = to_open_clip(model)
    return {
        "features": [image_features.detach(), text_features.detach()],
        "weights": weights,
        "gradients": gradients,
        "reloaded": reloaded,
        "num_local": sum(parameter.numel() for parameter in model.parameters()),
    }


def two_ranks(folder: Path) -> None:
    """Run one of two launched processes: shared errors, then tensor parallelism."""
    mesh = Mesh.create(ParallelConfig(device="cpu", dp=2))
    layout: list[Any] = [(mesh.rank, mesh.dp.rank, mesh.dp.size, mesh.tp.size)]

    def fail_on(*ranks: int) -> str:
        if mesh.rank in ranks:
            raise ValueError("data.train ([]) must name at least one shard")
        return f"result {mesh.rank}"

    answers = []
    for ranks in ((), (0,), (1,), (0, 1)):
        try:
            answers.append(mesh.agree(lambda ranks=ranks: fail_on(*ranks)))
        except AgreedError as error:
            answers.append(str(error))

    mesh = Mesh.create(ParallelConfig(device="cpu", tp=2))
    layout.append((mesh.rank, mesh.dp.size, mesh.tp.rank, mesh.tp.size))
    torch.save(run_model(mesh) | {"layout": layout, "answers": answers}, folder / f"{mesh.rank}.pt")
    mesh.close()


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, two_ranks, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.distributed
def test_launched_ranks_find_their_places(both_ranks: list[dict[str, Any]]) -> None:
    assert both_ranks[0]["layout"] == [(0, 0, 2, 1), (0, 1, 0, 2)]
    assert both_ranks[1]["layout"] == [(1, 1, 2, 1), (1, 1, 1, 2)]


@pytest.mark.distributed
def test_all_ranks_raise_the_error_of_one(both_ranks: list[dict[str, Any]]) -> None:
    message = "data.train ([]) must name at least one shard"
    for rank, result in enumerate(both_ranks):
        assert result["answers"] == [
            f"result {rank}",
            f"{message} (on rank 0 of 2)",
            f"{message} (on rank 1 of 2)",
            message,
        ]


@pytest.mark.distributed
def test_tensor_parallel_model_equals_the_whole_one(
    mesh: Mesh, both_ranks: list[dict[str, Any]]
) -> None:
    whole = run_model(mesh)
    for part in both_ranks:
        assert part["num_local"] < 0.7 * whole["num_local"]
        for actual, expected in zip(part["features"], whole["features"], strict=True):
            assert relative_rms(actual, expected) <= 1e-5
        for key, expected in whole["weights"].items():
            assert torch.equal(part["weights"][key], expected), key
            assert torch.equal(part["reloaded"][key], expected), key
        for key, expected in whole["gradients"].items():
            assert relative_rms(part["gradients"][key], expected) <= 1e-5, key
