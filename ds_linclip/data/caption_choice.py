"""Choose one of a sample's captions: by the weights of ``data.captions``, again in every epoch."""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_linclip.config import CaptionSource
from ds_linclip.data.captions import MAX_TEXT_BYTES, decode_text
from ds_linclip.data.tar_index import BadSample, OpenShard

__all__ = ["MAX_JSON_BYTES", "Caption", "CaptionChoice"]

MAX_JSON_BYTES = 2**20
_TRIES = 64  # captions of one source; a hostile list has a million empty ones

_TEXT, _META = "txt", "json"  # members that every sample may have
_NAME = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
#: What is wrong with a whole shard or with a place in it, whichever caption is wanted.
_OF_THE_SAMPLE = ("shard_short",)


@dataclass(frozen=True)
class Caption:
    """A caption that was chosen.

    Attributes:
        text: The caption, as it goes to the tokenizer.
        passed_over: Captions that were drawn before it and cannot be used, as
            ``<member>[.<entry>]/<cause>``.
    """

    text: str
    passed_over: tuple[str, ...] = ()


class CaptionChoice:
    """Draws the caption of a sample.

    A source is drawn by its weight, then one of its captions with equal probability. What cannot
    be used is left out and the rest is drawn from again, so the others keep the ratios of their
    probabilities. The draw depends on the seed and the position only, hence differs between epochs
    and not between ranks or workers.

    Args:
        sources: ``data.captions``; empty: the member ``txt``.
        seed: Seed of all draws.

    Attributes:
        members: Members that shards must be opened with, beside ``txt``.
    """

    def __init__(self, sources: Sequence[CaptionSource], *, seed: int) -> None:
        self._sources = [_Reader(source) for source in sources or [CaptionSource()]]
        self._seed = seed
        needed = [name for source in self._sources for name in source.members]
        self.members = tuple(dict.fromkeys(name for name in needed if name != _TEXT))

    def __call__(self, shard: OpenShard, index: int, position: int) -> Caption:
        """Return the caption of the sample at ``index`` for one position in the order.

        Raises:
            BadSample: when no source has a usable caption: the cause of the first one; or
                ``shard_short``.
            OSError: when the file system fails.
        """
        # Another stream than that of the crops, whose seeds are below 2**127.
        rng = random.Random((1 << 128) + (self._seed << 64) + position)
        left, failed = list(range(len(self._sources))), {}
        passed_over: list[str] = []
        documents: dict[str, Any] = {}
        while left:
            number = _draw(left, [self._sources[i].weight for i in left], rng)
            left.remove(number)
            source = self._sources[number]
            try:
                found, bad = source.choose(shard, index, rng, documents)
            except BadSample as error:
                if error.cause in _OF_THE_SAMPLE:
                    raise
                failed[number] = error.cause
                passed_over.append(f"{source.name}/{error.cause}")
                continue
            passed_over += [f"{source.name}/{cause}" for cause in bad]
            return Caption(found, tuple(passed_over))
        raise BadSample(failed[0])


class _Reader:
    """Reads the captions of one source."""

    def __init__(self, source: CaptionSource) -> None:
        self.weight = source.weight
        self.name = source.member + (f".{source.field}" if source.field else "")
        self._member, self._template = source.member.lower(), source.template
        self._path = source.field.split(".") if source.field else []
        names = {match[1] for match in _NAME.finditer(source.template) if match[1] is not None}
        self._has_caption = "caption" in names
        self._is_json = self._member.endswith(_META)
        #: The member that has the other names of the template.
        self._facts = (self._member if self._is_json else _META) if names - {"caption"} else None
        self.members = [self._member, *([self._facts] if self._facts else [])]

    def choose(
        self, shard: OpenShard, index: int, rng: random.Random, documents: dict[str, Any]
    ) -> tuple[str, list[str]]:
        """Return a usable caption, and the causes of those that were drawn before it."""
        captions = self._captions(shard, index, documents)
        facts = _document(shard, index, self._facts, documents) if self._facts else None
        causes: list[str] = []
        while captions and len(causes) < _TRIES:
            drawn_at = _draw_index(len(captions), rng)
            captions[drawn_at], captions[-1] = captions[-1], captions[drawn_at]
            drawn = captions.pop()
            try:
                return _checked(self._fill(drawn, facts)), causes
            except BadSample as error:
                causes.append(error.cause)
        raise BadSample(causes[0])

    def _captions(self, shard: OpenShard, index: int, documents: dict[str, Any]) -> list[Any]:
        """Return what may be the caption, at least one."""
        if not self._has_caption:
            return [""]
        if self._is_json:
            return _entries(_document(shard, index, self._member, documents), self._path)
        role = "text" if self._member == _TEXT else self._member
        content = shard.read(index, role, max_bytes=MAX_TEXT_BYTES)
        return [content if self._template == "{caption}" else decode_text(content)]

    def _fill(self, caption: Any, facts: Any) -> bytes:
        """Return the text of the template with its names replaced, in UTF-8."""
        if isinstance(caption, bytes):
            return caption
        if not isinstance(caption, str):
            raise BadSample("json_entry_no_text")

        def value(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            return caption if match[1] == "caption" else _text(_only(facts, match[1]))

        try:
            return _NAME.sub(value, self._template).encode()
        except UnicodeEncodeError as error:  # half of a pair, as in "\\ud83d"
            raise BadSample("text_not_utf8") from error


def _draw(left: Sequence[int], weights: Sequence[float], rng: random.Random) -> int:
    """Return one of ``left`` by the weights; a single one costs no random number."""
    if len(left) == 1:
        return left[0]
    point = rng.random() * math.fsum(weights)
    for each, weight in zip(left, weights, strict=True):
        point -= weight
        if point < 0:
            return each
    return left[-1]


def _draw_index(count: int, rng: random.Random) -> int:
    # Only random() gives the same numbers in every version of Python.
    return int(rng.random() * count) if count > 1 else 0


def _document(shard: OpenShard, index: int, member: str, documents: dict[str, Any]) -> Any:
    """Return a member's JSON, which is read once per sample."""
    if member not in documents:
        content = shard.read(index, member, max_bytes=MAX_JSON_BYTES)
        try:
            documents[member] = json.loads(content)
        except (ValueError, RecursionError) as error:  # also integers of thousands of digits
            raise BadSample("json_undecodable") from error
    return documents[member]


def _entries(document: Any, path: Sequence[str]) -> list[Any]:
    """Return the values at the end of a path, of all elements of the lists on it."""
    found = [document]
    for part in [*path, None]:
        found = [item for each in found for item in (each if isinstance(each, list) else [each])]
        if part is not None:
            found = [each[part] for each in found if isinstance(each, dict) and part in each]
    found = [each for each in found if each is not None]
    if not found:
        raise BadSample("json_entry_missing")
    return found


def _only(document: Any, path: str) -> Any:
    found = _entries(document, path.split("."))
    if len(found) > 1:
        raise BadSample("json_entry_no_text")
    return found[0]


def _text(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadSample("json_entry_no_text")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadSample("json_entry_no_text")
    return str(value)


def _checked(content: bytes) -> str:
    if len(content) > MAX_TEXT_BYTES:
        raise BadSample("text_too_many_bytes")
    return decode_text(content)
