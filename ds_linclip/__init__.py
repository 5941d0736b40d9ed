"""CLIP with linear attention: DeepSpeed engine, Megatron-core layers, exact data streaming.

The names below are the public interface, imported when they are first used::

    from ds_linclip import load_model

    model = load_model("runs/my_run")
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_linclip.config import Config, load_config
    from ds_linclip.inference import LoadedModel, load_model

__all__ = ["Config", "LoadedModel", "__version__", "load_config", "load_model"]

__version__ = version("ds_linclip")

#: Public name -> the module that defines it.
_MODULES = {
    "Config": "ds_linclip.config",
    "LoadedModel": "ds_linclip.inference",
    "load_config": "ds_linclip.config",
    "load_model": "ds_linclip.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
