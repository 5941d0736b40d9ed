"""The import rule: every module imports its own folder and lower layers only; and what follows."""

import ast
import sys
import tomllib
from collections import defaultdict
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import REPOSITORY
from helpers.architecture import PACKAGES, imported_names, imports, layer_of, modules

#: Importing module -> what it must not import; both hold for everything below the name.
FORBIDDEN = {
    "ds_linclip.config": list(PACKAGES),
    "ds_linclip.parallel": ["ds_linclip.model"],
    "ds_linclip.model": ["ds_linclip.data"],
    "ds_linclip.loss": ["ds_linclip.data", "ds_linclip.model"],
    "linclip_eval": ["ds_linclip.trainer"],
    **{
        f"linclip_eval.{evaluator}": ["ds_linclip.parallel", "ds_linclip.model"]
        for evaluator in ("audit", "features", "probe", "retrieval", "zero_shot")
    },
}
#: What only these modules, and everything below them, may import.
RESERVED = {
    "deepspeed": ["ds_linclip.parallel", "ds_linclip.engine"],
    "megatron": ["ds_linclip.parallel", "ds_linclip.engine"],
    "linclip_kernels": [
        *("linclip_kernels", "ds_linclip.model.attention"),
        *("benchmarks", "experiments"),
    ],
}
KERNELS_MAY_IMPORT = {"torch", "triton", "linclip_kernels", *sys.stdlib_module_names}


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return one message for each import of a module that breaks the rule."""
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
        below, above = layer_of(module), layer_of(name)
        if below is not None and above is not None and above > below:
            broken.append("a module must not import a higher layer")
        if is_within(module, "linclip_kernels") and name.split(".")[0] not in KERNELS_MAY_IMPORT:
            broken.append("linclip_kernels may import torch, triton and the standard library only")
        found += [f"{module} imports {name}: {rule}" for rule in broken]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_package_keeps_the_import_rule(package):
    files = {name: file for name, file in modules().items() if is_within(name, package)}
    assert len(files) > 1, f"no modules found in {PACKAGES[package] / package}"
    found = []
    for name, file in files.items():
        assert name in PACKAGES or layer_of(name) is not None, f"{name} belongs to no layer"
        source = file.read_text(encoding="utf-8")
        found += violations(name, source, is_package=file.name == "__init__.py")
    assert not found, "\n".join(found)


def test_no_modules_import_each_other_in_a_circle():
    imported = defaultdict(set)
    for each in imports():
        imported[each.importer].add(each.imported)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in imported[module]:
                # A package's __init__ offers names of its modules.
                if not is_within(module, other):
                    visit(other, (*path, module))
            done.add(module)

    for module in list(imported):
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linclip_kernels.linear_attention.op", "import numpy as np"),
        ("linclip_kernels.linear_attention", "from ds_linclip.config import Attention"),
        ("ds_linclip.trainer", "import linclip_eval.zero_shot"),
        ("ds_linclip.checkpoint", "from linclip_launch import train"),
        ("ds_linclip.config", "from .model import CLIP"),
        ("ds_linclip.config", "import linclip_kernels"),
        ("ds_linclip.model.towers", "from ..data import Batch"),
        ("ds_linclip.model.clip", "from ds_linclip import trainer"),
        ("ds_linclip.model.block", "from linclip_kernels import linear_attention"),
        ("ds_linclip.loss", "def f():\n    from ds_linclip.data.batches import Batch"),
        ("ds_linclip.parallel.mesh", "from ds_linclip.model import CLIP"),
        ("ds_linclip.parallel.mesh", "from ds_linclip.engine.optim import Lamb"),
        ("ds_linclip.loss.grad_cache", "import ds_linclip.engine.engine"),
        ("ds_linclip.trainer", "if True:\n    import deepspeed.comm as dist"),
        ("ds_linclip.model.block", "from megatron.core import tensor_parallel"),
        ("linclip_eval.zero_shot", "from ds_linclip.parallel.mesh import Mesh"),
        ("linclip_eval.zero_shot", "from ds_linclip import model"),
        ("linclip_eval.zero_shot", "import ds_linclip.trainer"),
        ("linclip_eval.results", "import linclip_launch.train"),
        ("linclip_launch.train", "import deepspeed"),
        ("linclip_launch.train", "from benchmarks import goodput"),
        ("benchmarks.goodput", "from experiments.report import main"),
        ("benchmarks.goodput", "import deepspeed"),
    ],
)
def test_checker_finds_a_violation(module, source):
    assert violations(module, "import torch\n" + source)
    assert module in violations(module, source)[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linclip_kernels.linear_attention.op", "import math\nimport triton.language as tl"),
        ("linclip_kernels.linear_attention.op", "from .reference import reference"),
        ("ds_linclip.engine.engine", "import deepspeed\nfrom megatron.core import mpu"),
        ("ds_linclip.model.attention", "from linclip_kernels import linear_attention"),
        ("ds_linclip.model.towers", "from ..config import VisionTower\nfrom .block import Block"),
        ("ds_linclip.trainer", "from .data import Batch\nfrom ds_linclip.dataset import x"),
        ("linclip_eval.zero_shot", "from ds_linclip.data import LabelledData"),
        ("linclip_launch.train", "from ds_linclip.trainer import train\nimport linclip_eval.probe"),
        ("benchmarks.goodput", "from linclip_launch.supervise import run"),
        ("experiments.report", "from benchmarks.goodput import main\nimport linclip_kernels"),
    ],
)
def test_checker_allows_what_the_rule_allows(module, source):
    assert violations(module, source) == []


def test_every_imported_package_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {*project["dependencies"]}.union(*project["optional-dependencies"].values())
    names = {canonicalize_name(Requirement(text).name) for text in declared}
    distributions = packages_distributions()
    missing = set()
    for module, file in modules().items():
        for name in imported_names(module, file.read_text("utf-8")):
            top = name.split(".")[0]
            if top in {*PACKAGES, *sys.stdlib_module_names}:
                continue
            if not names & {canonicalize_name(each) for each in distributions.get(top, [top])}:
                missing.add(f"{module} imports {top}")
    assert not missing, "\n".join(sorted(missing))


def test_no_test_needs_a_browser_library_to_be_collected():
    for file in (REPOSITORY / "tests").rglob("*.py"):
        names = [
            name
            for node in ast.parse(file.read_text("utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in imported_names("tests", ast.unparse(node))
        ]
        assert not [name for name in names if is_within(name, "selenium")], file


def test_relative_imports_are_resolved():
    names = imported_names("a.b", "from . import c\nfrom .d import e\nfrom ..f import g")
    assert list(names) == ["a.c", "a.d.e", "f.g"]
    names = imported_names("a.b", "from . import c\nfrom ..f import g", is_package=True)
    assert list(names) == ["a.b.c", "a.f.g"]
