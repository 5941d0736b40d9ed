"""Show the results of other commands as one self-contained page.

Every folder gives its ``summary.md`` and the pictures in it. The same is written as Markdown, with
the pictures beside it.
"""

import argparse
import base64
import html
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

import markdown
from markdown.extensions.toc import TocExtension

from ds_linclip.process.atomic import write_atomically

__all__ = ["run", "write_page"]

_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}


def run(options: argparse.Namespace) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    print(write_page(options.folders, options.out, title=options.title))


def write_page(folders: Sequence[Path], out: Path, *, title: str) -> Path:
    """Write ``report.html``, which needs no other file, and ``report.md`` with its pictures.

    Args:
        folders: Results of the commands of linclip eval, in the order of their sections.
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
    pictures: dict[str, Path] = {}  # place below ``out`` -> file
    sections = [
        _read_summary(folder, f"pictures/{number:02d}", pictures)
        for number, folder in enumerate(folders, start=1)
    ]
    body = "\n\n".join(sections)
    out.mkdir(parents=True, exist_ok=True)
    for place, picture in pictures.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, out / place)
    write_atomically(out / "report.md", f"# {title}\n\n{body}\n")
    page = out / "report.html"
    write_atomically(page, _to_html(title, body, pictures))
    return page


def _read_summary(folder: Path, place: str, pictures: dict[str, Path]) -> str:
    """Return a summary with its headings one level lower and its pictures in the folder ``place``;
    add these to ``pictures``."""
    path = folder / "summary.md"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"folder ({folder}) must hold a readable {path.name}") from error
    if not text.startswith("# "):
        raise ValueError(f"{path} must begin with a title (# ...)")

    def placed(match: re.Match[str]) -> str:
        picture = folder / match[2]
        if picture.suffix not in _TYPES or not picture.is_file():
            raise ValueError(
                f"{path}: picture ({match[2]}) must be a file of the folder, {', '.join(_TYPES)}"
            )
        pictures[f"{place}/{picture.name}"] = picture
        return f"![{match[1]}]({place}/{picture.name})"

    return re.sub(r"^(#+) ", r"#\1 ", _IMAGE.sub(placed, text), flags=re.MULTILINE)


def _to_html(title: str, body: str, pictures: Mapping[str, Path]) -> str:
    converter = markdown.Markdown(
        extensions=["tables", "sane_lists", TocExtension(toc_depth="2-2")]
    )
    # Names of classes and captions come from anywhere: HTML in them is shown as text.
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    content = converter.convert(body)
    for place, picture in pictures.items():
        data = base64.b64encode(picture.read_bytes()).decode()
        source = f'src="data:{_TYPES[picture.suffix]};base64,{data}"'
        content = content.replace(f'src="{place}"', source)
    content = content.replace("<table>", '<div class="scroll"><table>')
    content = content.replace("</table>", "</table></div>")
    template = Template((resources.files("linclip_eval") / "report_page.html").read_text("utf-8"))
    return template.substitute(title=html.escape(title), contents=converter.toc, body=content)
