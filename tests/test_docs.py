"""The examples of the pages in docs/ run, and print what they say. Those of docstrings: `test_docstrings`."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page):
    assert doctest.testfile(str(page), module_relative=False).failed == 0


def test_accuracy_has_examples():
    page = next(page for page in PAGES if page.name == "accuracy.md")
    examples = doctest.DocTestParser().get_examples(page.read_text())
    assert len(examples) > 20
    assert sum(example.want == "True\n" for example in examples) >= 8
