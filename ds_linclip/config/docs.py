"""The reference of all keys, from the dataclasses and the comments above their fields:
``python -m ds_linclip.config.docs docs/configuration.md``."""

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from ds_linclip.config import schema
from ds_linclip.config.schema import Config

__all__ = ["reference"]

_HEAD = """# Configuration

A YAML file is a whole experiment; `base:` names a file that it changes; `key=value` on the command
line comes last. An unknown key is an error that names the nearest known ones, and so is a value
that breaks a rule. This page is made from
[schema.py](../ds_linclip/config/schema.py) by `make docs`; examples are in
[ds_configs/train](../ds_configs/train).
"""


def reference() -> str:
    """All keys with their types, defaults and meanings, as Markdown."""
    parts = [_HEAD, *(_section(path, node) for path, node in _sections(Config))]
    return "\n".join(parts)


def _sections(node: type, path: str = "") -> Iterator[tuple[str, type]]:
    """Dotted path and class of a dataclass and of those in its fields, from the outside in."""
    yield path, node
    for name, hint in get_type_hints(node).items():
        if get_origin(hint) is list:
            name, (hint,) = f"{name}[*]", get_args(hint)
        if is_dataclass(hint):
            yield from _sections(cast(type, hint), f"{path}.{name}".lstrip("."))


def _section(path: str, node: type) -> str:
    hints, meanings = get_type_hints(node), _meanings(node)
    rows = [
        f"| `{field.name}` | {_type_name(hints[field.name])} | {_default(field)} "
        f"| {_in_cell(meanings[field.name])} |"
        for field in fields(cast(Any, node))
        if not is_dataclass(hints[field.name])
    ]
    table = ["| key | type | default | |", "|:---|:---|:---|:---|", *rows, ""] if rows else []
    title = f"## `{path}`" if path else "## The experiment"
    text = inspect.cleandoc(node.__doc__ or "").replace("``", "`")
    return "\n".join([title, "", text, "", *table])


def _meanings(node: type) -> dict[str, str]:
    """Field -> the ``#:`` comment above it.

    Raises:
        ValueError: for a field without one.
    """
    lines = inspect.getsource(schema).splitlines()
    (tree,) = (
        each
        for each in ast.parse("\n".join(lines)).body
        if isinstance(each, ast.ClassDef) and each.name == node.__name__
    )
    found = {}
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            first = statement.lineno - 1
            while lines[first - 1].strip().startswith("#:"):
                first -= 1
            comment = [line.strip()[2:].strip() for line in lines[first : statement.lineno - 1]]
            name = statement.target.id
            if not comment and not is_dataclass(get_type_hints(node)[name]):
                raise ValueError(f"{node.__name__}.{name} must have a comment that says what it is")
            found[name] = " ".join(comment).replace("``", "`")
    return found


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"[{', '.join(_type_name(each) for each in get_args(hint))}]"
    if get_origin(hint) is list:
        (each,) = get_args(hint)
        return f"list of {_type_name(each)}"
    if get_args(hint):  # a union
        return " or ".join(_type_name(each) for each in get_args(hint))
    return {"NoneType": "null", "Source": "sources", "Resolution": "sizes"}.get(
        hint.__name__, hint.__name__
    )


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None:
        return "null"
    shown = str(list(value) if isinstance(value, tuple) else value)
    return f"`{shown.lower() if isinstance(value, bool) else shown}`"


def _in_cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
