"""Loading and saving configurations: defaults, YAML files, overrides, and messages for mistakes."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from ds_linclip.config.schema import Config, sections
from ds_linclip.config.validation import validate

__all__ = ["as_image_size", "config_as_yaml", "load_config", "save_config"]

_NOT_LOCAL = re.compile(r"[A-Za-z][\w.+-]*:(//|:)|pipe:")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML experiment, apply ``key=value`` overrides, return the checked config.

    Paths in the result are absolute. A relative path is taken from the folder of the YAML file that
    sets it, or from the working directory if an override or a default sets it; ``~`` is the home
    folder. URLs and braces stay as they are.

    Args:
        path: YAML file, or the name of a config of the package, such as ``embedded``. A top-level
            ``base:`` names another file, relative to this one, that is merged first.
        overrides: Dotted assignments such as ``optim.lr=1e-3``; later ones win.

    Raises:
        ValueError: for a missing or malformed file, an unknown key (with the nearest known ones), a
            value of the wrong type, or a value that breaks a rule of :func:`validate`.
    """
    merged = OmegaConf.structured(Config)
    layers = _read_with_bases(_find(path)) + [_parse_override(each) for each in overrides]
    for source, folder, content in layers:
        try:
            plain = _write_out_shorthands(content)
            _resolve_paths(plain, Config, folder)
            merged = OmegaConf.merge(merged, plain)
        except ConfigKeyError as error:
            raise ValueError(f"{source}: {_unknown_key_message(error.full_key or '')}") from error
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list and a mapping
            raise ValueError(f"{source}: {_reason(error)}") from error
    try:
        values = OmegaConf.to_container(merged, resolve=True)
        _resolve_paths(values, Config, Path())  # defaults, and paths that begin with ${...}
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_reason(error)}") from error
    assert isinstance(config, Config)
    validate(config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write a config as YAML; :func:`load_config` reads back an equal one."""
    Path(path).write_text(config_as_yaml(config))


def config_as_yaml(config: Config) -> str:
    """Return all values of a config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def as_image_size(name: str, value: object) -> tuple[int, int]:
    """Return (height, width) for a value from a file: a pair, or one number for a square.

    Raises:
        ValueError: naming the field ``name``, for anything else.
    """
    sides = [value, value] if type(value) is int else value
    if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int]:
        raise ValueError(f"{name} ({value}) must be an integer or [height, width], in pixels")
    return sides[0], sides[1]


def _find(path: str | Path) -> Path:
    """Return the file of a path, or of a config of the package."""
    name, folder = str(path), files("ds_configs").joinpath("train")
    if Path(name).is_file() or not re.fullmatch(r"\w+", name):
        return Path(name)
    known = sorted(each.name.removesuffix(".yaml") for each in folder.iterdir())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"config ({name}) must be a file, or one of {', '.join(known)}{hint}")
    return Path(str(folder.joinpath(f"{name}.yaml")))


def _read_with_bases(path: Path) -> list[tuple[str, Path, DictConfig]]:
    """Return name, folder and content of the file and its bases, furthest base first."""
    chain: list[tuple[str, Path, DictConfig]] = []
    while True:
        if any(path.samefile(seen) for seen, _, _ in chain if path.exists()):
            raise ValueError(f"{path}: base files form a circle")
        try:
            content = OmegaConf.load(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"config ({path}) cannot be read: {error}") from error
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"config ({path}) is not valid YAML: {error}") from error
        if not isinstance(content, DictConfig):
            raise ValueError(f"config ({path}) must hold keys and values")
        base = content.pop("base", None)
        chain.insert(0, (str(path), path.parent, content))
        if base is None:
            return chain
        path = path.parent / Path(str(base)).expanduser()


def _parse_override(override: str) -> tuple[str, Path, DictConfig]:
    """Return source, folder and content of one ``key=value`` assignment."""
    if "=" not in override:
        raise ValueError(f"override ({override}) must have the form key=value")
    try:
        return "command line", Path(), OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"override ({override}) must have a YAML value; quote a pattern within a list: "
            "data.train=['{00..99}.tar']"
        ) from error


def _write_out_shorthands(content: DictConfig) -> dict[str, Any]:
    """Return plain containers, with numbers for squares and patterns for sources written out."""
    whole: Any = OmegaConf.to_container(content)
    vision, data = _section(_section(whole, "model"), "vision"), _section(whole, "data")
    if "train" in data:
        given = [data["train"]] if isinstance(data["train"], str) else data["train"]
        if not isinstance(given, list):
            raise ValueError(f"data.train ({given}) must be a pattern or a list of sources")
        data["train"] = [{"shards": each} if isinstance(each, str) else each for each in given]
    stages = data.get("resolutions", [])
    if not isinstance(stages, list):
        raise ValueError(f"data.resolutions ({stages}) must be a list")
    sized = {f"data.resolutions[{index}]": stage for index, stage in enumerate(stages)}
    for name, section in {"model.vision": vision, **sized}.items():
        if isinstance(section, dict) and "image_size" in section:
            section["image_size"] = as_image_size(f"{name}.image_size", section["image_size"])
    return dict(whole)


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _resolve_paths(content: Any, node: Any, folder: Path) -> None:
    """Make relative paths absolute, in place, from ``folder``. ``content`` holds values of the
    dataclass ``node``, or anything that the merge will refuse."""
    if not isinstance(content, dict):
        return
    hints = get_type_hints(node)
    for field in fields(node):
        value, hint = content.get(field.name), hints[field.name]
        if isinstance(value, str) and "path" in field.metadata:
            if value not in field.metadata.get("names", ()):
                content[field.name] = _absolute(value, folder)
        elif is_dataclass(hint):
            _resolve_paths(value, hint, folder)
        elif isinstance(value, list) and get_origin(hint) is list:
            for each in value:
                _resolve_paths(each, get_args(hint)[0], folder)


def _absolute(path: str, folder: Path) -> str:
    path = os.path.expanduser(path)
    start = path.lstrip("{")  # of the first alternative, as in {/data/a,/data/b}/0.tar
    if not path or os.path.isabs(start) or path.startswith("${") or _NOT_LOCAL.match(start):
        return path
    return os.path.abspath(folder / path)


def _reason(error: Exception) -> str:
    return f"{getattr(error, 'full_key', None) or 'config'}: {str(error).splitlines()[0]}"


def _unknown_key_message(key: str) -> str:
    known = [
        f"{path}.{each.name}".lstrip(".") for path, node in sections() for each in fields(node)
    ]
    # OmegaConf gives no path for a key within a list: compare the last parts too.
    leaves = {name: name.rpartition(".")[2] for name in known}
    alike = difflib.get_close_matches(key.rpartition(".")[2], set(leaves.values()), cutoff=0.8)
    near = difflib.get_close_matches(key, known, cutoff=0.5)
    near += [name for name in known if leaves[name] in alike and name not in near]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
    return f"unknown key ({key}){hint}"
