"""Write the reference of all configuration keys, from the dataclasses and the comments above their
fields: ``python -m ds_linclip.config.docs docs/configuration.md``."""

import ast
import inspect
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ds_linclip.config import schema

__all__ = ["reference"]

_HEAD = """# Configuration

A YAML file describes a whole experiment. Its top-level key `base:` names another file, relative to
this one, whose values it changes; `key=value` on the command line overrides both. An unknown key is
an error that names the nearest known keys, and a value that breaks a rule is an error that names
the rule. Examples are in [ds_configs/train](../ds_configs/train). This page is generated from the
dataclasses of [ds_linclip/config](../ds_linclip/config) by `make docs`.

**Values** mean what their key's type says, in a file and on the command line alike; no value's type
is guessed from its look.

- Text stays as it is written: `name=007`, `name=yes` and `name=1.10` name folders of just these
  names. On the command line it is everything after the `=`; quotes around the whole of it are left
  out, as in YAML.
- An integer is written in decimal digits: `1000`, `1_000` and `01000` are the same; `1e3` and
  `0x10` are errors. A float is what Python's `float` reads, but finite: `5e-4`, `.5`, `1`.
- A bool is `true`, `yes`, `on` or `1`, or `false`, `no`, `off` or `0`.
- Where a key may be null, `null`, `~` and nothing at all mean null, unless they stand in quotes.
- `[...]` is a list, in YAML's form: `data.train=['/a/{0..9}.tar', '/b/0.tar']`, where an entry with
  a comma, a brace or a quote stands in quotes.
- `${key}` is the value of another key, `${oc.env:NAME}` a variable of the environment and
  `${oc.env:NAME,default}` with a default; `\\${` is a plain `${`.

**Paths** in a YAML file are absolute or relative to that file; on the command line they are
relative to the working directory, as is a path that begins with `${...}`. `~` is the home folder
and `$NAME` a variable of the environment (`\\$NAME` is plain text). The same holds for `base:` and
for the brace patterns of `data.train`; URLs stay as they are. `config.yaml` in a run folder holds
all paths in absolute form.
"""


def reference() -> str:
    """Return all keys with their types, defaults and meanings, as Markdown."""
    first_paths = {node: path for path, node in reversed([*schema.sections()])}
    sections = dict.fromkeys(node for _, node in schema.sections())
    return "\n".join([_HEAD, *(_section(first_paths[node], node) for node in sections)])


def _section(path: str, node: Any) -> str:
    hints = get_type_hints(node)
    meanings = {k: v for cls in node.__mro__[-2::-1] for k, v in _meanings(cls).items()}
    rows, kinds = [], get_args(hints.get("kind"))
    is_one_of_several = len(kinds) == 1
    for field in fields(node):
        is_shown = not is_dataclass(hints[field.name])
        if is_shown and not (is_one_of_several and field.name == "kind"):
            if field.name not in meanings:
                name = f"{node.__name__}.{field.name}"
                raise ValueError(f"{name} must have a comment that says what it is")
            kind = _type_name(hints[field.name])
            if "path" in field.metadata:
                kind = kind.replace("str", "name or path" if "names" in field.metadata else "path")
            meaning = meanings[field.name].replace("|", r"\|")
            rows.append(f"| `{field.name}` | {kind} | {_default(field)} | {meaning} |")
    table = ["| key | type | default | meaning |", "|:---|:---|:---|:---|", *rows, ""]
    title = f"## `{path}`" if path else "## Top level"
    if is_one_of_several:
        title += f" of kind `{kinds[0]}`"
    return "\n".join([title, "", inspect.cleandoc(node.__doc__), "", *(table if rows else [])])


def _meanings(node: Any) -> dict[str, str]:
    """Return the ``#:`` comments above fields."""
    lines = inspect.getsource(node).splitlines()
    (tree,) = ast.parse("\n".join(lines)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign):
            name = ast.unparse(statement.target)
            above = (line.strip() for line in reversed(lines[: statement.lineno - 1]))
            comment = list(takewhile(lambda line: line.startswith("#:"), above))
            if comment:
                found[name] = " ".join(line[2:].strip() for line in reversed(comment))
    return found


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"[{', '.join(_type_name(each) for each in get_args(hint))}]"
    if get_origin(hint) is list:
        (each,) = get_args(hint)
        return f"list of {_type_name(each)}"
    if kinds := schema.kinds_of(hint):
        return f"kind {' or '.join(f'`{kind}`' for kind in kinds)}"
    if get_args(hint):  # a union
        return " or ".join(_type_name(each) for each in get_args(hint))
    special = {
        "NoneType": "null",
        "Source": "sources",
        "CaptionSource": "places",
        "Resolution": "sizes",
        "LayerAttention": "layers",
        "NamedSet": "sets",
    }
    return special.get(hint.__name__, hint.__name__)


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None or value == "":
        return "" if value == "" else "null"
    value = getattr(value, "kind", value)  # one of several dataclasses
    shown = str(list(value) if isinstance(value, tuple) else value)
    return f"`{shown.lower() if isinstance(value, bool) else shown}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
