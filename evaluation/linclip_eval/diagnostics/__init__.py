"""Measurements of the attention in each layer."""
