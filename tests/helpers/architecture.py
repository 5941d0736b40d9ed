"""The project's structure as its imports show it: figures, and the picture of docs/architecture.md.

``python -m helpers.architecture`` prints the figures; ``--draw docs/architecture.md`` writes
that page too.
"""

import argparse
import ast
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import REPOSITORY

__all__ = [
    "LAYERS",
    "PACKAGES",
    "Import",
    "drawing",
    "imported_names",
    "imports",
    "layer_of",
    "modules",
]

#: Package -> folder it lies in.
PACKAGES = {
    "linclip_kernels": REPOSITORY / "kernels",
    "ds_linclip": REPOSITORY,
    "linclip_eval": REPOSITORY / "evaluation",
    "linclip_launch": REPOSITORY / "launch",
    "benchmarks": REPOSITORY,
    "experiments": REPOSITORY,
}

#: Rooms from the lowest to the highest: a module imports its own room and those of lower layers.
LAYERS: list[tuple[str, ...]] = [
    ("linclip_kernels",),
    ("ds_linclip.config", "ds_linclip.process", "ds_linclip.provenance"),
    ("ds_linclip.parallel",),
    ("ds_linclip.data", "ds_linclip.model"),
    ("ds_linclip.loss",),
    ("ds_linclip.engine",),
    ("ds_linclip.checkpoint", "ds_linclip.planner"),
    ("ds_linclip.interop", "ds_linclip.monitoring", "ds_linclip.resilience"),
    ("ds_linclip.preflight", "ds_linclip.run_dir", "ds_linclip.inference"),
    ("ds_linclip.teacher",),
    ("ds_linclip.trainer", "ds_linclip.__main__"),
    ("linclip_eval.protocols", "linclip_eval.plotting", "linclip_eval.results"),
    ("linclip_eval.zero_shot",),
    ("linclip_eval.features",),
    (
        *("linclip_eval.probe", "linclip_eval.retrieval", "linclip_eval.audit"),
        "linclip_eval.diagnostics",
    ),
    ("linclip_eval.runtime", "linclip_eval.scaling_laws", "linclip_eval.training"),
    ("linclip_eval.commands",),
    ("linclip_eval.__main__",),
    ("linclip_launch",),
    ("benchmarks",),
    ("experiments",),
]


@dataclass(frozen=True)
class Import:
    """One module of the project that imports another one."""

    importer: str
    imported: str


def modules() -> dict[str, Path]:
    """Return the file of every module of the project by its dotted name."""
    found = {}
    for package, top in PACKAGES.items():
        for file in sorted((top / package).rglob("*.py")):
            parts = file.relative_to(top).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported_names(module: str, source: str, *, is_package: bool = False) -> Iterator[str]:
    """Yield the absolute names that a module imports, anywhere in its source.

    ``from a import b`` gives ``a.b``, whether b is a module or not.
    """
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


def imports() -> set[Import]:
    """Return every import between two modules of the project."""
    files = modules()
    found = set()
    for importer, file in files.items():
        is_package = file.name == "__init__.py"
        for name in imported_names(importer, file.read_text("utf-8"), is_package=is_package):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and name != importer:
                found.add(Import(importer, name))
    return found


def layer_of(module: str) -> int | None:
    """Return the number of a module's layer, None for the bare name of a package."""
    for number, rooms in enumerate(LAYERS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    return None


def upward_imports() -> list[Import]:
    """Return the imports of a higher layer, sorted."""
    found = []
    for each in imports():
        below, above = layer_of(each.importer), layer_of(each.imported)
        if below is not None and above is not None and above > below:
            found.append(each)
    return sorted(found, key=lambda each: (each.importer, each.imported))


def _room(module: str) -> str:
    """Return the folder that a module lies in, or the module itself at the root of a package."""
    parts = module.split(".")
    package = ".".join(parts[:2])
    is_folder = (PACKAGES[parts[0]] / Path(*parts[:2])).is_dir()
    return package if is_folder or len(parts) == 2 else parts[0]


def figures() -> dict[str, str]:
    """Return what is counted, in words, and the figure."""
    files = modules()
    lines = [len(file.read_text("utf-8").splitlines()) for file in files.values()]
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for file in files.values()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    loose = [
        name
        for name, file in files.items()
        if name.startswith("ds_linclip.") and file.parent == REPOSITORY / "ds_linclip"
    ]
    found = {"lines of Python outside tests": f"{sum(lines):,}"}
    for package in PACKAGES:
        arrows = {
            (_room(each.importer), _room(each.imported))
            for each in imports()
            if each.importer.startswith(package + ".") and each.imported.startswith(package + ".")
        }
        arrows = {(a, b) for a, b in arrows if a != b}
        rooms = {_room(name) for name in files if name.startswith(package + ".")}
        found[f"{package}: rooms, arrows"] = f"{len(rooms)}, {len(arrows)}"
    found["upward imports"] = str(len(upward_imports()))
    found["modules at the root of ds_linclip"] = str(len(loose))
    for what, sizes in (("file", lines), ("function", functions)):
        tenth = statistics.quantiles(sizes, n=10)[-1]
        found[f"lines of a {what}: median, 90 %"] = f"{statistics.median(sizes):.0f}, {tenth:.0f}"
    return found


def _implied(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the arrows from a to c for which others lead from a over b to c."""
    reached = set(arrows)
    while more := {(a, d) for a, b in reached for c, d in arrows if b == c} - reached:
        reached |= more
    return {(a, c) for a, c in arrows for b, d in reached if d == c and (a, b) in reached}


def drawing() -> str:
    """Return a Mermaid chart: rooms of ds_linclip by layer, the other packages as one box each."""

    def box(module: str) -> str:
        return _room(module) if module.startswith("ds_linclip.") else module.split(".")[0]

    arrows = {
        (box(each.importer), box(each.imported))
        for each in imports()
        if box(each.importer) != box(each.imported) and box(each.imported) != "ds_linclip"
    }
    by_layer = defaultdict(set)
    for module in modules():
        layer = layer_of(module)
        if layer is not None:
            by_layer[layer].add(box(module))
    lines: list[str] = ["flowchart BT"]
    drawn: set[str] = set()
    for layer in sorted(by_layer):
        for name in sorted(by_layer[layer] - drawn):
            drawn.add(name)
            lines.append(f'    {name.replace(".", "_")}["{name.removeprefix("ds_linclip.")}"]')
    for importer, imported in sorted(arrows - _implied(arrows)):
        if importer in drawn and imported in drawn:
            lines.append(f"    {importer.replace('.', '_')} --> {imported.replace('.', '_')}")
    return "\n".join(lines)


def page() -> str:
    """Return the content of docs/architecture.md."""
    rows = "\n".join(f"| {what} | {figure} |" for what, figure in figures().items())
    layers = "\n".join(
        f"{number}. {', '.join(f'`{room}`' for room in rooms)}"
        for number, rooms in enumerate(LAYERS, start=1)
    )
    return (
        "# Architecture\n\n"
        "Drawn from the imports of the code by `make architecture`. An arrow leads from a folder\n"
        "to one that it imports; arrows that follow from others are left out.\n\n"
        f"```mermaid\n{drawing()}\n```\n\n"
        "## Layers\n\n"
        "A module imports its own folder and lower layers only; `tests/test_imports.py` checks\n"
        f"it. From the lowest:\n\n{layers}\n\n"
        f"## Figures\n\n| | |\n|:---|---:|\n{rows}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", type=Path, metavar="PAGE", help="write this Markdown page")
    options = parser.parse_args()
    for what, figure in figures().items():
        print(f"{what:<40} {figure}")
    if options.draw:
        options.draw.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
