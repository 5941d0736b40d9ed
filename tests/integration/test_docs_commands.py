"""The commands of the documentation, run as written on small replacements of large data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model

from ds_linclip.config import load_config
from ds_linclip.data.prepare.make_shards import make_scenes
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.trainer import train
from helpers import REPOSITORY
from linclip_eval.zero_shot.class_lists import imagenet_classes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
#: docs/experiments.md has the commands of measurements, hours of them.
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "experiments.md"]
#: Marks a block that cannot be run here; replacements of commands that take long.
NEEDS = re.compile(r"^# needs (a cluster|\d+ GPUs|docker|the web)", re.IGNORECASE | re.MULTILINE)
INSTEAD = [
    (re.compile(r"^deepspeed (?:--\S+ \S+ )*--module linclip_launch.train (.*)$", re.MULTILINE),
     r"linclip plan \1 --devices 64"),
    (re.compile(r"^linclip train ", re.MULTILINE), "linclip plan "),
    (re.compile(r"^make (data/embedded)$", re.MULTILINE), r"linclip shards make digits \1"),
    (re.compile(r"^make ", re.MULTILINE), ": make "),  # tests/test_docs.py asks for them
    (re.compile(r"^tensorboard .*", re.MULTILINE), r"timeout 20 \g<0> || [ $? = 124 ]"),
    (re.compile(r"(?<![\w.])/data/"), "volumes/"),
]  # fmt: skip


def runnable_blocks(page: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if not NEEDS.search(block)]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what the commands read: data sets in ``volumes``, pictures, weights, runs."""
    place = tmp_path_factory.mktemp("stand-ins")
    scenes = place / "scenes"
    make_scenes(scenes, num_shards=1, samples_per_shard=8, image_size=40, num_test=4)
    laion = place / "volumes" / "laion400m"
    laion.mkdir(parents=True)
    for number in range(41_456):
        os.link(scenes / "train" / "00000.tar", laion / f"{number:05d}.tar")
    sizes = ", ".join(f'"{number:05d}.tar": 8' for number in range(41_456))
    (laion / "sizes.json").write_text(f"{{{sizes}}}")
    for name in ("imagenet-1k-wds", "sketch-wds"):
        (place / "volumes" / name).symlink_to(scenes / "test")
    Image.new("RGB", (16, 16), (200, 30, 30)).save(place / "image.jpg")
    for synset in imagenet_classes("imagenet-21k-miil", "lemma").ids:
        folder = place / "volumes" / "imagenet-21k" / "val" / synset
        folder.mkdir(parents=True)
        os.link(place / "image.jpg", folder / f"{synset}_1.JPEG")
    (place / "photos").mkdir()
    lines = ["filepath\ttitle"]
    for number in range(6):
        os.link(place / "image.jpg", place / "photos" / f"{number}.jpg")
        (place / "photos" / f"{number}.txt").write_text(f"picture {number}")
        lines.append(f"photos/{number}.jpg\tpicture {number}")
    (place / "captions.tsv").write_text("\n".join(lines))
    torch.manual_seed(0)
    save_model(open_clip.create_model("ViT-B-16"), str(place / "weights.safetensors"))
    os.link(place / "weights.safetensors", place / "ViT-B-16.safetensors")
    tiny = [
        *(f"data.train=['{scenes}/train/00000.tar']", "data.num_workers=0", "eval.data=null"),
        *("model.vision.image_size=16", "model.vision.layers=1", "model.text.layers=1"),
        *("train.steps=2", "train.global_batch_size=4", "optim.warmup_steps=1"),
        f"output_dir={place}/runs",
    ]
    kinds = {"embedded": "linear", "my_run": "linear", "linear": "linear", "softmax": "softmax"}
    for name, kind in kinds.items():
        of_run = [f"name={name}", f"model.vision.attention.kind={kind}"]
        of_run += [f"eval.data={scenes}/test"] if name == "embedded" else []
        config = load_config("embedded", [*tiny, *of_run])
        mesh = Mesh.create()
        train(config, mesh)
    return place


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable_blocks(page)], ids=lambda page: page.name
)
def test_commands_of_a_page(page, stand_ins, tmp_path):
    for source in (*REPOSITORY.iterdir(), *stand_ins.iterdir()):
        if source.name not in ("data", "runs", "results"):
            (tmp_path / source.name).symlink_to(source)
    (tmp_path / "runs").mkdir()
    for run in (stand_ins / "runs").iterdir():
        (tmp_path / "runs" / run.name).symlink_to(run)
    for block in runnable_blocks(page):
        script = block.replace("\\\n", " ")
        for pattern, replacement in INSTEAD:
            script = pattern.sub(replacement, script)
        print(script)
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            check=True,
            timeout=1000,
        )
