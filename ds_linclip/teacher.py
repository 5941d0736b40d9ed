"""The frozen teacher of a distillation, which runs beside the student on every rank."""

import torch
import torch.distributed as dist
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.config import Config
from ds_linclip.data import CaptionTokenizer
from ds_linclip.inference import LoadedModel, load_model
from ds_linclip.loss.grad_cache import Targets, bounded_log_scale
from ds_linclip.model import CLIP
from ds_linclip.model.transfer import transfer_attention
from ds_linclip.parallel.mesh import Mesh

__all__ = ["Teacher"]

#: Captions whose token ids teacher and student must agree on.
_PROBES = [
    "",
    "a photo of a dog",
    "Äpfel & Birnen: 7,5 € <b>naïve</b> 日本語 🙂",
    "word " * 200,
]


class Teacher:
    """A frozen model, whole on every rank, that gives the targets of a distillation.

    Ranks that have the same samples each run a part of them and exchange the features; with
    pipeline stages the first stage's ranks run all of them, as only these have the images.

    Args:
        config: The run's configuration, with ``teacher.model`` and the student.
        mesh: All ranks of the run; they construct and call the teacher together.

    Raises:
        AgreedError: on all ranks, when the teacher cannot be loaded, reads other token ids than the
            student, or has features of another size than a term needs.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        settings = config.teacher
        assert settings.model is not None
        self._mesh = mesh
        self._learns_layers = any(term.kind == "layers" for term in config.loss.terms)
        self._micro_batch_size = config.train.micro_batch_size or config.train.global_batch_size
        self._model = load_model(settings.model, mesh.alone(), precision=settings.precision)
        self._embed_dim = mesh.agree(lambda: _check(self._model, config))
        self._scale = _logit_scale(self._model)
        self._factor, self._shift = _renormalization(self._model)

    def prepare(self, student: CLIP) -> None:
        """Make a student learn from the teacher's layers, if the loss is of kind layers.

        Raises:
            AgreedError: on all ranks, when the teacher is no model of this project, or has other
                layers.
        """

        def transfer() -> None:
            teacher = self._model.module
            if not isinstance(teacher, CLIP):
                raise ValueError(
                    f"teacher.model ({self._model.name}) must be a run folder or a hub folder that "
                    "`linclip import` has written, for a loss of kind layers"
                )
            transfer_attention(student, teacher)

        if self._learns_layers:
            self._mesh.agree(transfer)

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Tensor) -> Targets:
        """Return the teacher's features of this rank's batch, and its logit scale; nothing where
        layers learn, which ask the teacher themselves.

        Args:
            images: [B, 3, H, W], normalised for the student, of any size.
            texts: Token ids [B, L].

        Returns:
            Image features [B, T] and text features [B, T], fp32 of length one; the scale [].
        """
        if self._learns_layers:
            return ()
        mesh = self._mesh
        features = torch.empty(len(images), 2, self._embed_dim, device=mesh.device)
        if mesh.pp.rank == 0:
            shares = [len(part) for part in torch.arange(len(images)).tensor_split(mesh.peers.size)]
            first = sum(shares[: mesh.peers.rank])
            own = slice(first, first + shares[mesh.peers.rank])
            features[own] = self._encode(images[own], texts[own])
            if mesh.peers.size > 1:
                for peer, part in enumerate(features.split(shares)):
                    dist.broadcast(part, group=mesh.peers.group, group_src=peer)
        if mesh.pp.size > 1:
            dist.broadcast(features, group=mesh.pp.group, group_src=0)
        image_features, text_features = features.unbind(1)
        return image_features.contiguous(), text_features.contiguous(), self._scale

    def _encode(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return normalized features [B, 2, T] of images and texts, in parts of a micro-batch."""
        size = self._micro_batch_size
        features = [images.new_empty(0, 2, self._embed_dim, dtype=torch.float32)]
        for image, text in zip(images.split(size), texts.split(size), strict=True):
            pair = self._model.encode_image(self._as_wanted(image)), self._model.encode_text(text)
            features.append(F.normalize(torch.stack(pair, 1).float(), dim=-1))
        return torch.cat(features)

    def _as_wanted(self, images: Tensor) -> Tensor:
        """Return images of the teacher's size and normalization."""
        images = images.float() * self._factor + self._shift
        size = self._model.image_size
        if images.shape[2:] == size:
            return images
        return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def _check(model: LoadedModel, config: Config) -> int:
    """Check that the teacher fits the student, and return the size of its features."""
    name, length = config.teacher.model, config.model.text.context_length
    expected = CaptionTokenizer(length)(_PROBES)
    found = model.tokenizer(_PROBES)
    if found.shape != expected.shape or not torch.equal(found.long(), expected):
        raise ValueError(
            f"teacher.model ({name}) must read the student's token ids: it has another tokenizer "
            f"or a context of {found.shape[1]} tokens, and model.text.context_length is {length}"
        )
    embed_dim = model.encode_text(expected[:1]).shape[1]
    wanted = config.model.embed_dim
    if embed_dim != wanted and any(term.kind == "features" for term in config.loss.terms):
        raise ValueError(
            f"teacher.model ({name}) has features of size {embed_dim}, and the loss term features "
            f"needs those of the student, model.embed_dim ({wanted}): use the term similarity"
        )
    return embed_dim


def _logit_scale(model: LoadedModel) -> Tensor:
    """Return the factor [] on the teacher's cosines, in fp32."""
    log_scale: Tensor = model.module.logit_scale  # type: ignore[assignment]
    return bounded_log_scale(log_scale.detach().float()).exp().reshape(())


def _renormalization(model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift [3, 1, 1] from images normalised for the student to images
    normalised for the teacher."""
    preprocess = model.transform.preprocess
    own_mean, own_std, mean, std = (
        torch.tensor(each, device=model.device).view(3, 1, 1)
        for each in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, preprocess.mean, preprocess.std)
    )
    return own_std / std, (own_mean - mean) / std
