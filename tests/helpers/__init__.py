"""Servers, data sets and jobs that several tests share."""

from pathlib import Path

__all__ = ["EMBEDDED", "REPOSITORY"]

REPOSITORY = Path(__file__).parents[2]
EMBEDDED = REPOSITORY / "ds_configs" / "train" / "embedded.yaml"
