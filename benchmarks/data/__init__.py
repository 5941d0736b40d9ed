"""Throughput of the training data loader against open_clip's."""
