"""The rule for paths in a configuration: home folder, variables, and what they are relative to.

URLs stay as they are.
"""

import os
import re
from pathlib import Path

from ds_linclip.config.interpolation import as_plain_text

__all__ = ["PATH", "resolved_path", "saved_path", "written_path"]

#: Metadata of a field that holds a path, which is made absolute; a field whose metadata also has
#: ``names`` may hold one of these instead.
PATH = {"path": True}

_URL = re.compile(r"[A-Za-z][\w.+-]*:(//|:)|pipe:")
#: A variable of the environment, with the backslash that makes it plain text.
_VARIABLE = re.compile(r"(\\?)\$([A-Za-z_]\w*)", re.ASCII)


def written_path(name: str, path: str, folder: Path) -> str:
    """Return the path that a file in ``folder`` gives to the field ``name``, in absolute form.

    ``~`` is the home folder, and ``$NAME`` a variable, written ``${oc.env:NAME}`` from here on. A
    path that begins with ``${...}`` stays relative.

    Raises:
        ValueError: when it is empty, or begins with a ``~`` that is no home folder.
    """
    if _is_url(path):
        return path
    path = _VARIABLE.sub(lambda m: f"${m[2]}" if m[1] else f"${{oc.env:{m[2]}}}", path)
    if path.startswith("${"):
        return path
    return _absolute(name, path, as_plain_text(os.path.abspath(folder)))


def resolved_path(name: str, path: str) -> str:
    """Return the absolute form of a path without ``${...}``, from the working directory.

    Raises:
        ValueError: when it is empty, or begins with a ``~`` that is no home folder.
    """
    return path if _is_url(path) else _absolute(name, path, os.getcwd())


def saved_path(path: str) -> str:
    """Return the text of which :func:`written_path` makes ``path``, an absolute path or a URL."""
    text = as_plain_text(path)
    return text if _is_url(path) else re.sub(r"\$(?=[A-Za-z_])", r"\\$", text)


def _is_url(path: str) -> bool:
    return _URL.match(path.lstrip("{")) is not None  # of the first alternative in {s3://a,/b}


def _absolute(name: str, path: str, folder: str) -> str:
    if not path:
        raise ValueError(f"{name} ('') must not be empty")
    path = os.path.expanduser(path)
    start = path.lstrip("{")
    if start.startswith("~"):
        raise ValueError(
            f"{name} ({path}) must not begin with ~ unless that is a home folder: write the path "
            "in full, or ./~ for a file with such a name"
        )
    return path if os.path.isabs(start) else os.path.normpath(os.path.join(folder, path))
