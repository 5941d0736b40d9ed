"""Checkpoints that are committed whole or not at all, and that any parallel layout can load.

The package imports nothing, so that :mod:`ds_linclip.checkpoint.directory` can be imported without
torch: the supervisor needs it.
"""
