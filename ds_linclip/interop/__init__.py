"""Weights out of checkpoints and in from elsewhere, as the folder that open_clip opens."""

from ds_linclip.interop.export import export_checkpoint
from ds_linclip.interop.import_weights import import_weights

__all__ = ["export_checkpoint", "import_weights"]
