"""From the bytes of a caption to token ids: open_clip's, in training and evaluation alike."""

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from open_clip import SimpleTokenizer
from open_clip.tokenizer import get_clean_fn

from ds_linclip.data.tar_index import BadSample

__all__ = ["MAX_TEXT_BYTES", "CaptionTokenizer", "clean_text", "decode_text"]

MAX_TEXT_BYTES = 64 * 2**10
_MAX_CACHED_WORDS = 200_000
_MAX_CACHED_LETTERS = 128  # open_clip's time for a word is quadratic in its length

#: open_clip's cleaning: mojibake and HTML entities decoded, white space joined, lower case.
clean_text = cast(Callable[[str], str], get_clean_fn("lower"))


def decode_text(content: bytes) -> str:
    """Decode a caption and leave it as it is: the tokenizer cleans it, as open_clip does.

    Raises:
        BadSample: ``text_not_utf8``; ``text_empty`` when cleaning leaves nothing of it;
            ``text_undecodable`` when it cannot be cleaned.
    """
    try:
        caption = content.decode("utf-8")
        is_empty = not clean_text(caption)
    except UnicodeDecodeError as error:
        raise BadSample("text_not_utf8") from error
    except ValueError as error:  # an HTML entity with thousands of digits
        raise BadSample("text_undecodable") from error
    if is_empty:
        raise BadSample("text_empty")
    return caption


class CaptionTokenizer(SimpleTokenizer):
    """open_clip's tokenizer, the same ids in bounded time and memory."""

    cache: dict[str, str]

    def __init__(self, context_length: int) -> None:
        super().__init__(context_length=context_length)
        self._special_tokens = dict(self.cache)

    def bpe(self, token: str) -> str:
        """Return the subwords of a word, separated by spaces."""
        if len(token) > _MAX_CACHED_LETTERS:
            return " ".join(_subwords(token, self.bpe_ranks))
        if len(self.cache) > _MAX_CACHED_WORDS:  # it caches every word
            self.cache = dict(self._special_tokens)
        return cast(str, super().bpe(token))


def _subwords(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge the letters of a word as ``SimpleTokenizer.bpe`` does, in n log n steps.

    The pair of lowest rank is merged everywhere, from left to right, then pairs are ranked again.
    """
    parts: list[str | None] = [*word[:-1], word[-1] + "</w>"]  # None: merged into one before it
    before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    waiting: list[tuple[int, int]] = []

    def rank(i: int) -> int | None:
        first, second = parts[i], parts[after[i]] if after[i] < len(parts) else None
        return None if first is None or second is None else ranks.get((first, second))

    def wait(places: Iterable[int]) -> None:
        for i in places:
            if i >= 0 and (found := rank(i)) is not None:
                heapq.heappush(waiting, (found, i))

    wait(range(len(parts)))
    while waiting:
        lowest, changed = waiting[0][0], set()
        while waiting and waiting[0][0] == lowest:
            _, i = heapq.heappop(waiting)
            if rank(i) != lowest:
                continue  # it has changed since
            parts[i], parts[after[i]] = f"{parts[i]}{parts[after[i]]}", None
            after[i] = after[after[i]]
            if after[i] < len(parts):
                before[after[i]] = i
            changed |= {before[i], i}
        wait(changed)
    return [part for part in parts if part is not None]
