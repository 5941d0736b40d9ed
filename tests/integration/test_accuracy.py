"""The whole embedded run learns to read digits from captions, in the time that README states."""

import json
import re
import time

import pytest

from helpers import REPOSITORY

TRAIN = "linclip_launch.train"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("config", ["embedded", "embedded_softmax"])
def test_embedded_run_reaches_ninety_percent(
    config, seed, deepspeed_cpu, embedded_overrides, tmp_path
):
    started = time.monotonic()
    done = deepspeed_cpu(
        TRAIN,
        REPOSITORY / "ds_configs" / "train" / f"{config}.yaml",
        *embedded_overrides,
        f"output_dir={tmp_path}",
        f"train.seed={seed}",
        timeout=480,
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / config / "metrics.jsonl").open()]
    top1 = next(r["eval/zeroshot_top1"] for r in reversed(records) if "eval/zeroshot_top1" in r)
    assert re.search(rf"zeroshot_top1 +{top1:.4f}", done.stdout)
    print(f"\n{config} seed {seed}: top-1 {top1:.4f} in {seconds:.0f} s")
    assert top1 >= 0.90
