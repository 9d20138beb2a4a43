"""What is kept on disk between processes may help; it never changes a result and never breaks a call."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from processes import FEW, run_scenario


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """A copy of this session's cache, after a process has filled it."""
    run_scenario("once")
    copy = tmp_path_factory.mktemp("cache") / "copy"
    shutil.copytree(os.environ["NBFFTCONV_CACHE_DIR"], copy)
    return copy


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_the_next_process_gives_the_same_bytes_and_compiles_nothing(warm):
    first = run_scenario("once", NBFFTCONV_CACHE_DIR=str(warm))
    before = files(warm)
    assert before
    assert run_scenario("once", NBFFTCONV_CACHE_DIR=str(warm)) == first
    assert files(warm) == before


def test_no_directory_to_write_to(tmp_path):
    """The path is taken by a file: nothing can be kept, and everything works."""
    path = tmp_path / "taken"
    path.write_text("a file")
    found = run_scenario("once", *FEW, NBFFTCONV_CACHE_DIR=str(path))
    assert found.keys() == run_scenario("once", *FEW).keys()
    assert path.read_text() == "a file"


def test_damaged_files(tmp_path):
    """Every file cut in half or overwritten: the next process works, and so does the one after it."""
    environment = {"NBFFTCONV_CACHE_DIR": str(tmp_path)}
    names = run_scenario("once", *FEW, **environment).keys()
    for number, path in enumerate(files(tmp_path)):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if number % 2 else b"garbage")
    for _ in range(2):
        assert run_scenario("once", *FEW, **environment).keys() == names
