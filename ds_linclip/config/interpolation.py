"""``${...}`` in texts of a configuration, resolved by OmegaConf."""

import re
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

__all__ = ["as_plain_text", "resolve"]


def resolve(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values in which every ``${...}`` is replaced.

    Raises:
        ValueError: naming the field whose text cannot be resolved.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, InterpolationKeyError):
            reason += "; a variable of the environment is ${oc.env:NAME}"
        raise ValueError(f"{getattr(error, 'full_key', None) or 'config'}: {reason}") from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def as_plain_text(text: str) -> str:
    """Return the text that :func:`resolve` turns into ``text``."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
