"""Zero-shot classifiers: the text feature of every class, computed by all ranks and cached."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_linclip.process.consensus import map_over_ranks
from linclip_eval.protocols import Encoder, Tokenizer, unit_features
from linclip_eval.zero_shot.tensor_files import load_tensors, save_tensors

__all__ = ["Template", "build_classifier", "parse_template"]

Template = str | Callable[[str], str]
#: Classes that one rank embeds together and that share a cache file. A forward never holds prompts
#: of two chunks, so which rank embeds a chunk does not change a bit of the result.
_CLASSES_PER_CHUNK = 64
_PROMPTS_PER_FORWARD = 512


def parse_template(template: Template) -> Callable[[str], str]:
    """Return a prompt template as a function of the class name.

    Args:
        template: A format string with ``{}`` (open_clip) or ``{c}`` (clip_benchmark) for the name,
            or a callable, which is returned as it is.

    Raises:
        ValueError: for a string that is not a format string, or has no place for the name.
    """
    if callable(template):
        return template
    text = template
    if text.startswith("lambda "):
        raise ValueError(f"template ({text!r}) must be text, not code of Python")
    probe = "name"
    try:
        has_place = text.format(probe, c=probe) != text.format("", c="")
    except KeyError:  # another name than c
        has_place = False
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
    tokenizer: Tokenizer,
    device: torch.device | str,
    group: ProcessGroup | None = None,
    cache_dir: Path | None = None,
    fingerprint: str = "",
) -> Tensor:
    """Embed every class as the mean of its prompts, as CLIP does (arXiv 2103.00020, 3.1.4).

    Args:
        texts: The names of each of C classes, in the order of their labels; each name goes into
            each template.
        templates: Prompt templates, see :func:`parse_template`.
        device: The device of the model and of the result.
        cache_dir: A folder of class features, from which an interrupted call resumes; several jobs
            may share it. None: nothing is kept.
        fingerprint: A text that identifies model, weights and tokenizer in ``cache_dir``.

    Returns:
        Classifier [E, C], float32, columns of length 1; the same on all ranks.

    Raises:
        ValueError: for no class, a class without a name, no template, a template without a place
            for the name, or, on all ranks, for features that are not finite or a ``cache_dir`` that
            cannot be written on one of them.
    """
    if not texts:
        raise ValueError("classes ([]) must hold at least one class")
    if empty := [label for label, names in enumerate(texts) if not any(map(str.strip, names))]:
        raise ValueError(
            f"class {empty[0]} must have a text; {len(empty)} of {len(texts)} have none"
        )
    if not templates:
        raise ValueError("templates ([]) must hold at least one template")
    make_prompts = [parse_template(template) for template in templates]

    def load_or_embed(classes: Sequence[Sequence[str]]) -> Tensor:
        prompts = [[make(name) for name in names for make in make_prompts] for names in classes]
        if cache_dir is None:
            return _embed(prompts, encode_text, tokenizer, device)
        key = hashlib.sha256(json.dumps([fingerprint, prompts]).encode()).hexdigest()
        path = cache_dir / f"{key}.safetensors"
        kept = load_tensors(path)
        if kept is None:
            kept = {"features": _embed(prompts, encode_text, tokenizer, device)}
            save_tensors(path, kept)
        return kept["features"]

    starts = range(0, len(texts), _CLASSES_PER_CHUNK)
    chunks = [texts[start : start + _CLASSES_PER_CHUNK] for start in starts]
    parts = map_over_ranks(partial(map, load_or_embed), chunks, group, title="chunks of classes")
    return torch.cat(parts).to(device).T.contiguous()  # [E, C]


@torch.no_grad()
def _embed(
    prompts: Sequence[Sequence[str]],
    encode_text: Encoder,
    tokenizer: Tokenizer,
    device: torch.device | str,
) -> Tensor:
    """Return the features [classes, E], on the CPU, of classes given by their prompts."""
    flat = [prompt for class_prompts in prompts for prompt in class_prompts]
    parts = []
    for start in range(0, len(flat), _PROMPTS_PER_FORWARD):
        texts = flat[start : start + _PROMPTS_PER_FORWARD]
        parts.append(unit_features(encode_text(tokenizer(texts).to(device)), texts))
    by_class = torch.cat(parts).split([len(each) for each in prompts])
    means = [features.mean(dim=0) for features in by_class]
    return F.normalize(torch.stack(means), dim=-1).cpu().contiguous()
