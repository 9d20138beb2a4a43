"""What is said in several places is the same: version, commands, addresses, least versions of dependencies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nbfftconv

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

ROOT = Path(__file__).parents[1]
DOCS = sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = "https://github.com/nbfftconv/nbfftconv"


def test_the_version_is_in_one_place():
    source = (ROOT / "nbfftconv" / "__init__.py").read_text(encoding="utf-8")
    assert f'\n__version__ = "{nbfftconv.__version__}"\n' in source  # a literal, which the build reads
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "nbfftconv.__version__"}
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)[1] == (
        nbfftconv.__version__
    )
    assert nbfftconv.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_commands_of_the_readme():
    assert '\npython -m pip install ".[demo]" && nbfftconv demo\n' in README
    assert '\npython -m pip install ".[test]" && python -m pytest\n' in README
    assert README.index("pip install nbfftconv") < README.index("import nbfftconv") < README.index("bench_layers.png")


def test_the_readme_can_be_read_elsewhere():
    """As on PyPI: no address is relative, and all files of the repository that it refers to are there."""
    addresses = re.findall(r"\]\(([^)]+)\)", README)
    assert all(address.startswith(("https://", "#")) for address in addresses)
    files = [re.search(r"/main/(.+)$", address)[1] for address in addresses if "/main/" in address]
    assert len(files) > 5
    assert all((ROOT / name).is_file() for name in files)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *DOCS])
def test_links_between_files(page):
    addresses = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [address for address in addresses if not ((ROOT / page).parent / address).is_file()]
    assert not missing


def test_addresses():
    urls = PROJECT["project"]["urls"]
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} <= set(urls)
    assert urls["Repository"] == REPOSITORY
    assert REPOSITORY in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_oldest_versions_are_the_least_that_are_asked_for():
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *optional["demo"], *optional["test"]]
    least = dict(re.match(r"([\w-]+)>=([\d.]+)", each).groups() for each in wanted if not each.startswith("nbfftconv"))
    lines = (ROOT / ".github" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert oldest.keys() == least.keys()
    for name, version in least.items():
        assert re.sub(r"(\.0)+$", "", oldest[name]) == re.sub(r"(\.0)+$", "", version), name
