"""Run named cases; write [measured, planned] bytes of a step's fullest moment, for every rank.

See test_step_memory.py, which reads ``<folder>/results.json``.
"""

import json
import sys
from pathlib import Path

from benchmarks.attention.zoo import ZOO, overrides_of
from benchmarks.memory.bench_memory import run
from benchmarks.memory.report import totals

#: Wide enough for activations to be a good part, and in the long ones most.
MODEL = [
    *("model.vision.image_size=128", "model.vision.patch_size=16", "model.vision.layers=4"),
    *("model.vision.width=256", "model.text.layers=3", "model.text.width=128"),
    *("model.text.heads=2", "model.embed_dim=128", "model.text.context_length=32"),
]
ZERO = {
    "reduce_bucket_size": 10_000_000,
    "allgather_bucket_size": 10_000_000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 10_000_000,
}
LONG = ("model.vision.image_size=512", "train.micro_batch_size=4")
SOFTMAX = ("model.vision.attention.kind=softmax", "model.text.attention.kind=softmax")
LUNA = ("model.vision.attention.kind=luna", "model.text.attention.kind=luna")
HEDGEHOG = ("model.vision.attention.kind=hedgehog", "model.text.attention.kind=hedgehog")
FREQUENCY = ("model.vision.attention.kind=frequency", "model.text.attention.kind=frequency")
OVER_TOKENS = ("model.vision.attention={kind: frequency, axis: tokens}",)
FULL = ("train.activation_checkpointing=full",)
SELECTIVE = ("train.activation_checkpointing=selective",)


def layout(
    ranks: int, precision: str, stage: int, batch: int, micro: int, *more: str
) -> tuple[int, list[str]]:
    """Return the ranks and the overrides of a case."""
    sizes = [f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"]
    return ranks, [f"train.precision={precision}", f"zero.stage={stage}", *sizes, *more]


CASES = {
    "bf16": layout(1, "bf16", 1, 16, 16),
    "long-softmax-full": layout(1, "fp32", 1, 4, 4, *LONG, *SOFTMAX, *FULL),
    "long-eq4-selective": layout(
        1, "bf16", 1, 4, 4, *LONG, *SELECTIVE, "model.vision.attention.normalized=true"
    ),
    "zero2-micro": layout(2, "bf16", 2, 32, 8),
    "zero3-softmax": layout(2, "fp32", 3, 32, 16, *SOFTMAX),
    "tp2-full": layout(2, "bf16", 1, 32, 32, *FULL, "parallel.tp=2", "parallel.dp=1"),
    "pp2-micro": layout(2, "fp32", 1, 32, 8, "parallel.pp=2", "parallel.dp=1"),
    "zero2-amp": layout(2, "amp_bf16", 2, 32, 16),
    # Slow.
    "inline-selective": layout(1, "fp32", 1, 16, 16, *SELECTIVE, *overrides_of("inline-local")),
    "frequency-selective": layout(1, "bf16", 1, 16, 16, *FREQUENCY, *SELECTIVE),
    "frequency-amp": layout(1, "amp_bf16", 1, 8, 8, *FREQUENCY),
    "long-frequency-tokens": layout(1, "bf16", 1, 4, 4, *LONG, *OVER_TOKENS),
    "fp32-selective": layout(1, "fp32", 1, 16, 16, *SELECTIVE),
    "long-full": layout(1, "bf16", 1, 4, 4, *LONG, *FULL),
    "zero1-micro": layout(2, "bf16", 1, 32, 8),
    "zero1": layout(2, "bf16", 1, 32, 16),
    "zero1-micro-bf16-sums": layout(2, "bf16", 1, 32, 8, "train.reduce_dtype=bf16"),
    "zero3": layout(2, "bf16", 3, 32, 16),
    "pp2-amp-micro": layout(2, "amp_bf16", 1, 32, 8, "parallel.pp=2", "parallel.dp=1"),
    "lamb": layout(1, "bf16", 1, 8, 8, "optim.kind=lamb"),
    "zero1-softmax-full": layout(2, "bf16", 1, 32, 16, *SOFTMAX, *FULL),
    "zero2-full": layout(2, "fp32", 2, 16, 8, *FULL),
    "zero3-micro": layout(2, "bf16", 3, 32, 4),
    "tp2-softmax": layout(2, "fp32", 1, 16, 16, *SOFTMAX, "parallel.tp=2", "parallel.dp=1"),
    "pp2-full": layout(2, "bf16", 1, 32, 32, *FULL, "parallel.pp=2", "parallel.dp=1"),
    "long-luna": layout(1, "bf16", 1, 4, 4, *LONG, *LUNA),
    "long-luna-selective": layout(1, "bf16", 1, 4, 4, *LONG, *LUNA, *SELECTIVE),
    "long-luna-full": layout(1, "bf16", 1, 4, 4, *LONG, *LUNA, *FULL),
    "zero3-luna": layout(2, "bf16", 3, 32, 16, *LUNA),
    "long-hedgehog": layout(1, "bf16", 1, 4, 4, *LONG, *HEDGEHOG),
    "tp2-hedgehog": layout(2, "fp32", 1, 16, 16, *HEDGEHOG, "parallel.tp=2", "parallel.dp=1"),
    "cp2-long": layout(2, "fp32", 1, 4, 4, *LONG, "parallel.cp=2", "parallel.dp=1"),
}
#: Every kind of attention, on its own.
KINDS = {
    name: layout(1, "bf16", 1, 8, 8, "model.vision.image_size=256", *overrides_of(name))
    for name in ZOO
}


def main(folder: Path, names: list[str]) -> None:
    found = {}
    for name in names:
        ranks, overrides = (CASES | KINDS)[name]
        rows = run(ranks, [*MODEL, *overrides], ZERO)
        found[name] = [totals(row, "step")[::-1] for row in rows]
    (folder / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
