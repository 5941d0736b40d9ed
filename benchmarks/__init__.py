"""Measurements that compare the project with its peers; run from the repository's root."""

from pathlib import Path

__all__ = ["REPOSITORY"]

REPOSITORY = Path(__file__).parents[1]
