"""DeepSpeed's universal checkpoints: saved by some number of ranks, loaded by any."""

import subprocess
import sys
from pathlib import Path

__all__ = ["write_universal"]


def write_universal(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint once more, in the form that any number of ranks can load.

    Args:
        checkpoint: Folder with what the engine saved.
        folder: To be made; the result is in it under the checkpoint's name.

    Raises:
        OSError: when DeepSpeed's converter fails, with its last words.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", str(checkpoint), "--output_folder", str(folder / checkpoint.name)]
    done = subprocess.run(
        [*command, *folders, "--inject_missing_state"], capture_output=True, text=True
    )
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise OSError(f"{checkpoint} cannot be converted for other ranks: {' '.join(words)}")
