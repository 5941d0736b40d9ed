"""The files of a checkpoint: one safetensors file per rank, and a manifest that lists them all.

Nothing in them is ever unpickled. A rank's file holds flat pieces of parameters, as ``kind/name``;
the manifest says where in the parameters they belong, so that any layout finds what it needs.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = [
    "FileFacts",
    "PieceFacts",
    "ShardFiles",
    "TensorFacts",
    "sha256_of",
    "sync_directory",
    "write_shard",
    "write_tensors",
]

MANIFEST = "manifest.json"
#: Names of the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
#: Bytes that are hashed and written at once.
_CHUNK = 2**24


@dataclass(frozen=True)
class FileFacts:
    """What a file must be."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorFacts:
    """What a tensor in a file is, before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PieceFacts:
    """Where a piece belongs that a rank has saved."""

    name: str
    #: Of the parameter on the rank that saved it, and the dimension that tensor parallelism split.
    shape: Sequence[int]
    split_dim: int | None
    tp_rank: int
    start: int
    numel: int
    #: "weight" and the names of the optimizer's state.
    kinds: Sequence[str]
    file: str


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileFacts:
    """Write CPU tensors as a safetensors file; see :func:`write_tensors`."""
    layout = {name: TensorFacts(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return write_tensors(path, layout, tensors.values())


def write_tensors(
    path: Path, layout: Mapping[str, TensorFacts], tensors: Iterable[Tensor]
) -> FileFacts:
    """Write a safetensors file tensor by tensor, hash it on the way, and wait for the disk.

    ``safetensors.torch.save_file`` would hold every byte of all of them, twice.

    Args:
        path: The file.
        layout: What every tensor will be, in the order of the file.
        tensors: On the CPU, in that order; each is let go before the next one is asked for.

    Raises:
        OSError: when the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, facts in layout.items():
        start, end = end, end + facts.num_bytes
        header[name] = {
            "dtype": _DTYPES[facts.dtype],
            "shape": list(facts.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, coming = hashlib.sha256(), iter(tensors)
    try:
        with path.open("wb") as file:
            _append(file, digest, len(text).to_bytes(8, "little") + text)
            for facts in layout.values():
                _append(file, digest, _bytes(next(coming), facts))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk has no name
    return FileFacts(size, digest.hexdigest())


class ShardFiles:
    """A committed checkpoint, read piece by piece.

    Args:
        path: Its folder.
        manifest: What its manifest holds, if that was read already.

    Raises:
        ValueError: when the manifest cannot be read, or is of another format.
    """

    FORMAT = 2

    def __init__(self, path: Path, manifest: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.manifest = read_manifest(path) if manifest is None else manifest
        self._pieces: dict[str, list[PieceFacts]] = {}
        try:
            self.tp_size: int = self.manifest["layout"]["tp"]
            for entry in self.manifest["pieces"]:
                piece = PieceFacts(**entry)
                self._pieces.setdefault(piece.name, []).append(piece)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / MANIFEST} is damaged: {error!r}") from error
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Parameters of the whole model."""
        return list(self._pieces)

    def kinds(self, name: str) -> Sequence[str]:
        """What was saved of a parameter: "weight" and, where it is trained, optimizer state."""
        return self._pieces[name][0].kinds

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter."""
        first = self._pieces[name][0]
        shape = list(first.shape)
        if first.split_dim is not None:
            shape[first.split_dim] *= self.tp_size
        return tuple(shape)

    @property
    def file_names(self) -> list[str]:
        """Files that hold the parameters."""
        return sorted({piece.file for pieces in self._pieces.values() for piece in pieces})

    def read(
        self, name: str, kind: str, *, tp_rank: int, tp_size: int, start: int, numel: int
    ) -> Tensor:
        """Consecutive elements [numel] of what a tensor-parallel rank holds of a parameter.

        Raises:
            ValueError: when the checkpoint lacks some of them.
        """
        split_dim = self._pieces[name][0].split_dim
        if split_dim is None or tp_size == self.tp_size:
            return self._stored(name, kind, 0 if split_dim is None else tp_rank, start, numel)
        mine = self.full(name, kind).chunk(tp_size, split_dim)[tp_rank]
        return mine.reshape(-1)[start : start + numel]

    def full(self, name: str, kind: str) -> Tensor:
        """The whole parameter, or what the optimizer keeps for it, in its shape."""
        first = self._pieces[name][0]
        ranks = range(1 if first.split_dim is None else self.tp_size)
        numel = math.prod(first.shape)
        parts = [self._stored(name, kind, r, 0, numel).view(*first.shape) for r in ranks]
        return parts[0] if first.split_dim is None else torch.cat(parts, first.split_dim)

    def tensor(self, file: str, name: str) -> Tensor | None:
        """Another tensor of a rank's file, if file and tensor are there."""
        if file not in self.manifest["files"] or name not in self._file(file).keys():  # noqa: SIM118
            return None
        return self._file(file).get_tensor(name)

    def _stored(self, name: str, kind: str, tp_rank: int, start: int, numel: int) -> Tensor:
        """Put together from pieces of one tensor-parallel rank, whoever saved them."""
        result: Tensor | None = None
        missing = numel
        for piece in self._pieces[name]:
            begin = max(start, piece.start)
            end = min(start + numel, piece.start + piece.numel)
            if piece.tp_rank != tp_rank or begin >= end:
                continue
            stored = self._file(piece.file).get_slice(f"{kind}/{name}")
            part = stored[begin - piece.start : end - piece.start]
            if len(part) == numel:
                return part
            if result is None:
                result = part.new_empty(numel)
            result[begin - start : end - start] = part
            missing -= end - begin
        if result is None or missing:
            raise ValueError(f"checkpoint ({self.path}) lacks {missing} elements of {kind}/{name}")
        return result

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: when it cannot be read, or is of another format.
    """
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{manifest} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{manifest} cannot be read: it holds no JSON object")
    found = content.get("format", "none")
    if found != ShardFiles.FORMAT:
        raise ValueError(
            f"{manifest}: format ({found}) must be {ShardFiles.FORMAT}: another version of "
            "ds_linclip has written it, and that version reads it"
        )
    if content.pop("sha256", None) != _digest_of(content):
        raise ValueError(f"{manifest} does not match its checksum")
    return content


def write_manifest(path: Path, content: Mapping[str, Any], pieces: Sequence[PieceFacts]) -> None:
    """Write the manifest that makes a folder complete.

    Raises:
        OSError: when it cannot be written.
    """
    whole = {"format": ShardFiles.FORMAT, **content, "pieces": [asdict(p) for p in pieces]}
    write_synced(path / MANIFEST, json.dumps({**whole, "sha256": _digest_of(whole)}))


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a folder have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, on_read: Callable[[int], object] | None = None) -> str | None:
    """Hash of a file; None when it cannot be read.

    Args:
        path: The file.
        on_read: Told the number of bytes after every part that was read.
    """
    digest, part = hashlib.sha256(), bytearray(2**20)
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(part):
                digest.update(memoryview(part)[:size])
                if on_read is not None:
                    on_read(size)
    except OSError:
        return None
    return digest.hexdigest()


def _append(file: BinaryIO, digest: Any, content: bytes | memoryview) -> None:
    for begin in range(0, len(content), _CHUNK):
        chunk = content[begin : begin + _CHUNK]
        digest.update(chunk)
        file.write(chunk)


def _bytes(tensor: Tensor, facts: TensorFacts) -> bytes | memoryview:
    assert (tensor.dtype, tuple(tensor.shape)) == (facts.dtype, facts.shape)
    if not tensor.numel():
        return b""
    content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(content)
