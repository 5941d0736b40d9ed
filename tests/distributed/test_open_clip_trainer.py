"""Training step by step as open_clip's own trainer does it, with its losses and its optimizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ds_linclip.config import (
    Config,
    ModelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
    load_config,
)
from ds_linclip.engine.initialize import initialize_engine
from ds_linclip.engine.optim import build_optimizer, learning_rate
from ds_linclip.interop.hub_folder import open_clip_config
from ds_linclip.interop.state_dict import to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers import EMBEDDED

STEPS, WARMUP, BATCH = 40, 10, 16
SOFTMAX = SoftmaxAttention()
MODEL = ModelConfig(
    embed_dim=32,
    vision=VisionTower(image_size=(32, 32), patch_size=8, width=64, layers=2, attention=SOFTMAX),
    text=TextTower(
        context_length=12, vocab_size=60, width=64, heads=2, layers=2, attention=SOFTMAX
    ),
)
#: Name -> loss, precision, micro-batches of a rank, largest norm of the gradient.
#: open_clip counts the gradients of scale and bias once per micro-batch, which Adam undoes and the
#: norm does not.
CASES = {
    "softmax": ("softmax", "fp32", 1, 1.0),
    "sigmoid": ("sigmoid", "fp32", 1, 1.0),
    "softmax_accumulated": ("softmax", "fp32", 2, 0.0),
    "sigmoid_accumulated": ("sigmoid", "fp32", 2, 0.0),
    "softmax_amp": ("softmax", "amp_bf16", 1, 1.0),
}
#: Loss and logit scale of every step.
Curve = list[tuple[float, float]]


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_scales_are_those_of_open_clips_trainer(tmp_path, ranks):
    run_ranks(ranks, compare, tmp_path)
    for name, (ours, theirs) in json.loads((tmp_path / "curves.json").read_text()).items():
        assert len(ours) == len(theirs) == STEPS
        # Products in bf16 are rounded elsewhere; the loss falls to a tenth meanwhile.
        tolerance = {"rel": 5e-2, "abs": 5e-2} if "amp" in name else {"rel": 1e-5}
        for step, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
            assert mine == pytest.approx(their, **tolerance), f"{name}, step {step}"
        (first, _), (last, scale) = ours[0], ours[-1]
        assert last < 0.8 * first, name  # it has learned
        assert abs(scale / ours[0][1] - 1) > 1e-4, name


def compare(folder: Path) -> None:
    mesh = Mesh.create()
    curves = {name: both_curves(mesh, *case) for name, case in CASES.items()}
    if mesh.rank == 0:
        (folder / "curves.json").write_text(json.dumps(curves))
    mesh.barrier()
    mesh.close()


def both_curves(
    mesh: Mesh, loss: str, precision: str, accumulated: int, clip_norm: float
) -> tuple[Curve, Curve]:
    """Train the same weights on the same batches with our engine and with open_clip's trainer."""
    local = BATCH // mesh.dp.size
    overrides = [
        *(f"train.steps={STEPS}", f"train.global_batch_size={BATCH}", f"loss.kind={loss}"),
        *(f"train.micro_batch_size={local // accumulated}", f"train.precision={precision}"),
        *(f"optim.clip_grad_norm={clip_norm}", f"optim.warmup_steps={WARMUP}"),
        *("optim.lr=5e-4", "log.tensorboard=false"),
    ]
    config = load_config(EMBEDDED, overrides)
    config.model = MODEL
    torch.manual_seed(0)
    model = CLIP(config.model, mesh, loss=config.loss.kind)
    weights = to_open_clip(model)
    batches = [make_batch(number % 4, mesh.rank, local) for number in range(STEPS)]
    return by_our_engine(model, config, mesh, batches), by_open_clip(
        weights, config, mesh, batches, accumulated
    )


def make_batch(number: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * number + rank)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return images, torch.randint(60, (size, 12), generator=generator)


def by_our_engine(
    model: CLIP, config: Config, mesh: Mesh, batches: Sequence[tuple[Tensor, Tensor]]
) -> Curve:
    engine = initialize_engine(model, build_optimizer(model, config.optim), config, mesh)
    curve = []
    for step, batch in enumerate(batches):
        loss = engine.step(batch, lr=learning_rate(step, STEPS, config.optim))
        curve.append((loss.item(), engine.objective.logit_scale.item()))
    return curve


def by_open_clip(
    weights: dict[str, Tensor],
    config: Config,
    mesh: Mesh,
    batches: Sequence[tuple[Tensor, Tensor]],
    accumulated: int,
) -> Curve:
    has_bias, optim = config.loss.kind == "sigmoid", config.optim
    content = open_clip_config(config.model, with_bias=has_bias)["model_cfg"]
    model = open_clip.CLIP(**content, output_dict=True)
    model.load_state_dict(weights)
    named = dict(model.named_parameters())
    # The rule of open_clip_train.main.
    exclude = {n for n, p in named.items() if p.ndim < 2 or "ln" in n or "bias" in n}
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in named if n in exclude], "weight_decay": 0.0},
            {
                "params": [named[n] for n in named if n not in exclude],
                "weight_decay": optim.weight_decay,
            },
        ],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
    )
    where = {"rank": mesh.rank, "world_size": mesh.world_size}
    loss = SigLipLoss(**where) if has_bias else ClipLoss(True, gather_with_grad=True, **where)
    parts = Loader(
        part
        for images, texts in batches
        for part in zip(images.chunk(accumulated), texts.chunk(accumulated), strict=True)
    )
    data = {"train": SimpleNamespace(dataloader=parts, set_epoch=lambda epoch: None)}
    arguments = SimpleNamespace(
        **where,
        device="cpu",
        precision=config.train.precision,
        accum_freq=accumulated,
        grad_clip_norm=optim.clip_grad_norm or None,
        batch_size=len(parts[0][0]),
        log_every_n_steps=1,
        **dict.fromkeys(("distill", "skip_scheduler", "horovod", "wandb"), False),
    )
    written: dict[str, list[float]] = {"train/loss": [], "train/scale": []}
    board = SimpleNamespace(
        add_scalar=lambda tag, value, step: written.setdefault(tag, []).append(value)
    )
    wrapped = DistributedDataParallel(model) if mesh.world_size > 1 else model
    scheduler = cosine_lr(optimizer, optim.lr, WARMUP, STEPS)
    train_one_epoch(
        *(wrapped, data, loss, 0, optimizer, None, scheduler, None, arguments), tb_writer=board
    )
    return list(zip(written["train/loss"], written["train/scale"], strict=True))


class Loader(list):
    """What open_clip's trainer asks of a data loader."""

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(texts) for _, texts in self)
