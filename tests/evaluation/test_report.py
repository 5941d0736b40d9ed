"""One page of several results: it is complete, harmless, and shown by a browser."""

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linclip_eval.commands.report import write_page
from linclip_eval.results import markdown_table
from linclip_launch.cli import main

EVIL = "<script>alert(1)</script> [x](javascript:alert(1)) ![y](z.png)"
TABLE = markdown_table(("class", "top-1, %"), [("tench", "91.00"), (EVIL, 1)])


def write_results(folder: Path, title: str, colour: tuple[int, int, int]) -> Path:
    folder.mkdir()
    Image.new("RGB", (240, 120), colour).save(folder / "figure.png")
    body = f"Measured *well*.\n\n## Details\n\n{TABLE}\n\n![A figure of {title}](figure.png)\n"
    (folder / "summary.md").write_text(f"# {title}\n\n{body}")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    return [
        write_results(tmp_path / "a", "Accuracy & cost", (200, 30, 30)),
        write_results(tmp_path / "b", "Runtime <N>", (30, 30, 200)),
    ]


def test_page_holds_everything(results, tmp_path):
    page = write_page(results, tmp_path / "out", title="All <results>")
    for folder in results:
        shutil.rmtree(folder)
    text = page.read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    colours = [Image.open(io.BytesIO(base64.b64decode(p))).getpixel((0, 0)) for p in pictures]
    assert colours == [(200, 30, 30), (30, 30, 200)]
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "<title>All &lt;results&gt;</title>" in text
    assert re.search("<h2[^>]*>Accuracy &amp; cost</h2>", text)
    assert re.search("<h3[^>]*>Details</h3>", text)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_markdown_has_the_same_and_its_pictures(results, tmp_path):
    write_page(results, tmp_path / "out", title="All")
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.findall(r"^#+ .*$", text, re.MULTILINE) == [
        *("# All", "## Accuracy & cost", "### Details", "## Runtime <N>", "### Details")
    ]
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert names == ["pictures/01/figure.png", "pictures/02/figure.png"]
    assert all((tmp_path / "out" / name).is_file() for name in names)
    assert text.count(TABLE) == 2


def test_bad_folders_are_named(results, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"folders \(\[\]\) must name at least one folder"):
        write_page([], tmp_path / "out", title="None")
    with pytest.raises(ValueError, match=r"folder \(.*nothing\) must hold a readable summary\.md"):
        write_page([*results, tmp_path / "nothing"], tmp_path / "out", title="One")
    (results[1] / "figure.png").unlink()
    with pytest.raises(ValueError, match=r"summary\.md: picture \(figure\.png\) must be a file"):
        write_page(results, tmp_path / "out", title="Broken")
    (results[1] / "summary.md").write_text("no title")
    assert main(["eval", "report", *map(str, results), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: .*summary\.md must begin with a title", line)
    assert not (tmp_path / "out").exists()


def test_browser_shows_pictures_and_tables(results, tmp_path, browser):
    page = write_page(results, tmp_path / "out", title="All")
    browser.get(page.as_uri())
    assert browser.title == "All"
    images = browser.execute_script(
        "return [...document.images].map(i => [i.alt, i.complete, i.naturalWidth])"
    )
    assert images == [
        ["A figure of Accuracy & cost", True, 240],
        ["A figure of Runtime <N>", True, 240],
    ]
    tables = browser.execute_script(
        "return [...document.querySelectorAll('table')].map("
        "t => [...t.tBodies[0].rows].map(r => [...r.cells].map(c => c.innerText)))"
    )
    assert tables == [[["tench", "91.00"], [EVIL, "1"]]] * 2
    links = browser.execute_script("return [...document.links].map(a => a.getAttribute('href'))")
    assert all(browser.find_elements("css selector", link) for link in links)
    assert len(links) == 2
    width = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(width) <= 0  # nothing sticks out
    shot = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB"))
    assert (shot == (200, 30, 30)).all(axis=2).sum() > 10_000  # the first picture is on it
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
