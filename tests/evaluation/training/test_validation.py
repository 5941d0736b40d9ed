"""Loss and retrieval on held-out pairs, against definitions by hand and on two ranks."""

import json
import math

import pytest
import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor
from torch.nn.functional import logsigmoid

from ds_linclip.config import Config, load_config
from ds_linclip.data import EvalTransform, ImageTextShards
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.process.phase import PhaseTracker
from ds_linclip.trainer import train
from helpers import EMBEDDED
from helpers.training_shards import NUM_SAMPLES, sound_samples, write_shards
from linclip_eval.training.evaluators import Evaluators
from linclip_eval.training.validation import ValidationEvaluator

SCALE, BIAS = 5.0, -2.0


class StandIn:
    """Encodes an image by its corners and a text by its tokens, with a fixed logit scale."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images[:, :, ::15, ::15].flatten(1)[:, :6]

    def encode_text(self, texts: Tensor) -> Tensor:
        return torch.sin(texts[:, :6].double() * torch.arange(1, 7)).float()

    def logit_parameters(self) -> list[Tensor]:
        return [torch.tensor([math.log(SCALE)]), torch.tensor([BIAS])]


def config_of(shards: str, **settings: int) -> Config:
    config = Config()
    config.model.vision.image_size, config.model.text.context_length = (16, 16), 8
    config.data.num_workers, config.eval.batch_size = 0, 7
    config.train.global_batch_size, config.loss.chunk_size = 16, 5
    config.eval.validation.shards = shards
    config.eval.validation.num_samples = settings.get("num_samples", 50)
    return config


def pairs(config: Config) -> tuple[Tensor, Tensor]:
    """Return the unit features of all good pairs, [N, 6] of images and of texts, in float64."""
    evaluator = ValidationEvaluator.from_config(config, device=torch.device("cpu"))
    model, data = StandIn(), evaluator.data
    found = []
    for batch in data.batches(range(data.num_batches)):
        images, texts = batch.images, evaluator.tokenizer(batch.captions)
        found.append((model.encode_image(images).double(), model.encode_text(texts).double()))
    images, texts = (torch.cat(side) for side in zip(*found, strict=True))
    return images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)


def loss_by_hand(kind: str, images: Tensor, texts: Tensor) -> float:
    logits = SCALE * images @ texts.T
    if kind == "softmax":
        both = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
        return -both.mean().item() / 2
    signs = 2 * torch.eye(len(logits), dtype=torch.float64) - 1
    return -logsigmoid(signs * (logits + BIAS)).sum().item() / len(logits)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_scores_are_those_of_their_definitions(kind, tmp_path):
    (shards,) = write_shards(tmp_path, sound_samples())
    config = config_of(shards)
    config.loss.kind = kind
    evaluator = ValidationEvaluator.from_config(config, device=torch.device("cpu"))
    values = evaluator(StandIn(), None, 1)
    images, texts = pairs(config)
    assert len(images) == 50
    whole = range(0, 48, 16)  # two pairs are left over
    expected = [loss_by_hand(kind, images[i : i + 16], texts[i : i + 16]) for i in whole]
    assert values["eval/validation/loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    cosines = images @ texts.T
    ranks = 1 + (cosines > cosines.diagonal()[:, None]).sum(1)
    for k in (1, 5, 10):
        recall = (ranks <= k).double().mean().item()
        assert values[f"eval/validation/image_to_text_recall{k}"] == pytest.approx(recall)
    assert 0 < values["eval/validation/image_to_text_recall10"] < 1
    assert values["eval/validation/text_to_image_median_rank"] >= 1
    assert values["eval/validation/samples"] == 50
    assert values.keys() == evaluator.metrics.keys()


def test_bad_samples_are_counted_up_to_the_limit(tmp_path):
    samples = sound_samples()
    samples["000000003"]["jpg"] = b"<html>"
    samples["000000020"]["txt"] = b" "
    (shards,) = write_shards(tmp_path, samples)
    config = config_of(shards, num_samples=1000)
    evaluator = ValidationEvaluator.from_config(config, device=torch.device("cpu"))
    values = evaluator(StandIn(), None, 1)
    assert values["eval/validation/samples"] == NUM_SAMPLES
    assert values["eval/validation/bad_samples"] == 2
    config.data.max_bad_samples = 0.01
    evaluator = ValidationEvaluator.from_config(config, device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"eval\.validation\.shards .*: 2 of 60 are bad .*image_und"
    ):
        evaluator(StandIn(), None, 1)


def test_damaged_shard_is_counted_and_a_missing_one_refused(tmp_path):
    (shards,) = write_shards(tmp_path, sound_samples())
    (tmp_path / "00001.tar").write_bytes(b"x" * 2000)
    data = ImageTextShards(config_of(shards), EvalTransform(PreprocessCfg(size=(16, 16))))
    unreadable = [
        bad for batch in data.batches(range(data.num_batches)) for bad in batch.unreadable
    ]
    assert len(unreadable) == NUM_SAMPLES / 4
    assert "00001.tar" in unreadable[0].where
    with pytest.raises(ValueError, match=r"^eval\.validation\.shards \(.*x\.tar\) matches no file"):
        Evaluators.from_config(config_of(f"{tmp_path}/x.tar"), device=torch.device("cpu"))


def test_rehearsal_meets_errors_before_the_first_step(tmp_path):
    class Broken(StandIn):
        def encode_text(self, texts: Tensor) -> Tensor:
            raise ValueError("no texts")

    (shards,) = write_shards(tmp_path, sound_samples())
    evaluators = Evaluators.from_config(config_of(shards), device=torch.device("cpu"))
    assert evaluators is not None
    evaluators.rehearse(StandIn(), PhaseTracker())
    with pytest.raises(ValueError, match="no texts"):
        evaluators.rehearse(Broken(), PhaseTracker())


def _train(config: Config) -> None:
    mesh = Mesh.create(config.parallel)
    evaluators = Evaluators.from_config(config, device=mesh.device, group=mesh.dp.group)
    train(config, mesh, evaluators)
    mesh.close()


@pytest.mark.distributed
def test_two_ranks_score_as_one(embedded_overrides, tmp_path):
    """After one step at a learning rate that changes nothing, as ranks round differently."""
    scores = []
    train_shards = embedded_overrides[0].partition("[")[2].strip("']")
    for ranks in (1, 2):
        small = ["model.vision.layers=1", "model.text.layers=1", "train.global_batch_size=16"]
        short = ["train.steps=2", "optim.warmup_steps=1", "optim.lr=1e-12", "data.num_workers=0"]
        held_out = [f"eval.validation.shards={train_shards}", "eval.validation.num_samples=40"]
        run = [f"output_dir={tmp_path}", f"name=on{ranks}", "eval.data=null", "eval.batch_size=9"]
        fp32 = ["train.precision=fp32", "optim.weight_decay=0"]
        config = load_config(
            EMBEDDED, [*embedded_overrides, *small, *short, *held_out, *run, *fp32]
        )
        run_ranks(ranks, _train, config)
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        scores.append([r for r in map(json.loads, lines) if "eval/validation/loss" in r])
    (alone,), (together,) = scores
    assert together == pytest.approx(alone, rel=1e-5)
    assert 2 < alone["eval/validation/loss"] < 6  # of random weights; log 16 is 2.8
