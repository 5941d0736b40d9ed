"""Score the newest checkpoint of a run folder: ``python launch/eval.py RUN_FOLDER``.

Writes ``<run folder>/eval/step-N.json`` and a table per class beside it. Exit codes as in train.py.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

from ds_linclip.checkpoint import latest_checkpoint, load_weights
from ds_linclip.config import load_config, validate
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.held_out import HeldOutEvaluator
from linclip_eval.zero_shot import write_per_class_csv


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--data", help="held-out folder; default: eval.data of the run's config")
    parser.add_argument(
        "--batch-size", type=int, help="default: eval.batch_size of the run's config"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        report = score(arguments.run_folder, arguments.data, arguments.batch_size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1))
    return 0


@torch.no_grad()
def score(run_folder: Path, data: str | None, batch_size: int | None) -> dict[str, float | str]:
    """Evaluate the newest checkpoint; returns what is written to the JSON file.

    Raises:
        ValueError: when run folder, checkpoint or data cannot be read or do not fit.
    """
    config = load_config(run_folder / "config.yaml")
    checkpoint = latest_checkpoint(run_folder)
    if data is not None:
        config.eval.data = data
    if batch_size is not None:
        config.eval.batch_size = batch_size
    validate(config)
    mesh, precision = Mesh.create(), config.train.precision
    evaluator = HeldOutEvaluator.from_config(config, device=mesh.device)
    model = load_weights(checkpoint, mesh)
    model.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision])
    result = evaluator.score(model.eval())
    report: dict[str, float | str] = {
        "checkpoint": checkpoint.name,
        "data": str(config.eval.data),
        "num_samples": result.num_samples,
        "zeroshot_top1": result.top1,
        "zeroshot_top5": result.top5,
        "mean_per_class_recall": result.mean_per_class_recall,
    }
    folder = run_folder / "eval"
    folder.mkdir(exist_ok=True)
    (folder / f"{checkpoint.name}.json").write_text(json.dumps(report, indent=1))
    write_per_class_csv(result, folder / f"{checkpoint.name}_per_class.csv")
    mesh.close()
    return report


if __name__ == "__main__":
    sys.exit(main())
