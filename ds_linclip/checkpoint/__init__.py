"""Checkpoints that are either whole or not there, and that any layout can load."""

from ds_linclip.checkpoint.shard_files import ShardFiles
from ds_linclip.checkpoint.store import CheckpointStore
from ds_linclip.checkpoint.weights import latest_checkpoint, load_weights

__all__ = ["CheckpointStore", "ShardFiles", "latest_checkpoint", "load_weights"]
