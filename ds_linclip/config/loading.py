"""Loading and saving configurations: defaults, YAML files, overrides, and messages for mistakes."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from yaml import YAMLError

from ds_linclip.config.data import CaptionSource
from ds_linclip.config.interpolation import as_plain_text, resolve
from ds_linclip.config.length import check_length, forget_other_lengths, with_steps
from ds_linclip.config.paths import resolved_path, saved_path, written_path
from ds_linclip.config.schema import Config, kinds_of
from ds_linclip.config.validation import check_captions, validate
from ds_linclip.config.values import (
    build_config,
    is_null,
    parse_yaml,
    read_layer,
    read_override,
)

__all__ = ["captions_of", "config_as_yaml", "load_config", "save_config"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML experiment, apply ``key=value`` overrides, return the checked config.

    Paths in the result are absolute. A relative path is taken from the folder of the YAML file that
    sets it, or from the working directory if an override or a default sets it; ``~`` is the home
    folder, and ``$NAME`` a variable of the environment. URLs and braces stay as they are.

    Args:
        path: YAML file, or the name of a config of the package, such as ``embedded``. A top-level
            ``base:`` names another file, relative to this one, that is merged first.
        overrides: Dotted assignments such as ``optim.lr=1e-3``; later ones win.

    Raises:
        ValueError: for a missing or malformed file, an unknown key (with the nearest known ones), a
            value of the wrong type, or a value that breaks a rule of :func:`validate`.
    """
    merged = asdict(Config())
    for source, content in _read_with_bases(_find(path)):
        try:
            layer = read_layer(content, source.parent)
            forget_other_lengths(merged, layer)
            _merge(merged, layer)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    given: dict[str, Any] = {}
    for override in overrides:
        _merge(given, read_layer(_parse_override(override), Path()))
    forget_other_lengths(merged, given)
    _merge(merged, given)
    try:
        values = resolve(merged)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = build_config(values)
    check_length(config.train)
    config = with_steps(config)
    validate(config)
    return config


def captions_of(text: str) -> list[CaptionSource]:
    """Return the sources that a text names, as after ``data.captions=`` on a command line.

    Raises:
        ValueError: naming the field, its value and the rule.
    """
    layer = read_layer(_parse_override(f"data.captions={text}"), Path())
    merged = asdict(Config())
    _merge(merged, layer)
    captions = build_config(resolve(merged)).data.captions
    check_captions(captions)
    return captions


def save_config(config: Config, path: str | Path) -> None:
    """Write a config as YAML; :func:`load_config` reads back an equal one."""
    Path(path).write_text(config_as_yaml(config), encoding="utf-8")


def config_as_yaml(config: Config) -> str:
    """Return all values of a config as YAML."""
    content = _as_plain(config)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _find(path: str | Path) -> Path:
    """Return the file of a path, or of a config of the package."""
    name, folder = os.path.expanduser(path), files("ds_configs").joinpath("train")
    if Path(name).is_file() or not re.fullmatch(r"\w+", name):
        return Path(name)
    known = sorted(each.name.removesuffix(".yaml") for each in folder.iterdir())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"config ({name}) must be a file, or one of {', '.join(known)}{hint}")
    return Path(str(folder.joinpath(f"{name}.yaml")))


def _read_with_bases(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return path and content of the file and its bases, furthest base first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        if any(path.samefile(seen) for seen, _ in chain if path.exists()):
            raise ValueError(f"{path}: base files form a circle")
        try:
            with path.open("rb") as file:
                content = parse_yaml(file)
        except OSError as error:
            raise ValueError(f"config ({path}) cannot be read: {error}") from error
        except YAMLError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"config ({path}) is not valid YAML: {reason}") from error
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise ValueError(f"config ({path}) must hold keys and values")
        base = content.pop("base", None)
        chain.insert(0, (path, content))
        if is_null(base):
            return chain
        if not isinstance(base, str):
            raise ValueError(f"{path}: base ({base}) must be the path of one file")
        found = resolve({"base": written_path("base", base, path.parent)})
        path = Path(resolved_path("base", found["base"]))


def _parse_override(override: str) -> dict[str, Any]:
    """Return the nested content of one ``key=value`` assignment."""
    key, is_assignment, text = override.partition("=")
    if not is_assignment:
        raise ValueError(f"override ({override}) must have the form key=value")
    if "[" in key:
        raise ValueError(f"override ({override}) must set the whole list, as in data.train=[...]")
    keys = key.split(".")
    try:
        value = read_override(keys, text)
    except YAMLError as error:
        raise ValueError(
            f"override ({override}) must have a YAML value; quote what holds braces or colons: "
            "data.train=['{00..99}.tar']"
        ) from error
    for part in reversed(keys):
        value = {part: value}
    return dict(value)


def _merge(
    under: dict[str, Any], over: Mapping[str, Any], nodes: Sequence[Any] = (Config,)
) -> None:
    """Change ``under`` in place: mappings are merged, everything else is replaced, as is a section
    whose kind changes; ``nodes`` are the dataclasses that ``under`` may become."""
    for key, value in over.items():
        hint = next(h for node in nodes if (h := get_type_hints(node).get(key)))
        below: Any = under.get(key)
        kinds = kinds_of(hint)
        are_mappings = isinstance(below, dict) and isinstance(value, dict)
        if not are_mappings or (kinds and _changes_kind(below, value)):
            under[key] = value
        else:
            _merge(below, value, list(kinds.values()) or [hint])


def _changes_kind(below: Any, value: Any) -> bool:
    return "kind" in below and value.get("kind", below["kind"]) != below["kind"]


def _as_plain(value: Any) -> Any:
    """Return mappings, lists and texts that are read back as the value of a config."""
    if isinstance(value, str):
        return as_plain_text(value)
    if isinstance(value, list | tuple):
        return [_as_plain(each) for each in value]
    if not is_dataclass(value):
        return value
    content = {field: getattr(value, field.name) for field in fields(value)}
    return {
        field.name: saved_path(each)
        if "path" in field.metadata and isinstance(each, str)
        else _as_plain(each)
        for field, each in content.items()
    }
