"""ImageNet's class lists, the names that prompts use for their classes, and WordNet's hierarchy.

Classes are WordNet 3.0 synsets ("n02084071"); lists, lemmas and definitions come from timm.
``wordnet_hypernyms.txt`` in the package's folder holds the direct hypernyms ("is a") of every
synset of the lists and of all their ancestors, from WordNet's own data.noun.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, Self, get_args

import open_clip

from ds_linclip.process.text_files import read_list

__all__ = [
    "IMAGENET_LISTS",
    "ClassList",
    "NamePolicy",
    "ancestors",
    "imagenet_classes",
    "is_ancestor",
]

#: Name of a list -> the file of timm with its synsets, in the order of the labels.
IMAGENET_LISTS = {
    "imagenet-22k": "imagenet22k_synsets.txt",  # 21,841: fall11
    "imagenet-21k-goog": "imagenet21k_goog_synsets.txt",  # 21,843
    "imagenet-21k-miil": "imagenet21k_miil_synsets.txt",  # 11,221: ImageNet-21K-P of fall11
    "imagenet-21k-miil-w21": "imagenet21k_miil_w21_synsets.txt",  # 10,450: ImageNet-21K-P, winter21
    "imagenet-12k": "imagenet12k_synsets.txt",  # 11,821
    "imagenet-1k": "imagenet_synsets.txt",
}
NamePolicy = Literal["lemma", "aliases", "definition", "open_clip"]


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Classes in the order of their labels.

    Attributes:
        name: The name of the list.
        ids: A unique id for each class: its synset, or its name.
        texts: The names of each class in prompts; the features of several names are averaged.
        is_wordnet: Whether the ids are synsets.
    """

    name: str
    ids: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    is_wordnet: bool = False

    @classmethod
    def of_names(cls, name: str, names: Sequence[str]) -> Self:
        """Return classes with one name each; the ids of repeated names are numbered."""
        seen: dict[str, int] = {}
        ids = []
        for text in names:
            seen[text] = seen.get(text, 0) + 1
            ids.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
        return cls(name=name, ids=tuple(ids), texts=tuple((text,) for text in names))

    def __len__(self) -> int:
        return len(self.ids)

    def title(self, label: int) -> str:
        """Return the first name of a class."""
        return self.texts[label][0]


def imagenet_classes(name: str, policy: NamePolicy) -> ClassList:
    """Return a class list of ImageNet with the names of its classes.

    Args:
        name: One of ``IMAGENET_LISTS``, or a file with one synset per line.
        policy: "lemma": the first lemma; "aliases": all lemmas; "definition": "lemma, definition";
            "open_clip": open_clip's curated names, for imagenet-1k only.

    Raises:
        ValueError: for an unknown list or policy, a synset that is repeated or not in timm's lists,
            or curated names for another list.
    """
    if policy not in get_args(NamePolicy):
        raise ValueError(f"names ({policy}) must be one of {', '.join(get_args(NamePolicy))}")
    ids = _read_list(name)
    texts: list[tuple[str, ...]]
    if policy == "open_clip":
        if name != "imagenet-1k":
            raise ValueError(f"names (open_clip) exist for imagenet-1k, not for classes ({name})")
        texts = [(text,) for text in open_clip.IMAGENET_CLASSNAMES]
    else:
        lemmas = _table("imagenet_synset_to_lemma.txt")
        definitions = _table("imagenet_synset_to_definition.txt")
        if unknown := [synset for synset in ids if synset not in lemmas]:
            raise ValueError(
                f"classes ({name}): {len(unknown)} of {len(ids)} synsets must be those of "
                f"ImageNet, first {unknown[0]}"
            )
        texts = [_texts(lemmas[synset], definitions[synset], policy) for synset in ids]
    return ClassList(name=name, ids=tuple(ids), texts=tuple(texts), is_wordnet=True)


def is_ancestor(synset: str, of: str) -> bool:
    """Return whether ``synset`` equals ``of`` or is above it in WordNet 3.0."""
    return synset in ancestors(of)


def _texts(lemmas: str, definition: str, policy: NamePolicy) -> tuple[str, ...]:
    names = tuple(lemmas.split(", "))
    if policy == "aliases":
        return names
    return names[:1] if policy == "lemma" else (f"{names[0]}, {definition}",)


def _read_list(name: str) -> list[str]:
    if name in IMAGENET_LISTS:
        return _timm_file(IMAGENET_LISTS[name]).split()
    try:
        ids = read_list(Path(name))
    except ValueError as error:
        known = ", ".join(IMAGENET_LISTS)
        raise ValueError(
            f"classes ({name}) must be one of {known}, or a readable file with one synset per "
            f"line: {error}"
        ) from error
    if repeated := [synset for synset, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"classes ({name}): {repeated[0]} must occur only once")
    return ids


def _timm_file(name: str) -> str:
    return (resources.files("timm.data") / "_info" / name).read_text(encoding="utf-8")


@cache
def _table(name: str) -> Mapping[str, str]:
    lines = (line.split("\t") for line in _timm_file(name).splitlines())
    return dict(lines)


@cache
def _hypernyms() -> Mapping[str, tuple[str, ...]]:
    content = (resources.files("linclip_eval") / "wordnet_hypernyms.txt").read_text("utf-8")
    lines = (line.split() for line in content.splitlines() if not line.startswith("#"))
    return {synset: tuple(above) for synset, *above in lines}


@cache
def ancestors(synset: str) -> frozenset[str]:
    """Return a synset and all that are above it in WordNet 3.0."""
    above = _hypernyms().get(synset, ())
    return frozenset({synset}).union(*(ancestors(parent) for parent in above))
