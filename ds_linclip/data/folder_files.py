"""The files below a folder of a user: links followed, what systems put there passed over."""

import os
from collections.abc import Iterator
from pathlib import Path

from ds_linclip.data.tally import Tally
from ds_linclip.data.tar_index import SYSTEM_FOLDERS

__all__ = ["files_below", "is_hidden"]


def is_hidden(name: str) -> bool:
    """Return whether a name is that of a file or folder of a system or program, not of the user."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def files_below(folder: Path, passed_over: Tally) -> Iterator[tuple[str, bool]]:
    """Yield relative paths, and whether they are files: a link may be broken.

    Links to folders are followed after all folders that are not below a link. Passed over are
    hidden files and folders, folders that were read before, and links to a folder that holds them.

    Raises:
        OSError: when a folder cannot be listed.
    """
    whole, read = Path(os.path.realpath(folder)), set[Path]()
    links = [""]
    for link in links:  # grows
        folders = [link]
        while folders:
            parent = folders.pop()
            place = Path(os.path.realpath(folder / parent))
            if place in read:
                passed_over.add("folder_read_before", parent)
                continue
            read.add(place)
            with os.scandir(folder / parent) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            for entry in found:
                path = os.path.join(parent, entry.name)
                # A file system tells what is no link without being asked again.
                is_folder = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
                if is_hidden(entry.name):
                    passed_over.add("hidden_folder" if is_folder else "dot_file", path)
                elif not is_folder:
                    yield path, entry.is_file(follow_symlinks=False) or os.path.isfile(entry)
                elif not entry.is_symlink():
                    folders.append(path)
                elif any(each.is_relative_to(os.path.realpath(entry)) for each in (place, whole)):
                    passed_over.add("link_loop", path)
                else:
                    links.append(path)
