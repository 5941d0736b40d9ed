"""``linclip-eval report``: the results of other commands as one self-contained page.

Every folder gives its ``summary.md`` and the pictures in it. The same is written as Markdown, with
the pictures beside it.
"""

import argparse
import base64
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
import markdown
from markupsafe import Markup

from ds_linclip.process.atomic import write_atomically

__all__ = ["main", "write_page"]

_SUMMARY = "summary.md"
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}


@dataclass(frozen=True, kw_only=True)
class _Section:
    """One summary: its title, the Markdown below it, and the folder of its pictures."""

    title: str
    body: str
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> "_Section":
        try:
            text = (folder / _SUMMARY).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"folder ({folder}) must hold a readable {_SUMMARY}") from error
        first, _, body = text.lstrip().partition("\n")
        if not first.startswith("# "):
            raise ValueError(f"{folder / _SUMMARY} must begin with a title (# ...)")
        for _, name in _IMAGE.findall(body):
            path = folder / name
            if path.suffix not in _TYPES or not path.is_file():
                raise ValueError(
                    f"{folder / _SUMMARY}: picture ({name}) must be a file of the folder, "
                    f"{', '.join(_TYPES)}"
                )
        # Headings of the summary are below the title of their section on the page.
        body = re.sub(r"^(#+) ", r"#\1 ", body, flags=re.MULTILINE)
        return cls(title=first[2:].strip(), body=body.strip(), folder=folder)


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: for a folder without a summary, or a summary that lacks one of its pictures.
        OSError: for a file that cannot be written.
    """
    parser = argparse.ArgumentParser(prog="linclip-eval report", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="results of other commands")
    parser.add_argument("--title", default="Evaluation")
    parser.add_argument("--out", type=Path, required=True, help="folder of report.html, report.md")
    options = parser.parse_args(arguments)
    print(write_page(options.folders, options.out, title=options.title))


def write_page(folders: Sequence[Path], out: Path, *, title: str) -> Path:
    """Write ``report.html``, which needs no other file, and ``report.md`` with its pictures.

    Args:
        folders: Results of linclip-eval's commands, in the order of their sections.
        out: Created where it is missing.
        title: Title of the page.

    Returns:
        Path of the page.

    Raises:
        ValueError: for no folders, one without a summary, or a missing picture.
        OSError: when ``out`` cannot be written.
    """
    if not folders:
        raise ValueError("folders ([]) must name at least one folder of results")
    sections = [_Section.read(Path(folder)) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.md", _to_markdown(sections, out, title))
    page = out / "report.html"
    write_atomically(page, _to_html(sections, title))
    return page


def _to_markdown(sections: Sequence[_Section], out: Path, title: str) -> str:
    parts = [f"# {title}"]
    for number, section in enumerate(sections, start=1):
        pictures = out / "pictures" / f"{number:02d}"

        def copied(match: re.Match[str], section: _Section = section, to: Path = pictures) -> str:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(section.folder / match[2], to / Path(match[2]).name)
            return f"![{match[1]}]({(to / Path(match[2]).name).relative_to(out)})"

        parts += [f"## {section.title}", _IMAGE.sub(copied, section.body)]
    return "\n\n".join(parts) + "\n"


def _to_html(sections: Sequence[_Section], title: str) -> str:
    template = (resources.files("linclip_eval") / "report_page.html").read_text("utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return page.from_string(template).render(
        title=title, sections=[(section.title, _body_to_html(section)) for section in sections]
    )


def _body_to_html(section: _Section) -> Markup:
    converter = markdown.Markdown(extensions=["tables", "sane_lists"])
    # Names of classes and captions come from anywhere: HTML in them is shown as text.
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")

    def inlined(match: re.Match[str]) -> str:
        path = section.folder / match[1]
        data = base64.b64encode(path.read_bytes()).decode()
        return f'src="data:{_TYPES[path.suffix]};base64,{data}"'

    body = re.sub(r'src="([^"]+)"', inlined, converter.convert(section.body))
    return Markup(
        body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    )
