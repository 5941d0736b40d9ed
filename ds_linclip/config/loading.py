"""Configurations in files: three merges, shorthands, and messages for what does not fit."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from ds_linclip.config.schema import Config
from ds_linclip.config.validation import validate

__all__ = ["as_image_size", "config_as_yaml", "load_config", "save_config"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML experiment, apply ``key=value`` overrides, return the checked config.

    Args:
        path: YAML file. A top-level ``base:`` names another file, relative to this one, that is
            merged first.
        overrides: Dotted assignments such as ``optim.lr=1e-3``; later ones win.

    Raises:
        ValueError: for a missing or malformed file, an unknown key (with the nearest known ones), a
            value of the wrong type, or a value that breaks a rule of :func:`validate`.
    """
    merged = OmegaConf.structured(Config)
    sources = [(str(file), content) for file, content in _read_with_bases(Path(path))]
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override ({override}) must have the form key=value")
        try:
            sources.append(("command line", OmegaConf.from_dotlist([override])))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(
                f"override ({override}) must have a YAML value; quote a pattern within a list: "
                "data.train=['{00..99}.tar']"
            ) from error
    for source, content in sources:
        try:
            merged = OmegaConf.merge(merged, _write_out_shorthands(content))
        except ConfigKeyError as error:
            raise ValueError(f"{source}: {_unknown_key_message(error.full_key or '')}") from error
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list and a mapping
            reason, key = str(error).splitlines()[0], getattr(error, "full_key", None)
            raise ValueError(f"{source}: {key or 'config'}: {reason}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    validate(config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML; :func:`load_config` reads it back equal."""
    Path(path).write_text(config_as_yaml(config))


def config_as_yaml(config: Config) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def _read_with_bases(path: Path) -> list[tuple[Path, DictConfig]]:
    """The file and its bases, furthest base first."""
    chain: list[tuple[Path, DictConfig]] = []
    while True:
        if any(path.samefile(seen) for seen, _ in chain if path.exists()):
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
        chain.insert(0, (path, content))
        if base is None:
            return chain
        path = path.parent / base


def as_image_size(name: str, value: object) -> tuple[int, int]:
    """(height, width) as written in a file: a pair, or one number that stands for a square.

    Args:
        name: The field, for the message.
        value: What stands there.

    Raises:
        ValueError: naming the field, for anything else.
    """
    sides = [value, value] if type(value) is int else value
    if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int]:
        raise ValueError(f"{name} ({value}) must be an integer or [height, width], in pixels")
    return sides[0], sides[1]


def _write_out_shorthands(content: DictConfig) -> dict[str, Any]:
    """``content`` as plain containers: numbers for squares and patterns for sources written out."""
    whole: Any = OmegaConf.to_container(content)
    vision, data = _section(_section(whole, "model"), "vision"), _section(whole, "data")
    if "image_size" in vision:
        vision["image_size"] = as_image_size("model.vision.image_size", vision["image_size"])
    if "train" in data:
        given = data["train"]
        if not isinstance(given, str | list):
            raise ValueError(f"data.train ({given}) must be a pattern or a list of sources")
        sources = [given] if isinstance(given, str) else given
        data["train"] = [{"shards": s} if isinstance(s, str) else s for s in sources]
    if not isinstance(data.get("resolutions", []), list):
        raise ValueError(f"data.resolutions ({data['resolutions']}) must be a list")
    for index, stage in enumerate(data.get("resolutions", [])):
        if isinstance(stage, dict) and "image_size" in stage:
            name = f"data.resolutions[{index}].image_size"
            stage["image_size"] = as_image_size(name, stage["image_size"])
    return cast(dict[str, Any], whole)


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """The mapping under ``name``; an empty one where there is none."""
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _unknown_key_message(key: str) -> str:
    known = _known_keys(Config)
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    # The key alone may be all that is told: in lists OmegaConf does not say where it stands.
    leaves = [k.rsplit(".", 1)[-1] for k in known]
    alike = difflib.get_close_matches(key.rsplit(".", 1)[-1], set(leaves), n=3, cutoff=0.8)
    near += [k for k, leaf in zip(known, leaves, strict=True) if leaf in alike and k not in near]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
    return f"unknown key ({key}){hint}"


def _known_keys(node: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(node).items():
        keys.append(prefix + name)
        if get_origin(hint) is list:
            name, (hint,) = f"{name}[*]", get_args(hint)
        if is_dataclass(hint):
            keys += _known_keys(cast(type, hint), f"{prefix}{name}.")
    return keys
