"""Shards behind URLs, read through a cache on the local disk."""
