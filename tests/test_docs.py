"""The examples of the pages in docs/ run, and print what they say. Those of docstrings: `test_docstrings`."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page):
    assert doctest.testfile(str(page), module_relative=False).failed == 0


def test_accuracy_has_examples():
    page = next(page for page in PAGES if page.name == "accuracy.md")
    examples = doctest.DocTestParser().get_examples(page.read_text())
    assert len(examples) > 20
    assert sum(example.want == "True\n" for example in examples) >= 8


@pytest.mark.parametrize("name", ["reverb", "edges_of_a_volume"])
def test_programs_that_draw(name, tmp_path, monkeypatch, capsys):
    """They run, and their picture is in the pages."""
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.syspath_prepend(ROOT / "examples")
    picture = tmp_path / f"{name}.png"
    importlib.import_module(name).main(str(picture))
    assert picture.stat().st_size > 20_000 and " ms" in capsys.readouterr().out
    assert f"({name}.png)" in (ROOT / "docs" / "guide.md").read_text()
    assert (ROOT / "docs" / f"{name}.png").is_file()
