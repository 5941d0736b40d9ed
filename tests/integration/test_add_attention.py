"""The steps of docs/extending.md add a kind of attention: settings and a module, nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import REPOSITORY, job_environment

SETTINGS = '''@dataclass(kw_only=True, frozen=True)
class MeanAttention(AttentionSettings):
    """Every token gets the mean of the values that it sees."""

    kind: Literal["mean"] = "mean"
    #: Factor of the mean.
    factor: float = 1.0


#: The attention of a layer.
'''
MODULE = '''"""The mean of the values."""

from ds_linclip.model.attention.base import SelfAttention


class Attention(SelfAttention):
    @classmethod
    def flops(cls, settings, head_dim, num_tokens, *, causal):
        return head_dim

    def attend(self, q, k, v, *more):
        if not self.causal:
            return self.settings.factor * v.mean(1, keepdim=True).expand_as(v)
        count = v.new_ones(v.shape[1]).cumsum(0)[:, None, None]
        return self.settings.factor * v.cumsum(1) / count
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the package to which the kind was added."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(REPOSITORY / "ds_linclip", folder / "ds_linclip")
    config = folder / "ds_linclip" / "config" / "attention.py"
    text = config.read_text()
    assert text.count("#: The attention of a layer.\nAttention = ") == 1
    text = text.replace("#: The attention of a layer.\n", SETTINGS)
    config.write_text(text.replace("\nAttention = ", "\nAttention = MeanAttention | "))
    module = folder / "ds_linclip" / "model" / "attention" / "mean.py"
    module.write_text(MODULE)
    return folder


def run(package: Path, *command: object) -> subprocess.CompletedProcess[str]:
    path = [package, *(REPOSITORY / name for name in ("kernels", "evaluation", "launch"))]
    path += [REPOSITORY]
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=job_environment(PYTHONPATH=":".join(map(str, path)), OMP_NUM_THREADS="1"),
        cwd=package,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.long
def test_a_kind_that_is_added_trains_and_is_exported(package, embedded_overrides, tmp_path):
    small = ["train.steps=2", "train.global_batch_size=8", "model.vision.layers=1"]
    small += ["model.text.layers=1", "optim.warmup_steps=1", "eval.data=null"]
    kind = [f"model.{tower}.attention.kind=mean" for tower in ("vision", "text")]
    options = [*embedded_overrides, *small, *kind, f"output_dir={tmp_path}", "name=run"]
    done = run(package, "linclip_launch.train", "embedded", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    done = run(package, "linclip_launch", "export", step, tmp_path / "hub")
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"kind": "mean"' in (tmp_path / "hub" / "open_clip_config.json").read_text()


@pytest.mark.long
def test_its_settings_are_checked_and_documented(package, embedded_overrides):
    wrong = [*embedded_overrides, "model.vision.attention={kind: mean, score_scale: 1}"]
    done = run(package, "linclip_launch.train", "embedded", *wrong)
    assert done.returncode == 2
    assert "score_scale (1) is no setting of kind mean, which has factor" in done.stderr
    done = run(package, "ds_linclip.config.docs", "page.md")
    assert done.returncode == 0, done.stderr
    assert "| `factor` | float | `1.0` | Factor of the mean. |" in (package / "page.md").read_text()
