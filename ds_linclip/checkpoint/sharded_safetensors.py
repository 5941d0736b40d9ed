"""The files of a checkpoint: one safetensors file per rank, and a manifest that lists them all.

Nothing is pickled. A rank's file holds flat pieces of parameters, named ``kind/parameter``; the
manifest says where in the parameters they belong, so that any layout finds what it needs.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from ds_linclip.process.atomic import sync, write_atomically

__all__ = [
    "CheckpointReader",
    "FileRecord",
    "StoredPiece",
    "TensorSpec",
    "sha256_of",
    "write_shard",
    "write_tensors",
]

MANIFEST = "manifest.json"
#: Names of dtypes in the safetensors format.
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


#: Size in bytes and "sha256" of a file, as the manifest states them.
FileRecord = dict[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredPiece:
    """Consecutive elements of a parameter that a rank has saved, as the manifest describes them."""

    name: str  #: The parameter's name in the whole model.
    shape: Sequence[int]  #: Its shape on the rank that saved it, before ZeRO divided it.
    split_dim: int | None  #: The dimension that tensor parallelism split, if any.
    tp_rank: int  #: The tensor-parallel rank that saved it; 0 for an unsplit parameter.
    start: int  #: First element in the flattened parameter of that shape.
    numel: int
    kinds: Sequence[str]  #: "weight" and the names of the optimizer's state.
    file: str


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write CPU tensors as a safetensors file; see :func:`write_tensors`."""
    layout = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return write_tensors(path, layout, tensors.values())


def write_tensors(
    path: Path, layout: Mapping[str, TensorSpec], tensors: Iterable[Tensor]
) -> FileRecord:
    """Write a safetensors file tensor by tensor, hash it on the way, and wait for the disk.

    ``safetensors.torch.save_file`` would hold all tensors in memory, twice.

    Args:
        path: The file.
        layout: The tensors by name, in the order of the file.
        tensors: The tensors on the CPU, in that order; each is freed before the next is requested.

    Raises:
        OSError: when the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in layout.items():
        start, end = end, end + spec.num_bytes
        header[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, remaining = hashlib.sha256(), iter(tensors)
    try:
        with path.open("wb") as file:
            _append(file, digest, len(text).to_bytes(8, "little") + text)
            for spec in layout.values():
                _append(file, digest, _bytes(next(remaining), spec))
            size = file.tell()
        sync(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # The error of a full disk does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    return {"size": size, "sha256": digest.hexdigest()}


class CheckpointReader:
    """A committed checkpoint, read piece by piece.

    Args:
        path: The folder of the checkpoint.
        manifest: The result of :func:`read_manifest`, if there is one already.

    Raises:
        ValueError: when the manifest cannot be read, or is of another format.
    """

    FORMAT = 2

    def __init__(self, path: Path, manifest: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.manifest = read_manifest(path) if manifest is None else manifest
        self._pieces: dict[str, list[StoredPiece]] = {}
        try:
            self.tp_size: int = self.manifest["layout"]["tp"]
            for entry in self.manifest["pieces"]:
                piece = StoredPiece(**entry)
                self._pieces.setdefault(piece.name, []).append(piece)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / MANIFEST} is damaged: {error!r}") from error
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """The names of the whole model's parameters."""
        return list(self._pieces)

    def kinds(self, name: str) -> Sequence[str]:
        """Return what was saved of a parameter: "weight" and, if trained, optimizer state."""
        return self._pieces[name][0].kinds

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole parameter."""
        first = self._pieces[name][0]
        shape = list(first.shape)
        if first.split_dim is not None:
            shape[first.split_dim] *= self.tp_size
        return tuple(shape)

    @property
    def file_names(self) -> list[str]:
        """The names of the files that hold the parameters."""
        return sorted({piece.file for pieces in self._pieces.values() for piece in pieces})

    def tensors(self, file_name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield what one of :attr:`file_names` holds, as ``kind/parameter`` and its piece."""
        file = self._file(file_name)
        for key in file.keys():  # noqa: SIM118 - not a mapping
            yield key, file.get_tensor(key)

    def read(
        self, name: str, kind: str, *, tp_rank: int, tp_size: int, start: int, numel: int
    ) -> Tensor:
        """Return consecutive elements [numel] of a parameter or one kind of its optimizer state.

        Args:
            name: The parameter's name.
            kind: One of :meth:`kinds`.
            tp_rank: The tensor-parallel rank that needs them.
            tp_size: The number of tensor-parallel ranks of the layout that loads.
            start: First element in what that rank holds of the flattened parameter.
            numel: Number of elements.

        Raises:
            ValueError: when the checkpoint lacks some of them.
        """
        split_dim = self._pieces[name][0].split_dim
        if split_dim is None or tp_size == self.tp_size:
            return self._stored(name, kind, 0 if split_dim is None else tp_rank, start, numel)
        mine = self.full(name, kind).chunk(tp_size, split_dim)[tp_rank]
        return mine.reshape(-1)[start : start + numel]

    def full(self, name: str, kind: str) -> Tensor:
        """Return a whole parameter, or one kind of its optimizer state, in its shape."""
        first = self._pieces[name][0]
        ranks = range(1 if first.split_dim is None else self.tp_size)
        numel = math.prod(first.shape)
        parts = [self._stored(name, kind, r, 0, numel).view(*first.shape) for r in ranks]
        return parts[0] if first.split_dim is None else torch.cat(parts, first.split_dim)

    def _stored(self, name: str, kind: str, tp_rank: int, start: int, numel: int) -> Tensor:
        """Assemble elements from the pieces of one tensor-parallel rank, whichever rank saved
        them."""
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
    """Return the content of a checkpoint's manifest.

    Raises:
        ValueError: when it cannot be read, is damaged, or is of another format.
    """
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{manifest} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{manifest} cannot be read: it holds no JSON object")
    found = content.get("format", "none")
    if found != CheckpointReader.FORMAT:
        raise ValueError(
            f"{manifest}: format ({found}) must be {CheckpointReader.FORMAT}: another version of "
            "ds_linclip has written it, and that version reads it"
        )
    if content.pop("sha256", None) != _digest_of(content):
        raise ValueError(f"{manifest} does not match its checksum")
    return content


def write_manifest(path: Path, content: Mapping[str, Any], pieces: Sequence[StoredPiece]) -> None:
    """Write the manifest and wait until all names in the folder are on the disk.

    Raises:
        OSError: when it cannot be written.
    """
    whole = {"format": CheckpointReader.FORMAT, **content, "pieces": [asdict(p) for p in pieces]}
    text = json.dumps({**whole, "sha256": _digest_of(whole)})
    write_atomically(path / MANIFEST, text, durable=True)


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sha256_of(path: Path, on_read: Callable[[int], object] | None = None) -> str | None:
    """Return the hash of a file, None when it cannot be read; ``on_read`` gets the number of bytes
    after every part that was read."""
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


def _bytes(tensor: Tensor, spec: TensorSpec) -> bytes | memoryview:
    assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
    if not tensor.numel():
        return b""
    content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(content)
