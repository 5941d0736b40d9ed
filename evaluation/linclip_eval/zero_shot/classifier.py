"""Zero-shot classifiers: a feature for every class, made by all ranks and kept on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from ds_linclip.process.consensus import agree

__all__ = ["ClassifierCache", "Template", "build_classifier", "parse_template"]

Encoder = Callable[[Tensor], Tensor]
Template = str | Callable[[str], str]
#: Classes that are embedded, gathered and kept as one. Which rank embeds them changes nothing, down
#: to the last bit: a forward never holds prompts of two chunks.
_CLASSES_PER_CHUNK = 64
_PROMPTS_PER_FORWARD = 512


@dataclass(frozen=True)
class ClassifierCache:
    """Where the features of classes are kept, by the hash of all that they depend on.

    Attributes:
        folder: Made when it is not there; several jobs may share it.
        fingerprint: Of model, weights and tokenizer.
    """

    folder: Path
    fingerprint: str

    def path(self, prompts: Sequence[Sequence[str]]) -> Path:
        """File of the features of classes with these prompts."""
        content = json.dumps([self.fingerprint, prompts]).encode()
        return self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"


def parse_template(template: Template) -> Callable[[str], str]:
    """A prompt template as a function of the class name.

    Args:
        template: format string with ``{}`` (open_clip) or ``{c}`` (clip_benchmark) for the name;
            callables are returned as they are.

    Raises:
        ValueError: for a string that is no format string, or has no place for the name.
    """
    if callable(template):
        return template
    text = template
    probe = "name"
    try:
        has_place = text.format(probe, c=probe) != text.format("", c="")
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"template ({text!r}) must be a format string: {error}") from error
    if not has_place:
        raise ValueError(f"template ({text!r}) must hold {{}} or {{c}} for the class name")
    return lambda name: text.format(name, c=name)


def build_classifier(
    encode_text: Encoder,
    texts: Sequence[Sequence[str]],
    templates: Sequence[Template],
    *,
    tokenizer: Callable[[list[str]], Tensor],
    device: torch.device | str,
    group: ProcessGroup | None = None,
    cache: ClassifierCache | None = None,
) -> Tensor:
    """Embed every class as the mean of its prompts, as CLIP does (arXiv 2103.00020, 3.1.4).

    Args:
        encode_text: token ids [B, L] to text features [B, E], normalised or not. With ``group`` it
            must not itself communicate over that group.
        texts: for each of C classes, in the order of their labels, what it is called; each text
            goes into each template.
        templates: see :func:`parse_template`.
        tokenizer: prompts to token ids [B, L].
        device: where token ids go and the result lies.
        group: ranks among which the classes are split; each of them gets the whole result.
        cache: what is in it is not embedded again: a call that was cut off goes on where it was.

    Returns:
        Classifier [E, C], float32, columns of length 1.

    Raises:
        ValueError: for no class, a class without a text, no template, or a template without a place
            for the name.
        OSError: when the cache cannot be written; with ``group``, on all of its ranks.
    """
    if not texts:
        raise ValueError("classes ([]) must hold at least one class")
    if empty := [label for label, names in enumerate(texts) if not any(map(str.strip, names))]:
        raise ValueError(
            f"class {empty[0]} must have a text; {len(empty)} of {len(texts)} have none"
        )
    if not templates:
        raise ValueError("templates ([]) must hold at least one template")
    fill = [parse_template(template) for template in templates]
    rank, world_size = (
        (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    )
    starts = range(0, len(texts), _CLASSES_PER_CHUNK)
    # Every rank does the same number of chunks, the last ones once more, so that no rank is without
    # a feature to gather; the surplus is cut off.
    num_rounds = -(-len(starts) // world_size)

    def embed_share() -> Tensor:
        chunks = []
        for number in tqdm(
            range(num_rounds), "classes", unit="chunk", delay=5, leave=False, disable=rank > 0
        ):
            start = starts[min(number * world_size + rank, len(starts) - 1)]
            names = texts[start : start + _CLASSES_PER_CHUNK]
            prompts = [[make(name) for name in given for make in fill] for given in names]
            features = _embed_or_load(prompts, encode_text, tokenizer, device, cache)
            padding = _CLASSES_PER_CHUNK - len(features)
            chunks.append(F.pad(features, (0, 0, 0, padding)))
        return torch.stack(chunks)  # [rounds, chunk, E]

    share = agree(embed_share, group, errors=(ValueError, OSError)).to(device)
    if group is None:
        return share.flatten(0, 1)[: len(texts)].T.contiguous()  # [E, C]
    shares = [torch.empty_like(share) for _ in range(world_size)]
    dist.all_gather(shares, share, group=group)
    return torch.stack(shares, dim=1).flatten(0, 2)[: len(texts)].T.contiguous()  # [E, C]


def _embed_or_load(
    prompts: list[list[str]],
    encode_text: Encoder,
    tokenizer: Callable[[list[str]], Tensor],
    device: torch.device | str,
    cache: ClassifierCache | None,
) -> Tensor:
    """Features [classes, E] on the CPU of a chunk of classes, each given by its prompts."""
    if cache is None:
        return _embed(prompts, encode_text, tokenizer, device)
    path = cache.path(prompts)
    try:
        return load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):  # not there, or cut off: made again
        features = _embed(prompts, encode_text, tokenizer, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid4().hex}")
    save_file({"features": features}, part)
    part.replace(path)
    return features


@torch.no_grad()
def _embed(
    prompts: list[list[str]],
    encode_text: Encoder,
    tokenizer: Callable[[list[str]], Tensor],
    device: torch.device | str,
) -> Tensor:
    flat = [prompt for of_class in prompts for prompt in of_class]
    features = torch.cat(
        [
            F.normalize(
                encode_text(tokenizer(flat[i : i + _PROMPTS_PER_FORWARD]).to(device)).float(),
                dim=-1,
            )
            for i in range(0, len(flat), _PROMPTS_PER_FORWARD)
        ]
    )
    means = [part.mean(dim=0) for part in features.split([len(of_class) for of_class in prompts])]
    return F.normalize(torch.stack(means), dim=-1).cpu().contiguous()
