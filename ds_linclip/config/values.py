"""Values of a configuration, from text, by the type of their field.

YAML guesses a type from the look of a value: 007 becomes 7, 1.10 becomes 1.1, yes becomes true and
0100 becomes 64. Here all scalars of a file are read as text, as those of a command line are, and
the field alone says what the text means.
"""

import difflib
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import IO, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from ds_linclip.config.attention import LayerAttention
from ds_linclip.config.data import CaptionSource, Source
from ds_linclip.config.paths import resolved_path, written_path
from ds_linclip.config.schema import Config, kinds_of, sections

__all__ = [
    "as_image_size",
    "build_config",
    "build_section",
    "is_null",
    "parse_yaml",
    "read_layer",
    "read_override",
]

T = TypeVar("T")

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "0"), False
)
#: Beginning of a YAML list, or of a YAML mapping, which a brace pattern of a path is not.
_CONTAINER = re.compile(r"\[|\{\s*\w+:\s|\{\s*\}$")
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


#: Sections that a plain text may stand for: it is the value of this field.
_FIELD_OF_TEXT: dict[Any, str] = {Source: "shards", CaptionSource: "member"}
#: Files that version 0.2 saved list these beside ``kind: softmax``, where they had no effect.
_ONCE_WITHOUT_EFFECT = {
    *("feature_map", "normalized", "score_scale", "length_exponent", "head_norm"),
}


class _Quoted(str):
    """Text that stands in quotes, and thus never means null."""


class _Loader(yaml.SafeLoader):
    """Reads all scalars as text, and refuses a key that a mapping has twice."""

    yaml_implicit_resolvers: ClassVar = {
        "<": yaml.SafeLoader.yaml_implicit_resolvers["<"]
    }  # merge keys

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        text = super().construct_scalar(node)
        return _Quoted(text) if node.style and isinstance(text, str) else text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"it has the key {key.value} twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag in ("str", "merge"):  # a value ``<<`` is text
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_scalar)


def parse_yaml(source: str | IO[bytes]) -> Any:
    """Return the mappings, lists and texts of a YAML document; None when it is empty.

    Raises:
        YAMLError: when it is not valid.
    """
    return yaml.load(source, _Loader)


def is_null(value: Any) -> bool:
    """Return whether a value of :func:`parse_yaml` stands for nothing."""
    return value is None or (type(value) is str and value in _NULLS)


def read_layer(content: Any, folder: Path) -> dict[str, Any]:
    """Return the values of a file or an override as their fields' types, and paths as
    :func:`~ds_linclip.config.paths.written_path` has them.

    What holds ``${...}`` stays text, for its value is not known yet.

    Raises:
        ValueError: naming an unknown key, or the field, its value and the type it must have.
    """
    found: dict[str, Any] = _section(content, Config, "", folder)
    return found


def build_config(values: dict[str, Any]) -> Config:
    """Return the config of merged layers in which no ``${...}`` is left.

    Raises:
        ValueError: naming the field, its value and the type it must have.
    """
    return build_section(values, Config, "")


def build_section(values: Any, node: type[T], name: str) -> T:
    """Return the dataclass ``node`` with the values of a mapping; ``name`` begins the names of
    fields in messages.

    Raises:
        ValueError: naming an unknown key, or the field, its value and the type it must have.
    """
    section = _section(values, node, name, None)
    assert isinstance(section, node)
    return section


def read_override(keys: Sequence[str], text: str) -> Any:
    """Return the value that the command line gives to a key, as :func:`parse_yaml` would.

    For a section or a list, text that begins as a YAML list or mapping is one. All other text is
    taken as it is; quotes around the whole of it are YAML's.

    Raises:
        YAMLError: when a list or mapping is not valid.
    """
    hint: Any = Config
    for key in keys:
        found = [get_type_hints(each).get(key) for each in _classes(hint)]
        hint = next((each for each in found if each is not None), None)
    is_container = _is_container(hint)
    if _QUOTED.fullmatch(text) or (is_container and _CONTAINER.match(text)):
        return parse_yaml(text)
    return text


def as_image_size(name: str, value: object) -> tuple[int, int]:
    """Return (height, width) for a value from a file: a pair, or one number for a square.

    Raises:
        ValueError: naming the field ``name``, for anything else.
    """
    sides: Any = value if isinstance(value, list | tuple) else [value, value]
    if [type(side) for side in sides] != [int, int]:
        raise ValueError(f"{name} ({value}) must be an integer or [height, width], in pixels")
    return sides[0], sides[1]


def _section(content: Any, node: Any, name: str, folder: Path | None) -> Any:
    """Return the values of the dataclass ``node`` of one layer; without a folder, of all layers
    together, as an instance of ``node``."""
    if isinstance(content, str) and node in _FIELD_OF_TEXT:
        content = {_FIELD_OF_TEXT[node]: content}
    if not isinstance(content, dict):
        raise _refusal(name, content, "hold keys and values")
    if node is LayerAttention and folder is None:
        content = {"attention": {}, **content}  # which must name its kind
    hints, known = get_type_hints(node), {field.name: field.metadata for field in fields(node)}
    found: dict[str, Any] = {}
    for key, given in content.items():
        path = f"{name}.{key}" if name else f"{key}"
        if key not in known:
            raise ValueError(_unknown_key_message(path))
        if meanings := known[key].get("once_a_bool"):
            is_true = _BOOLS.get(str(given).strip().lower())
            given = given if is_true is None else meanings[is_true]
        value = _value(given, hints[key], path, folder)
        if "path" in known[key] and value not in (None, *known[key].get("names", ())):
            value = written_path(path, value, folder) if folder else resolved_path(path, value)
        found[str(key)] = value
    return node(**found) if folder is None else found


def _value(value: Any, hint: Any, name: str, folder: Path | None) -> Any:
    kind, parts = get_origin(hint), get_args(hint)
    is_container = _is_container(hint)
    if isinstance(value, str) and folder is not None:
        is_reference = value.startswith("${") if is_container else "${" in value
        if is_reference:
            return str(value)
    if NoneType in parts:
        if value is None or (folder is not None and is_null(value)):
            return None
        (hint,) = (part for part in parts if part is not NoneType)
        return _scalar(value, hint, name, or_null=", or null")
    if kinds := kinds_of(hint):
        return _one_of(value, kinds, name, folder)
    if is_dataclass(hint):
        return _section(value, hint, name, folder)
    if kind is list:
        return _list(value, parts[0], name, folder)
    if hint == tuple[int, int]:
        sides = value if isinstance(value, list | tuple) else [value, value]
        numbers = [_integer(side) for side in sides]
        return as_image_size(name, value if None in numbers else numbers)
    if kind is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise _refusal(name, value, f"be a list of {len(parts)} numbers")
        pairs = enumerate(zip(value, parts, strict=True))
        return tuple(_value(each, part, f"{name}[{i}]", folder) for i, (each, part) in pairs)
    return _scalar(value, hint, name)


def _one_of(value: Any, kinds: dict[str, Any], name: str, folder: Path | None) -> Any:
    """Return the values of the one of several dataclasses that ``kind`` chooses.

    A single layer need not name the kind. A setting that has another type in another kind then
    stays text.
    """
    words = " or ".join(", ".join(kinds).rsplit(", ", 1))
    if not isinstance(value, dict):
        example = value if isinstance(value, str) and value in kinds else min(kinds)
        raise _refusal(name, value, f"hold a kind and its settings, as in {{kind: {example}}}")
    kind: Any = value.get("kind")
    if kind is None and folder is None:
        raise ValueError(f"{name} must name its kind: {words}")
    is_text = isinstance(kind, str)
    is_known = kind is None or (is_text and kind in kinds)
    if not is_known and not (folder is not None and is_text and "${" in kind):
        near = difflib.get_close_matches(str(kind), kinds, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise _refusal(f"{name}.kind", kind, f"be {words}{hint}")
    if kind == "softmax" and value.keys() >= _ONCE_WITHOUT_EFFECT:
        value = {"kind": kind}
    possible = {kind: kinds[kind]} if kind in kinds else kinds
    for key in value:
        if key in _names(*possible.values()):
            continue
        owners = [each for each, node in kinds.items() if key in _names(node)]
        if not owners:
            raise ValueError(_unknown_key_message(f"{name}.{key}"))
        own = sorted(_names(kinds[kind]) - {"kind"})
        raise ValueError(
            f"{name}.{key} ({value[key]}) is no setting of kind {kind}, which has "
            f"{', '.join(own) or 'none'}; it is one of kind {' or '.join(owners)}"
        )
    if folder is None:
        return _section(value, kinds[kind], name, None)
    found = {}
    for key, given in value.items():
        hints = {h for node in possible.values() if (h := get_type_hints(node).get(key))}
        is_clear = key != "kind" and len(hints) == 1
        found[key] = _value(given, hints.pop(), f"{name}.{key}", folder) if is_clear else given
    return found


def _names(*nodes: Any) -> set[str]:
    return {each.name for node in nodes for each in fields(node)}


def _classes(hint: Any) -> list[Any]:
    """Return the dataclasses that a value of this type may be."""
    return [hint] if is_dataclass(hint) else list(kinds_of(hint).values())


def _is_container(hint: Any) -> bool:
    return bool(_classes(hint)) or get_origin(hint) in (list, tuple)


def _list(value: Any, part: Any, name: str, folder: Path | None) -> list[Any]:
    if part is Source and isinstance(value, str) and not is_null(value):
        value = [value]
    if not isinstance(value, list):
        rule = "be a pattern or a list of sources" if part is Source else "be a list"
        raise _refusal(name, value, rule)
    return [_value(each, part, f"{name}[{i}]", folder) for i, each in enumerate(value)]


def _scalar(value: Any, hint: Any, name: str, or_null: str = "") -> Any:
    if get_origin(hint) is Literal:
        *others, last = get_args(hint)
        if value not in (*others, last):
            raise _refusal(name, value, f"be {', '.join(others)} or {last}")
        return str(value)
    if hint is str:
        if not isinstance(value, str | int | float):
            raise _refusal(name, value, "be text")
        return str(value)
    found: Any
    if hint is bool:
        found, rule = _BOOLS.get(str(value).strip().lower()), "be true or false"
    elif hint is int:
        found, rule = _integer(value), "be an integer, in decimal digits"
    else:
        assert hint is float
        found, rule = _finite(value), "be a finite number"
    if found is None:
        raise _refusal(name, value, rule + or_null)
    return found


def _integer(value: Any) -> int | None:
    """Return the number that Python's ``int`` reads; None for other values, and beyond 64 bits."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    try:
        number = int(value)
    except ValueError:
        return None
    return number if abs(number) < 2**63 else None


def _finite(value: Any) -> float | None:
    """Return the number that Python's ``float`` reads; None for other values, NaN and infinity."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _refusal(name: str, value: Any, rule: str) -> ValueError:
    shown = "null" if value is None else repr(value) if value == "" else f"{value}"
    return ValueError(f"{name or 'config'} ({shown}) must {rule}")


def _unknown_key_message(key: str) -> str:
    known = [
        f"{path}.{each.name}".lstrip(".") for path, node in sections() for each in fields(node)
    ]
    if key in known:
        return f"key ({key}) must be written nested, a part per line"
    leaves = {name: name.rpartition(".")[2] for name in known}
    alike = difflib.get_close_matches(key.rpartition(".")[2], set(leaves.values()), cutoff=0.8)
    near = difflib.get_close_matches(key, known, cutoff=0.5)
    near += [name for name in known if leaves[name] in alike and name not in near]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
    return f"unknown key ({key}){hint}"
