"""The page's pure modules in node, without a browser, and what all of its files must keep."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.static.stand_in import STATIC

HERE = Path(__file__).resolve().parent
MODULES = sorted(STATIC.glob("*.js"))


@pytest.mark.parametrize("name", ["markdown", "sse", "store", "chart", "words"])
def test_module(name: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    (tmp_path / "package.json").write_text('{"type": "module"}')  # or node takes .js for the older kind
    for file in [*MODULES, STATIC / "index.html", HERE / f"{name}.test.js"]:
        shutil.copy(file, tmp_path)
    command = [node, "--test", str(tmp_path / f"{name}.test.js")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


def test_files_are_short() -> None:
    sizes = {file.name: file.read_text().count("\n") for file in STATIC.iterdir()}
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_nothing_makes_markup_or_script_of_a_text() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser"
    )
    found = {file.name: forbidden.findall(re.sub(r"//.*", "", file.read_text())) for file in MODULES}
    assert {name: words for name, words in found.items() if words} == {}


def test_nothing_is_fetched_from_elsewhere() -> None:
    address = re.compile(r"(?:https?:)?//[a-z0-9-]+\.[a-z]")
    allowed = {"http://www.w"}  # SVG's namespace, which nobody fetches
    for file in STATIC.iterdir():
        assert set(address.findall(file.read_text())) <= allowed, file.name


def test_the_page_has_no_inline_script_or_style() -> None:
    page = (STATIC / "index.html").read_text()
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:|<script(?![^>]*\ssrc=)", page) == []


def test_every_file_is_used() -> None:
    texts = {file.name: file.read_text() for file in STATIC.iterdir()}
    used = set(re.findall(r'(?:href|src)="([\w.]+\.\w+)"', texts["index.html"]))
    used |= {name for text in texts.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert used == set(texts) - {"index.html"}


def test_every_element_that_is_looked_up_is_there() -> None:
    page = (STATIC / "index.html").read_text()
    wanted = {name for file in MODULES for name in re.findall(r'byId\("([\w-]+)"\)', file.read_text())}
    assert wanted <= set(re.findall(r'\bid="([\w-]+)"', page))
    icons = {name for file in MODULES for name in re.findall(r'icon\("([\w-]+)"\)', file.read_text())}
    icons |= set(re.findall(r'href="#icon-([\w-]+)"', page))
    assert icons <= set(re.findall(r'<symbol id="icon-([\w-]+)"', page))
