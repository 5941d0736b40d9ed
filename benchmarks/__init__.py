"""Measurements that compare the project with its peers; run from the repository's root."""

from pathlib import Path

from ds_linclip.provenance import device_name, folder_name

__all__ = ["REPOSITORY", "results_folder"]

REPOSITORY = Path(__file__).parents[1]


def results_folder(what: str, device: str) -> Path:
    """Return the folder that keeps the results of a benchmark on a device, "cuda" or "cpu"."""
    return REPOSITORY / "docs" / "results" / what / folder_name(device_name(device))
