"""What is kept on disk between processes may help; it never changes a result and never breaks a call."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import FEW, TIMEOUT, run_scenario


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "prefixes", [("codelets, float32",), pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_next_process_gives_the_same_bytes_and_compiles_nothing(prefixes, tmp_path):
    """In a copy of this session's cache, after a process has filled it."""
    run_scenario("once", *prefixes)
    warm = tmp_path / "copy"
    # not what other processes are about to put in place
    shutil.copytree(os.environ["NBFFTCONV_CACHE_DIR"], warm, ignore=shutil.ignore_patterns(".*.tmp"))
    first = run_scenario("once", *prefixes, NBFFTCONV_CACHE_DIR=str(warm))
    before = files(warm)
    assert len(before) > 10
    again = run_scenario("compilations", *prefixes, NBFFTCONV_CACHE_DIR=str(warm))
    assert again == {"digests": first, "compiled": []}
    assert files(warm) == before


some_results = pytest.mark.parametrize(
    "prefixes", [("depthwise, float32, forward",), pytest.param(FEW, marks=pytest.mark.slow)], ids=["one", "few"]
)


@some_results
def test_no_directory_to_write_to(prefixes, tmp_path):
    """The path is taken by a file: nothing can be kept, and everything works."""
    path = tmp_path / "taken"
    path.write_text("a file")
    found = run_scenario("once", *prefixes, NBFFTCONV_CACHE_DIR=str(path))
    assert found.keys() == set(prefixes)
    assert path.read_text() == "a file"


@pytest.mark.slow
def test_damaged_files(tmp_path):
    """Every file cut in half or overwritten: the next process works, and so does the one after it."""
    environment = {"NBFFTCONV_CACHE_DIR": str(tmp_path)}
    assert run_scenario("once", *FEW, **environment).keys() == set(FEW)
    for number, path in enumerate(files(tmp_path)):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if number % 2 else b"garbage")
    for _ in range(2):
        assert run_scenario("once", *FEW, **environment).keys() == set(FEW)


SIDES = {"float32": (30, 36, 40), "float64": (36, 30, 40)}
LIMIT = {"float32": 1e-5, "float64": 1e-13}


class Workers:
    """Processes of cold_worker.py on one cache folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._barriers = 0

    def start(self, cases: list[tuple[str, list[int]]], delay: float = 0.0) -> list[subprocess.Popen]:
        self._barriers += 1
        ready = self._folder / f"ready{self._barriers}"
        ready.mkdir()
        cache = self._folder / "cache"
        cache.mkdir(mode=0o700, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "NBFFTCONV_CACHE_DIR": str(cache)}
        script = str(Path(__file__).with_name("cold_worker.py"))
        return [
            subprocess.Popen(
                [sys.executable, script, real, json.dumps(sides), str(delay), str(ready), str(len(cases))],
                env=environment, stdout=subprocess.PIPE, text=True,
            )
            for real, sides in cases
        ]  # fmt: skip

    def check(self, cases, processes, killed=()) -> None:
        for (real, _), process in zip(cases, processes, strict=True):
            text, _ = process.communicate(timeout=TIMEOUT)
            if process not in killed:
                assert process.returncode == 0 and float(text) < LIMIT[real], (real, process.args, text)


ONE_EACH = [(real, [side]) for side in (30, 36, 40) for real in SIDES]
ALL = [(real, list(sides)) for real, sides in SIDES.items()]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_six_workers_cold_on_one_folder(tmp_path, delay):
    """They compute what is right, and so do those that find what they have left."""
    workers = Workers(tmp_path)
    workers.check(ONE_EACH, workers.start(ONE_EACH, delay))
    workers.check(ALL, workers.start(ALL))


@pytest.mark.slow
def test_workers_killed_while_they_write(tmp_path):
    workers = Workers(tmp_path)
    processes = workers.start(ONE_EACH, 0.4)
    cache = tmp_path / "cache"
    killed = []
    for process in processes[:3]:
        deadline = time.monotonic() + TIMEOUT
        while not any(cache.rglob(".*.tmp")) and time.monotonic() < deadline:  # somebody is in the middle
            time.sleep(0.005)
        process.kill()
        killed.append(process)
    workers.check(ONE_EACH, processes, killed)
    workers.check(ALL, workers.start(ALL))
