"""The CLIP model: two towers of transformer blocks whose attention is chosen per tower."""

from ds_linclip.model.clip import CLIP

__all__ = ["CLIP"]
