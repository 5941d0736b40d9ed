"""Documents for a language model, as bytes: of text files, of captions, or of Python's own manual.

A token is a byte, or the separator at the end of every document, so that the bits of a document are
its exact code length, whatever its language.
"""

import ast
import logging
import random
import re
import sysconfig
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from ds_linclip.config import CacheConfig, NetworkConfig
from ds_linclip.data.captions import MAX_TEXT_BYTES, decode_text
from ds_linclip.data.remote import Storage
from ds_linclip.data.sample_reader import open_shard
from ds_linclip.data.shard_index import Shard, expand
from ds_linclip.data.tally import Tally
from ds_linclip.data.tar_index import BadSample
from ds_linclip.process.text_files import read_text

__all__ = ["SEPARATOR", "VOCABULARY", "Corpus", "pair_bits", "read_corpus"]

logger = logging.getLogger(__name__)

SEPARATOR = 256
VOCABULARY = 257
#: Documents of a text file are its paragraphs, joined up to this many characters.
_MIN_CHARACTERS = 1000


@dataclass(frozen=True)
class Corpus:
    """Documents for training and others for evaluation."""

    training: list[bytes]
    held_out: list[bytes]

    @property
    def stream(self) -> Tensor:
        """The training documents one after the other, each with its separator, int64."""
        return torch.cat([_tokens(document) for document in self.training])

    def windows(self, context: int) -> tuple[Tensor, Tensor]:
        """Cut the held-out documents into sequences that predict every token once.

        A document begins after a separator, and its last target is its own separator. A window
        begins with the last target of the one before.

        Args:
            context: Tokens of a sequence.

        Returns:
            Tokens [S, context + 1] int64, padded with -1, and the number [S] of each one's
            document.
        """
        rows, owners = [], []
        for number, document in enumerate(self.held_out):
            tokens = torch.cat([torch.tensor([SEPARATOR]), _tokens(document)])
            for start in range(0, len(tokens) - 1, context):
                row = torch.full((context + 1,), -1)
                piece = tokens[start : start + context + 1]
                row[: len(piece)] = piece
                rows.append(row)
                owners.append(number)
        return torch.stack(rows), torch.tensor(owners)


def pair_bits(corpus: Corpus) -> list[float]:
    """Return the bits of every held-out document under a table of pairs of tokens, counted in the
    training text with 0.05 added: what a model reaches that sees the last token only."""
    stream = corpus.stream
    pairs = torch.bincount(stream[:-1] * VOCABULARY + stream[1:], minlength=VOCABULARY**2)
    counts = pairs.view(VOCABULARY, VOCABULARY).double() + 0.05
    bits = (counts.sum(dim=1, keepdim=True) / counts).log2()  # [token, next token]
    documents = (
        torch.cat([torch.tensor([SEPARATOR]), _tokens(document)]) for document in corpus.held_out
    )
    return [bits[tokens[:-1], tokens[1:]].sum().item() for tokens in documents]


def read_corpus(sources: Sequence[str], *, held_out_bytes: int) -> Corpus:
    """Read documents and hold some out, in an order that depends on nothing but the documents.

    Args:
        sources: Text files, and tars of image-caption pairs (a pattern as in ``data.train``, whose
            captions are the documents); none: the manual pages and docstrings that come with
            Python, which differ between its versions. There, what was said before is left out,
            paragraph by paragraph, because pages repeat each other.
        held_out_bytes: Whole documents are held out until they have at least this many bytes.

    Raises:
        ValueError: for a source without text, or too little of it.
    """
    texts = [text for source in sources for text in _read(source)] if sources else _python_manual()
    documents = [text.encode() for text in texts]
    random.Random(0).shuffle(documents)
    size = count = 0
    while count < len(documents) and size < held_out_bytes:
        size += len(documents[count])
        count += 1
    total = sum(map(len, documents))
    if count < 2 or total < 2 * size:
        raise ValueError(
            f"text ({total} bytes in {len(documents)} documents) must have two documents or more "
            f"for held_out_bytes ({held_out_bytes}), and as much again for training"
        )
    return Corpus(documents[count:], documents[:count])


def _read(source: str) -> list[str]:
    is_tar = source.endswith(".tar")
    texts = _captions(source) if is_tar else _joined_paragraphs(read_text(Path(source)))
    if not texts:
        raise ValueError(f"text ({source}) must not be empty")
    return texts


def _joined_paragraphs(text: str) -> list[str]:
    documents: list[list[str]] = [[]]
    size = 0
    for paragraph in _paragraphs(text):
        documents[-1].append(paragraph)
        size += len(paragraph)
        if size >= _MIN_CHARACTERS:
            documents.append([])
            size = 0
    return ["\n\n".join(document) for document in documents if document]


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text.replace("\r\n", "\n")) if part.strip()]


def _captions(pattern: str) -> list[str]:
    storage, captions = Storage(CacheConfig(), NetworkConfig()), []
    left_out = Tally()
    for url in expand(pattern, "text"):
        opened, problems = open_shard(Shard(url, 0, exact=False), storage)
        if isinstance(opened, BadSample):
            raise ValueError(f"text ({url}) must be a tar of samples: {opened.cause}")
        for problem in problems:
            left_out.add(problem.cause, problem.url)
        with closing(opened):
            for index in range(len(opened)):
                try:
                    content = opened.read(index, "text", max_bytes=MAX_TEXT_BYTES)
                    captions.append(decode_text(content))
                except BadSample as error:  # training replaces such a sample
                    left_out.add(error.cause, f"{opened.keys[index]} of {url}")
    if left_out:
        logger.warning("text (%s): left out: %s", pattern, left_out)
    return captions


def _python_manual() -> list[str]:
    """Return the pages of ``help()`` and the docstrings of the standard library's modules."""
    pages = [topics[name] for name in sorted(topics)]
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(file.read_bytes()))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
        pages.append("\n\n".join(filter(None, found)))
    said: set[str] = set()
    documents = []
    for page in pages:
        fresh = [part for part in dict.fromkeys(_paragraphs(page)) if part not in said]
        said.update(fresh)
        if fresh:
            documents.append("\n\n".join(fresh))
    return documents


def _tokens(document: bytes) -> Tensor:
    return torch.tensor([*document, SEPARATOR])
