"""Exchange of weights with open_clip: export, import and pretrained weights."""

from ds_linclip.interop.export import export_checkpoint
from ds_linclip.interop.import_weights import import_weights

__all__ = ["export_checkpoint", "import_weights"]
