"""Checkpoints that are either whole or not there, and that any layout can load."""

from ds_linclip.checkpoint.loading import latest_checkpoint, load_weights
from ds_linclip.checkpoint.manager import CheckpointStore
from ds_linclip.checkpoint.sharded_safetensors import ShardFiles

__all__ = ["CheckpointStore", "ShardFiles", "latest_checkpoint", "load_weights"]
