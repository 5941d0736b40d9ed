"""Measurements of what attention does in each layer."""
