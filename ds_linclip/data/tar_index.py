"""Index of the samples in a tar: which members belong to a sample, then one read per member."""

import os
import re
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from ds_linclip.data.causes import format_cause
from ds_linclip.data.tally import Tally
from ds_linclip.data.tar_members import BrokenTarError, tar_members

__all__ = ["IMAGE_SUFFIXES", "SYSTEM_FOLDERS", "BadSample", "OpenShard", "Role"]

#: What a member is in its sample: one of ``_ROLES``, or the name of a further member.
Role = str

#: Ends of the names of images, in tars and in folders.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
#: Folders that systems and programs put beside a user's.
SYSTEM_FOLDERS = ("__MACOSX", ".AppleDouble", "@eaDir")
_ROLES = ("image", "text", "class", "meta")
_IMAGE, _TEXT, _CLASS, _META = range(len(_ROLES))
_ROLE_OF_EXTENSION = {suffix[1:]: _IMAGE for suffix in IMAGE_SUFFIXES}
_ROLE_OF_EXTENSION |= {"txt": _TEXT, "cls": _CLASS, "json": _META}

_NOWHERE, _APART = (-1, 0), (-2, 0)  # instead of the offset and size of a member
# Files that systems and programs put beside a user's.
_HIDDEN = re.compile(
    rf"(?:^|/)(?:\.[^/]*$|(?:{'|'.join(map(re.escape, SYSTEM_FOLDERS))}|PaxHeaders(?:\.\d+)?)/)"
)
_MAX_EXTENSIONS = 8  # after a key; a hostile name has thousands of dots


class BadSample(Exception):
    """A sample that cannot be used.

    Attributes:
        cause: Short name for the counts; :func:`~ds_linclip.data.causes.explain` has the meaning.
        whole_shard: Whether the other samples of the shard are bad too.
        passed_over: Of a whole shard, the members that are never read.
    """

    def __init__(
        self, cause: str, *, whole_shard: bool = False, passed_over: Tally | None = None
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.whole_shard = whole_shard
        self.passed_over = passed_over or Tally()


class OpenShard:
    """An open tar with an index of its samples.

    A sample is a sequence of members with one key: the file name without its known extension, which
    may contain dots. Names that extend the key (``0.seg.png`` beside ``0.jpg``) are members of the
    same sample and never read, unless they form an image with a text or class of its own. Of two
    images of a sample the first one counts. A name that comes twice begins another sample.

    Args:
        file: A tar on a local file system; this object takes ownership.
        url: Name of the tar in messages.
        members: Further members, in lower case: what follows the key in their names, such as
            ``syn.txt``. Each is a role by its own name.

    Attributes:
        keys: Key of every sample.
        repeated_keys: Number of samples with a key that came before.
        cut: Whether the tar is broken or ends within a member. The samples before are usable.
        passed_over: Members that are never read: ``member_hidden`` (a name that begins with a dot,
            or in a folder such as ``__MACOSX``), ``member_extension`` (unknown), ``member_surplus``
            (a second image, or a name that extends the key), ``member_link``, ``member_special``.

    Raises:
        BadSample: when there is no sample in it: ``shard_unreadable``, ``shard_empty``, or the name
            of another format, such as ``shard_gzip``.
        OSError: when the file system fails, which says nothing about the shard.
    """

    def __init__(self, file: BinaryIO, url: str, members: Sequence[str] = ()) -> None:
        self.url = url
        self._file = file
        self._end = os.fstat(file.fileno()).st_size
        self._roles = (*_ROLES, *members)
        found = _SampleFinder(members)
        try:
            self.cut = self._scan(found)
            samples = found.finish()
            if not samples:
                raise BadSample(self._cause(), whole_shard=True, passed_over=found.passed_over)
        except (OSError, BadSample):
            file.close()
            raise
        self.passed_over = found.passed_over
        self.keys = [sample.key for sample in samples]
        self._places = np.array([sample.places for sample in samples], dtype=np.int64)
        self.repeated_keys = len(self.keys) - len(set(self.keys))

    def _scan(self, found: "_SampleFinder") -> bool:
        """Find all samples and return whether the tar is cut."""
        end = 0
        try:
            for name, offset, size, kind in tar_members(self._file, self._end):
                end = offset + size
                if kind == "file":
                    found.add(name, (offset, size))
                else:
                    found.passed_over.add(f"member_{kind}", name)
        except BrokenTarError:
            return True
        return end > self._end

    def _cause(self) -> str:
        """Return why there is no sample."""
        if not self.cut and self._end > 0:
            return "shard_empty"
        return format_cause(os.pread(self._file.fileno(), 512, 0)) or "shard_unreadable"

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, index: int, role: Role, *, max_bytes: int) -> tuple[int, int]:
        """Return offset and size in bytes of one member of a sample, without reading it.

        Raises:
            BadSample: ``shard_short`` (no such sample), ``<role>_missing``, ``members_apart`` (it
                stands elsewhere in the tar) or ``<role>_too_many_bytes``; the role of a further
                member is named ``json`` or ``text``.
        """
        if index >= len(self.keys):
            raise BadSample("shard_short")
        offset, size = self._places[index, self._roles.index(role)].tolist()
        if offset < 0:
            is_apart = offset == _APART[0]
            raise BadSample("members_apart" if is_apart else f"{_noun(role)}_missing")
        if size > max_bytes:
            raise BadSample(f"{_noun(role)}_too_many_bytes")
        return offset, size

    def read(self, index: int, role: Role, *, max_bytes: int) -> bytes:
        """Read one member of the sample at ``index``.

        Raises:
            BadSample: as :meth:`find`, or ``<role>_cut``.
        """
        offset, size = self.find(index, role, max_bytes=max_bytes)
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) < size:
            raise BadSample(f"{_noun(role)}_cut")
        return content

    def close(self) -> None:
        self._file.close()


def _noun(role: Role) -> str:
    """Return a role as causes name it."""
    if role in _ROLES:
        return role
    return "json" if role.endswith("json") else "text"


class _Found:
    """A sample, or a part of one: names and places of its members by role."""

    __slots__ = ("key", "names", "places")

    def __init__(self, key: str, num_roles: int) -> None:
        self.key = key
        self.names: list[str | None] = [None] * num_roles
        self.places = [_NOWHERE] * num_roles

    @property
    def is_complete(self) -> bool:
        """Whether it could be used by itself."""
        (image, _), (text, _), (label, _), _, *further = self.places
        return image >= 0 and (text >= 0 or label >= 0 or any(at >= 0 for at, _ in further))

    def join(self, other: "_Found") -> None:
        """Add members that stand elsewhere in the tar, which are not read."""
        main, rest = (other, self) if other.is_complete else (self, other)
        self.places = [
            _APART if place == _NOWHERE != elsewhere else place
            for place, elsewhere in zip(main.places, rest.places, strict=True)
        ]
        self.names = [mine or theirs for mine, theirs in zip(self.names, other.names, strict=True)]


class _SampleFinder:
    """Forms samples of the files of a tar, which come in their order."""

    def __init__(self, members: Sequence[str]) -> None:
        self.passed_over = Tally()
        # The longest first: "syn.txt" before "txt".
        self._ends = {f".{each}": len(_ROLES) + i for i, each in enumerate(members)}
        self._ends = dict(sorted(self._ends.items(), key=lambda item: -len(item[0])))
        self._num_roles = len(_ROLES) + len(members)
        self._samples: list[_Found] = []
        # The samples that the next member may belong to. The key of each extends the one before.
        self._open: list[_Found] = []

    def add(self, name: str, place: tuple[int, int]) -> None:
        key, role = self._split(name)
        is_next = bool(self._open) and self._open[-1].key == key  # most often, hence tried first
        if not is_next and _HIDDEN.search(name):
            self.passed_over.add("member_hidden", name)
            return
        if role is None:
            self.passed_over.add("member_extension", name)
            return
        sample = self._open[-1] if is_next else self._sample_of(key)
        if sample.names[role] == name:
            self._open.pop()
            sample = self._begin(key)
        elif sample.names[role] is not None:
            self.passed_over.add("member_surplus", name)
            return
        sample.names[role], sample.places[role] = name, place

    def _split(self, name: str) -> tuple[str, int | None]:
        """Return the key and the role of a file by its name; None: it is never read."""
        if self._ends and (lower := name.lower()).endswith(tuple(self._ends)):
            end = next(filter(lower.endswith, self._ends))
            return name[: -len(end)], self._ends[end]
        key, _, extension = name.rpartition(".")
        return key, _ROLE_OF_EXTENSION.get(extension.lower())

    def _sample_of(self, key: str) -> _Found:
        """Return an open sample with this key, or a new one."""
        while self._open and not key.startswith(f"{self._open[-1].key}."):
            if self._open[-1].key == key:
                return self._open[-1]
            self._open.pop()
        return self._begin(key)

    def _begin(self, key: str) -> _Found:
        sample = _Found(key, self._num_roles)
        self._samples.append(sample)
        self._open.append(sample)
        return sample

    def finish(self) -> list[_Found]:
        """Return the samples in the order of their first members."""
        keys = {sample.key for sample in self._samples}
        last: dict[str, _Found] = {}
        samples = []
        for sample in self._samples:
            earlier = last.get(sample.key)
            if not sample.is_complete and _extends_any(sample.key, keys):
                for name in filter(None, (*sample.names[:_META], *sample.names[_META + 1 :])):
                    self.passed_over.add("member_surplus", name)
            elif earlier is None or any(map(_both, earlier.names, sample.names)):
                samples.append(sample)
                last[sample.key] = sample
            else:
                earlier.join(sample)
        return samples


def _both(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None


def _extends_any(key: str, keys: set[str]) -> bool:
    """Whether a key is another one with extensions: ``folder/0.seg`` is ``folder/0`` with one."""
    start = key.rfind("/") + 1
    for _ in range(_MAX_EXTENSIONS):
        key = key.rpartition(".")[0]
        if len(key) <= start:
            return False
        if key in keys:
            return True
    return False
