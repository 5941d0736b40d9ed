"""The length of a run: in steps, in samples or in epochs, exactly one of which is given."""

import math
from dataclasses import replace
from typing import Any

from ds_linclip.config.schema import Config, TrainConfig

__all__ = ["LENGTHS", "check_length", "forget_other_lengths", "with_steps"]

#: Fields of ``train`` that state the length, with the values that stand for nothing.
LENGTHS: dict[str, Any] = {"steps": 0, "samples": None, "epochs": None}


def check_length(train: TrainConfig) -> None:
    """Check that exactly one field states the length of the run.

    Raises:
        ValueError: naming the fields, their values and the rule.
    """
    given = {name: getattr(train, name) for name in LENGTHS if getattr(train, name) is not None}
    if len(given) > 1 and given["steps"] == 0:
        del given["steps"]
    for name, value in given.items():
        if not 0 < value < math.inf:
            instead = ": set it, train.samples or train.epochs" if name == "steps" else ""
            raise ValueError(f"train.{name} ({value}) must be greater than 0 and finite{instead}")
    if len(given) > 1:
        fields = " and ".join(f"train.{name} ({value})" for name, value in given.items())
        raise ValueError(f"{fields} exclude each other: set one of them, which is the length")


def forget_other_lengths(under: dict[str, Any], over: dict[str, Any]) -> None:
    """Remove from ``under``, in place, the length of a run if ``over``, which is merged into it,
    states one in other units."""
    below, above = under.get("train"), over.get("train")
    if not isinstance(below, dict) or not isinstance(above, dict):
        return
    if any(above.get(name) not in (None, 0) for name in LENGTHS):
        below.update({name: none for name, none in LENGTHS.items() if name not in above})


def with_steps(config: Config, samples_per_epoch: int | None = None) -> Config:
    """Return the config with its length in steps, rounded up, if it is known.

    Args:
        config: A config with one length.
        samples_per_epoch: Number of samples of an epoch of ``data.train``, which ``train.epochs``
            needs; without it a config with epochs is returned as it is.
    """
    train, samples = config.train, config.train.samples
    if train.epochs is not None and samples_per_epoch is not None:
        samples = math.ceil(train.epochs * samples_per_epoch)
    if samples is None or train.global_batch_size < 1:
        return config
    steps = -(-samples // train.global_batch_size)
    return replace(config, train=replace(train, steps=steps, samples=None, epochs=None))
