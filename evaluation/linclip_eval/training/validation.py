"""Loss and retrieval on held-out image-text pairs during training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from open_clip.transform import PreprocessCfg
from torch import Tensor

from ds_linclip.config import Config
from ds_linclip.data import CaptionTokenizer, EvalTransform, ImageTextShards
from ds_linclip.loss.contrastive import clip_loss, siglip_loss
from ds_linclip.loss.grad_cache import bounded_log_scale
from ds_linclip.process.consensus import agree, map_over_ranks
from ds_linclip.process.phase import PhaseTracker
from linclip_eval.features import Features, extract_features
from linclip_eval.protocols import Better, Encoders, Tokenizer
from linclip_eval.retrieval import DIRECTIONS, RECALLS, rank_captions

__all__ = ["ValidationEvaluator"]

_PREFIX = "eval/validation"


class _Model(Encoders, Protocol):
    """A model in eval mode with its logit scale."""

    def logit_parameters(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class ValidationEvaluator:
    """The held-out pairs of a run; the ranks of ``group`` score models on them together.

    Features are computed by the ranks in turn and gathered on all of them; loss and ranks are
    computed from these in parts, so memory grows linearly with the number of pairs.

    Attributes:
        data: The pairs, the same on every rank.
        config: The run's configuration, for the loss and the global batch.
        tokenizer: The tokenizer of the model.
        device: The device of the model.
    """

    data: ImageTextShards
    config: Config
    tokenizer: Tokenizer
    device: torch.device
    group: dist.ProcessGroup | None = None

    @classmethod
    def from_config(
        cls, config: Config, *, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> Self:
        """Return the evaluator that ``eval.validation`` describes.

        Raises:
            ValueError: when the shards cannot be found or opened.
        """
        transform = EvalTransform(PreprocessCfg(size=config.model.vision.image_size))
        return cls(
            data=ImageTextShards(config, transform),
            config=config,
            tokenizer=CaptionTokenizer(config.model.text.context_length),
            device=device,
            group=group,
        )

    @property
    def metrics(self) -> Mapping[str, Better]:
        """The tags that a call returns, and which end of each is better."""
        found: dict[str, Better] = {f"{_PREFIX}/loss": "min"}
        for direction in DIRECTIONS:
            found |= {f"{_PREFIX}/{direction}_recall{k}": "max" for k in RECALLS}
            found[f"{_PREFIX}/{direction}_median_rank"] = "min"
        return {**found, f"{_PREFIX}/samples": "max", f"{_PREFIX}/bad_samples": "min"}

    def rehearse(self, model: _Model, phases: PhaseTracker) -> None:
        """Read the first batch, and embed a pair; all ranks of the run call this together.

        Raises:
            ValueError: on all ranks, when the pairs cannot be scored.
        """
        phases.enter("rehearsing the validation")
        everyone = None if self.group is None else dist.group.WORLD
        agree(partial(self._embed_one, model), everyone, (Exception,))

    @torch.no_grad()
    def __call__(self, model: _Model, writer: Any, step: int) -> Mapping[str, float]:
        """Return loss, recalls, median ranks and the numbers of samples, by their tags.

        ``writer`` and ``step`` are not used.
        """
        features = extract_features(
            model.encode_image,
            self.data,
            device=self.device,
            embed_texts=lambda captions: model.encode_text(
                self.tokenizer(captions).to(self.device)
            ),
            group=self.group,
        )
        self.data.require_readable(features.unreadable)
        ranked = rank_captions(features, device=self.device, group=self.group)
        found = {
            f"{_PREFIX}/{name.replace('R@', 'recall')}": value
            for name, value in ranked.metrics().items()
        }
        found[f"{_PREFIX}/loss"] = self._loss(model, features)
        found[f"{_PREFIX}/samples"] = self.data.num_samples
        found[f"{_PREFIX}/bad_samples"] = len(features.unreadable)
        return {tag: found[tag] for tag in self.metrics}

    def _loss(self, model: _Model, features: Features) -> float:
        """Return the mean loss of the global batches that the pairs fill."""
        num_pairs = len(features.images)
        size = min(self.config.train.global_batch_size, num_pairs)
        log_scale, *bias = (each.detach().float().reshape(()) for each in model.logit_parameters())
        scale, settings = bounded_log_scale(log_scale).exp(), self.config.loss

        def losses(numbers: Sequence[int]) -> Iterator[float]:
            for number in numbers:
                rows = slice(number * size, (number + 1) * size)
                pairs = (features.images[rows], features.texts[rows])
                images, texts = (torch.from_numpy(side).to(self.device) for side in pairs)
                if settings.kind == "softmax":
                    loss = clip_loss(images, texts, scale, chunk_size=settings.chunk_size)
                else:
                    loss = siglip_loss(
                        images, texts, scale, bias[0], chunk_size=settings.chunk_size
                    )
                yield loss.item()

        found = map_over_ranks(losses, range(num_pairs // size), self.group)
        return sum(found) / len(found)

    @torch.no_grad()
    def _embed_one(self, model: _Model) -> None:
        (batch,) = self.data.batches([0])
        images = batch.images if self.device.type == "cuda" else batch.images[:1]  # a CPU is slow
        if len(images):
            model.encode_image(images.to(self.device))
            model.encode_text(self.tokenizer(batch.captions[: len(images)]).to(self.device))
