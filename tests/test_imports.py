"""The import rule: linclip_kernels <- ds_linclip <- linclip_eval <- launch, and what follows."""

import ast
import sys
from collections.abc import Iterator

import pytest

from helpers import REPOSITORY

ROOT = REPOSITORY
PACKAGES = {
    "linclip_kernels": ROOT / "kernels",
    "ds_linclip": ROOT,
    "linclip_eval": ROOT / "evaluation",
    "launch": ROOT,
}
#: Importing module -> what it must not import; both hold for everything below the name.
FORBIDDEN = {
    "linclip_kernels": ["ds_linclip", "linclip_eval", "launch"],
    "ds_linclip": ["linclip_eval", "launch"],
    "ds_linclip.config": list(PACKAGES),
    "ds_linclip.model": ["ds_linclip.data", "ds_linclip.trainer"],
    "ds_linclip.loss.contrastive": ["ds_linclip.data", "ds_linclip.trainer"],
    "linclip_eval": ["ds_linclip.trainer", "launch"],
    **{
        f"linclip_eval.{evaluator}": ["ds_linclip.parallel", "ds_linclip.model"]
        for evaluator in ("classifier", "features", "probe", "retrieval", "zero_shot")
    },
}
#: What only these modules, and everything below them, may import.
RESERVED = {
    "deepspeed": ["ds_linclip.parallel"],
    "megatron": ["ds_linclip.parallel"],
    "linclip_kernels": [
        *("linclip_kernels", "ds_linclip.model.attention", "launch"),
        *("linclip_eval.results", "linclip_eval.commands.runtime"),
        "linclip_eval.runtime.subjects",
    ],
}
KERNELS_MAY_IMPORT = {"torch", "triton", "linclip_kernels", *sys.stdlib_module_names}


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imported_names(module: str, source: str, *, is_package: bool = False) -> Iterator[str]:
    """Absolute names a module imports, wherever in it; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [node.module] if node.module else []
            if node.level:
                above = node.level - 1 if is_package else node.level
                parents = module.split(".")
                parts = parents[: len(parents) - above] + parts
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What the source of a module imports against the rule, one message each."""
    found = []
    for name in imported_names(module, source, is_package=is_package):
        broken = [
            f"{importer} must not import {forbidden}"
            for importer, names in FORBIDDEN.items()
            for forbidden in names
            if is_within(module, importer) and is_within(name, forbidden)
            if not is_within(name, importer)
        ]
        broken += [
            f"only {' and '.join(allowed)} may import {reserved}"
            for reserved, allowed in RESERVED.items()
            if is_within(name, reserved) and not any(is_within(module, m) for m in allowed)
        ]
        if is_within(module, "linclip_kernels") and name.split(".")[0] not in KERNELS_MAY_IMPORT:
            broken.append("linclip_kernels may import torch, triton and the standard library only")
        found += [f"{module} imports {name}: {rule}" for rule in broken]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_package_keeps_the_import_rule(package):
    top = PACKAGES[package]
    files = sorted((top / package).rglob("*.py"))
    assert files, f"no modules found under {top / package}"
    found = []
    for file in files:
        parts = file.relative_to(top).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found += violations(module, file.read_text(encoding="utf-8"), is_package=is_package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linclip_kernels.linear_attention.torch_backend", "import numpy as np"),
        ("linclip_kernels.linear_attention", "from ds_linclip.config import Attention"),
        ("ds_linclip.trainer", "import linclip_eval.zero_shot.evaluate"),
        ("ds_linclip.checkpoint", "from launch import train"),
        ("ds_linclip.config", "from .model import CLIP"),
        ("ds_linclip.config", "import linclip_kernels"),
        ("ds_linclip.model.towers", "from ..data import Batch"),
        ("ds_linclip.model.clip", "from ds_linclip import trainer"),
        ("ds_linclip.model.block", "from linclip_kernels import linear_attention"),
        ("ds_linclip.loss.contrastive", "def f():\n    from ds_linclip.data.batches import Batch"),
        ("ds_linclip.trainer", "if True:\n    import deepspeed.comm as dist"),
        ("ds_linclip.model.block", "from megatron.core import tensor_parallel"),
        ("linclip_eval.zero_shot.evaluate", "from ds_linclip.parallel.mesh import Mesh"),
        ("linclip_eval.zero_shot.evaluate", "from ds_linclip import model"),
        ("linclip_eval.zero_shot.evaluate", "import ds_linclip.trainer"),
        ("experiments.convergence_report", "import launch.train"),
        ("launch.train", "import deepspeed"),
    ],
)
def test_checker_finds_a_violation(module, source):
    assert violations(module, "import torch\n" + source)
    assert module in violations(module, source)[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "linclip_kernels.linear_attention.torch_backend",
            "import math\nimport triton.language as tl",
        ),
        ("linclip_kernels.linear_attention.torch_backend", "from .reference import reference"),
        ("ds_linclip.engine.engine", "import deepspeed\nfrom megatron.core import mpu"),
        ("ds_linclip.model.attention", "from linclip_kernels import linear_attention"),
        ("ds_linclip.model.towers", "from ..config import VisionTower\nfrom .block import Block"),
        ("ds_linclip.trainer", "from .data import Batch\nfrom ds_linclip.dataset import x"),
        ("linclip_eval.zero_shot.evaluate", "from ds_linclip.data import LabelledData"),
        (
            "launch.train",
            "from ds_linclip.trainer import train\nimport linclip_eval.zero_shot.evaluate",
        ),
    ],
)
def test_checker_allows_what_the_rule_allows(module, source):
    assert violations(module, source) == []


def test_relative_imports_are_resolved():
    names = imported_names("a.b", "from . import c\nfrom .d import e\nfrom ..f import g")
    assert list(names) == ["a.c", "a.d.e", "f.g"]
    names = imported_names("a.b", "from . import c\nfrom ..f import g", is_package=True)
    assert list(names) == ["a.b.c", "a.f.g"]
