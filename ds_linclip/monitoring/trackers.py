"""Experiment trackers: Weights & Biases and Trackio.

DeepSpeed's monitor is not used for them: it has no Trackio, and for Weights & Biases it sets
neither config nor name, makes a call for every value, and never finishes the run.
"""

import importlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from ds_linclip.config import Config
from ds_linclip.monitoring.scalars import ScalarSink
from ds_linclip.process.atomic import write_atomically

__all__ = ["trackio_run", "wandb_run"]


@contextmanager
def wandb_run(config: Config) -> Iterator[ScalarSink]:
    """Open a run of the Weights & Biases project ``log.wandb``; yield its sink.

    All starts of a training run are one run there: its id is kept in the run folder.

    Raises:
        ValueError: when wandb is not installed, not logged in, or cannot be reached.
    """
    wandb = _import("wandb", config.log.wandb)
    try:
        without_account = wandb.setup().settings.mode in ("offline", "disabled")
        if not without_account and not wandb.login(prompt=False):
            raise ValueError(
                f"log.wandb ({config.log.wandb}) needs an account: run wandb login, or set "
                "WANDB_MODE=offline"
            )
        # Where wandb cannot write, it silently takes a temporary folder.
        (config.run_dir / "wandb").mkdir(exist_ok=True)
        settings = _settings(config, config.log.wandb)
        run_id, _ = _run_id(config)
        run = wandb.init(
            dir=config.run_dir, id=run_id, resume="allow", allow_val_change=True, **settings
        )
    except (OSError, wandb.Error) as error:
        raise _unusable("wandb", config.log.wandb, error) from error
    has_failed = True
    try:
        yield lambda step, values: run.log(dict(values), step=step)
        has_failed = False
    finally:
        run.finish(exit_code=int(has_failed))


@contextmanager
def trackio_run(config: Config) -> Iterator[ScalarSink]:
    """Open a run of the project ``log.trackio``, in Trackio's own folder; yield its sink.

    All starts of a training run are one run there. Trackio knows a run by its name alone: the first
    start makes a run of that name, later ones continue it.

    Raises:
        ValueError: when trackio is not installed or cannot write.
    """
    trackio = _import("trackio", config.log.trackio)
    try:
        _, is_first = _run_id(config)
        resume = "never" if is_first else "allow"
        run = trackio.init(embed=False, resume=resume, **_settings(config, config.log.trackio))
    except (OSError, ValueError, sqlite3.Error) as error:
        raise _unusable("trackio", config.log.trackio, error) from error
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()


def _run_id(config: Config) -> tuple[str, bool]:
    """Return the id of the run for trackers, and whether this is the first start of it.

    Raises:
        OSError: when the run folder cannot be read or written.
    """
    path = config.run_dir / "tracker_id"
    is_first = not path.exists()
    if is_first:
        write_atomically(path, uuid4().hex[:12])
    return path.read_text().strip(), is_first


def _import(name: str, project: str | None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"log.{name} ({project}) needs the package {name}, which cannot be imported "
            f"({error}): pip install {name}"
        ) from error


def _unusable(name: str, project: str | None, error: Exception) -> ValueError:
    return ValueError(f"log.{name} ({project}) cannot be used: {' '.join(str(error).split())}")


def _settings(config: Config, project: str | None) -> dict[str, Any]:
    return {
        "project": project,
        "name": config.name,
        "group": config.name,
        "config": asdict(config),
    }
