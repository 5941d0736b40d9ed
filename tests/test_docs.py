"""The documentation is true: config keys, messages, links, commands, the picture of the code."""

import ast
import contextlib
import importlib
import io
import re
import shlex
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from ds_linclip.config import load_config
from ds_linclip.config.docs import reference
from helpers import REPOSITORY
from helpers.architecture import LAYERS, drawing
from linclip_launch.cli import parsers

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
COMMANDS = ("make ", "linclip ", "deepspeed ", "torchrun ", "python -m ", "launch/")


def commands_of(page: Path) -> list[str]:
    """Return the project's commands in the blocks and the running text of a page."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines]
    return [line for line in lines if line.startswith(COMMANDS)]


@cache
def help_of(module: str) -> str:
    """Return the output of ``--help``, without starting a process."""
    out, argv = io.StringIO(), sys.argv
    sys.argv = [module, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            importlib.import_module(module).main()
    finally:
        sys.argv = argv
    return out.getvalue()


def test_configuration_page_is_generated_from_the_code():
    assert (REPOSITORY / "docs" / "configuration.md").read_text() == reference()


def test_architecture_page_is_generated_from_the_code():
    written = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert drawing() in written, "make architecture"
    for rooms in LAYERS:
        assert ", ".join(f"`{room}`" for room in rooms) in written, "make architecture"


def test_troubleshooting_quotes_messages_of_the_code():
    packages = (REPOSITORY / package for package in ("ds_linclip", "evaluation", "launch"))
    sources = [source for package in packages for source in package.rglob("*.py")]
    said = "\n".join(text for source in sources for text in texts_of(source))
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    ours, _, _ = page.partition("## Said by others")
    messages = re.findall(r"^\| `([^`]+)` \|", ours, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        pieces = re.split(r"\.\.\.|\bN\b", message)
        assert re.search(".*".join(map(re.escape, pieces)), said), message


def texts_of(source: Path) -> list[str]:
    """Return the strings of a module, without the fields of f-strings."""
    texts = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "" for part in node.values]
            texts.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return [text.replace("\n", " ") for text in texts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page):
    targets = re.findall(r"^([\w/-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for command in commands_of(page):
        words = shlex.split(command)
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word and word != "..."]
            assert set(named) <= set(targets), command
            continue
        scripts = [word for word in words if word.startswith("launch/")]
        assert all((REPOSITORY / script).exists() for script in scripts), command
        for config in (word for word in words if word.startswith("ds_configs/train/")):
            given = words[words.index(config) + 1 :]
            overrides = [word for word in given if re.match(r"[a-z_.]+=", word)]
            if "..." not in command and config.endswith(".yaml"):
                load_config(REPOSITORY / config, overrides)
        check_options(command, words)


def check_options(command: str, words: list[str]) -> None:
    """Check that a program of the project exists, and has every option in its help."""
    modules = [
        word for word in words if re.match(r"(linclip_launch|benchmarks|experiments)\.", word)
    ]
    given = words[words.index(modules[0]) + 1 :] if modules else words[1:]
    ours = {"linclip_launch.eval": ["eval"], "linclip_launch.preflight": ["preflight"]}
    if words[0] == "linclip" or set(modules) & set(ours):
        given = given if words[0] == "linclip" else [*ours[modules[0]], *given]
        found = parsers()
        names = [tuple(given[:length]) for length in range(4) if tuple(given[:length]) in found]
        assert names[-1] or not re.match("[a-z]", " ".join(given)), f"no such command: {command}"
        helps = found[names[-1]].format_help()
    elif modules:
        assert find_spec(modules[0]), command
        helps = help_of(modules[0])
    else:
        return
    for option in (word.partition("=")[0] for word in given if re.match(r"--[\w-]+(=|$)", word)):
        assert re.search(rf"{re.escape(option)}\b", helps), f"{option}: {command}"
