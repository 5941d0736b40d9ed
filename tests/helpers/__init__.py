"""Servers, data sets and jobs that several tests share."""

import os
from pathlib import Path

__all__ = ["EMBEDDED", "REPOSITORY", "job_environment"]

REPOSITORY = Path(__file__).parents[2]
EMBEDDED = REPOSITORY / "ds_configs" / "train" / "embedded.yaml"


def job_environment(**variables: str) -> dict[str, str]:
    """Environment of a process that runs ``python -m helpers.NAME``, with more ``variables``."""
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
