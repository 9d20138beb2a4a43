"""nbfftconv.config: what is in force, where it comes from, and what sets it; variables of the environment."""

from __future__ import annotations

import ast
import doctest
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nbfftconv
from nbfftconv import config, environment, machine, memory, paths, profile, scratch, threads
from nbfftconv.transforms import fftw

NAMES = [
    "threads", "library_threads", "scratch_limit", "memory_limit", "planning_effort", "machine", "profile",
    "cache_directory",
]  # fmt: skip


def in_a_process(code: str, **environment: str | None) -> dict[str, list]:
    """Value and source of all settings after some code, in a process with nothing set but what is given."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("NBFFTCONV_", "OMP_", "NUMBA_"))}
    given = {key: value for key, value in environment.items() if value is not None}
    script = f"""
import json, sys
from nbfftconv import config
{code}
found = config.settings()
json.dump({{name: [str(each.value), each.source] for name, each in found.items()}}, sys.stdout)
"""
    variables = ours | {"PYTHONPATH": os.pathsep.join(sys.path)} | given
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_at_first(tmp_path):
    found = in_a_process("", XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path))
    assert list(found) == NAMES
    assert {source for _, source in found.values()} == {"default"}
    assert (found["scratch_limit"][0], found["memory_limit"][0]) == (str(512 * 2**20), str(384 * 2**20))
    assert found["planning_effort"][0] == "measure" and found["machine"][0] == "None"
    folder = Path(found["cache_directory"][0])
    assert folder == tmp_path / "nbfftconv" or sys.platform != "linux"
    assert Path(found["profile"][0]).parent == folder
    assert not list(folder.iterdir())  # nothing was measured


def test_from_the_environment(tmp_path):
    found = in_a_process(
        "",
        NBFFTCONV_CACHE_DIR=str(tmp_path / "cache"),
        NBFFTCONV_PROFILE=str(tmp_path / "profile.json"),
        NBFFTCONV_SCRATCH_BYTES="12345678",
        NBFFTCONV_MEMORY_BYTES="87654321",
        OMP_NUM_THREADS="1",
    )
    assert found["threads"] == found["library_threads"] == ["1", "environment"]
    assert found["scratch_limit"] == ["12345678", "environment"]
    assert found["memory_limit"] == ["87654321", "environment"]
    assert found["profile"] == [str(tmp_path / "profile.json"), "environment"]
    assert found["cache_directory"] == [str(tmp_path / "cache"), "environment"]
    assert found["planning_effort"][1] == "default"


SET = """
config.set_num_threads(3, library=2)
config.set_scratch_limit(10**6)
config.set_memory_limit(0)
config.set_planning_effort("patient")
config.set_machine(config.Machine(1e9, 2e9))
config.set_profile_file({folder!r} + "/mine.json")
config.set_cache_directory({folder!r} + "/cache")
"""


def test_what_is_set_overrules_the_environment(tmp_path):
    variables = {
        "NBFFTCONV_CACHE_DIR": "/nowhere",
        "NBFFTCONV_PROFILE": "/nowhere/profile.json",
        "NBFFTCONV_SCRATCH_BYTES": "99",
    }
    found = in_a_process(SET.format(folder=str(tmp_path)), OMP_NUM_THREADS="1", **variables)
    assert {source for _, source in found.values()} == {"set"}
    assert [found[name][0] for name in NAMES[:5]] == ["3", "2", str(10**6), "0", "patient"]
    assert "1000000000.0" in found["machine"][0]
    assert found["profile"][0] == str(tmp_path / "mine.json")
    assert found["cache_directory"][0] == str(tmp_path / "cache")


def test_an_effort_that_is_set_is_set(tmp_path):
    """Even to what it was."""
    found = in_a_process('config.set_planning_effort("measure")', HOME=str(tmp_path))
    assert found["planning_effort"] == ["measure", "set"]


def test_counts_of_the_profile(tmp_path):
    """The profile hands its counts to the threads, which know nothing of it."""
    code = f"""
from nbfftconv import profile
config.set_profile_file({str(tmp_path / "profile.json")!r})
profile.remember(threads=(1, 1))
"""
    found = in_a_process(code, NBFFTCONV_CACHE_DIR=str(tmp_path))
    assert found["threads"] == found["library_threads"] == ["1", "profile"]


def test_measured_figures(tmp_path):
    code = """
from nbfftconv import machine
machine.measure = lambda: config.Machine(1e11, 2e10)
config.get_machine()
"""
    for each in (code, ""):  # and those that are on disk, without reading them for good
        found = in_a_process(each, NBFFTCONV_CACHE_DIR=str(tmp_path))
        assert found["machine"] == ["Machine(flops=100000000000.0, bandwidth=20000000000.0)", "measured"]


def test_one_place():
    """It has the functions of the modules whose state it is, not copies."""
    assert config.set_num_threads is threads.set_num_threads is nbfftconv.set_num_threads
    assert config.get_num_threads is threads.get_num_threads
    assert config.set_scratch_limit is scratch.set_scratch_limit
    assert config.get_scratch_limit is scratch.get_scratch_limit
    assert config.set_memory_limit is memory.set_memory_limit
    assert config.get_memory_limit is memory.get_memory_limit
    assert config.set_machine is machine.set_machine and config.DEFAULT_MACHINE is machine.DEFAULT
    for name in ("set_planning_effort", "get_planning_effort", "save_wisdom", "load_wisdom"):
        assert getattr(config, name) is getattr(fftw, name)
    assert config.set_cache_directory is paths.set_cache_directory
    assert config.get_cache_directory is paths.cache_directory
    assert config.set_profile_file is profile.set_profile_file and config.get_profile_file is profile.profile_file
    assert set(config.__all__) <= set(vars(config))


def test_settings_cannot_be_changed_in_place():
    setting = config.settings()["threads"]
    with pytest.raises(AttributeError):
        setting.value = 7


def test_show(restore_scratch_limit, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paths, "_chosen", None)
    monkeypatch.setenv(environment.CACHE_DIR, str(tmp_path))
    config.set_scratch_limit(3 * 2**20)
    config.show()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["setting", *(name.replace("_", " ") for name in NAMES)]
    (line,) = (line for line in lines if line.startswith("scratch limit"))
    assert "3 MiB" in line and " set " in line and environment.SCRATCH_BYTES in line
    (line,) = (line for line in lines if line.startswith("cache directory"))
    assert str(tmp_path) in line and " environment " in line
    file = io.StringIO()
    config.show(file)
    assert file.getvalue().splitlines() == lines and not capsys.readouterr().out


def test_show_without_a_home(monkeypatch, capsys):
    monkeypatch.setenv(environment.CACHE_DIR, "~nobody-of-this-name")
    config.show()
    assert "none: there is no home" in capsys.readouterr().out


# Setters ---------------------------------------------------------------------------------------------


@pytest.fixture
def restore_paths(monkeypatch):
    """What a test sets is set back."""
    monkeypatch.setattr(paths, "_chosen", None)
    monkeypatch.setattr(profile, "_chosen", None)


@pytest.mark.parametrize(
    ("setter", "getter"),
    [
        (config.set_cache_directory, config.get_cache_directory),
        (config.set_profile_file, config.get_profile_file),
    ],
)
def test_paths(setter, getter, restore_paths, monkeypatch, tmp_path):
    before = getter()
    monkeypatch.chdir(tmp_path)
    for path in ("place", Path("place"), tmp_path / "place"):
        setter(path)
        monkeypatch.chdir("/")  # a path stays what it was when it was set
        assert getter() == tmp_path / "place"
        monkeypatch.chdir(tmp_path)
        setter(None)
        assert getter() == before
    for bad, exception in (
        (1, TypeError),
        (b"place", TypeError),
        ("", ValueError),
        ("~nobody-of-this-name", ValueError),
    ):
        with pytest.raises(exception, match="must be a path"):
            setter(bad)
        assert getter() == before


def test_what_is_kept_goes_to_the_folder_that_is_set(restore_paths, tmp_path):
    config.set_cache_directory(tmp_path / "cache")
    with nbfftconv.store.cache_folder() as folder:
        folder.replace("name", b"content")
    assert (tmp_path / "cache" / "name").read_bytes() == b"content"


def test_plans_follow_the_profile_that_is_set(restore_paths, monkeypatch, tmp_path):
    monkeypatch.delenv(environment.PROFILE)
    config.set_profile_file(tmp_path / "profile.json")
    profile.remember(threads=(2, 1))
    assert json.loads((tmp_path / "profile.json").read_text())["threads"] == {"loops": 2, "library": 1}
    assert profile.get_profile().threads == (2, 1)
    config.set_profile_file(tmp_path / "other.json")
    assert profile.get_profile().threads is None


@pytest.mark.parametrize("figure", ["flops", "bandwidth"])
@pytest.mark.parametrize(
    ("value", "exception"),
    [
        (-1, ValueError), (0, ValueError), (math.inf, ValueError), (math.nan, ValueError), ("fast", TypeError),
        (None, TypeError), (True, TypeError), (1j, TypeError),
    ],
)  # fmt: skip
def test_a_machine_has_figures(figure, value, exception):
    with pytest.raises(exception, match=figure):
        machine.Machine(**{"flops": 1e9, "bandwidth": 1e9} | {figure: value})


def test_a_machine_is_a_machine():
    before = machine.get_machine()
    with pytest.raises(TypeError, match="165"):
        machine.set_machine((165e9, 25e9))
    assert machine.get_machine() is before
    assert machine.Machine(np.float32(2), 3) == machine.Machine(2.0, 3.0)


# The environment -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), (" 42 ", 42), ("4,3", 4), ("0", None), ("-1", None), ("", None), ("all", None), ("1" * 5000, None)],
)
def test_numbers_of_threads(text, number, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert environment.number_of_threads(environment.OPENMP_THREADS) == number
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment.number_of_threads(environment.OPENMP_THREADS) is None


@pytest.mark.parametrize(("text", "is_bad"), [("8", False), ("", False), (" ", False), ("8k", True), ("4,3", True)])
def test_numbers_of_bytes(text, is_bad, monkeypatch, recwarn):
    monkeypatch.setenv(environment.SCRATCH_BYTES, text)
    assert environment.number_of_bytes(environment.SCRATCH_BYTES) == (8 if text == "8" else None)
    assert [repr(text) in str(warning.message) for warning in recwarn] == [True] * is_bad


def test_variables_are_read_in_one_place():
    package = Path(nbfftconv.__file__).parent
    readers = {path.name for path in package.rglob("*.py") if "environ." in path.read_text(encoding="utf-8")}
    assert readers == {"environment.py"}


# Threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "quota"),
    [
        ("max 100000\n", None),
        ("150000 100000\n", 1.5),
        ("garbage 100000\n", None),
        ("100000 period\n", None),
        ("100000 0\n", None),
        ("-1 100000\n", None),
        ("1e5 100000\n", None),
        (b"\xff\xfe 1", None),
        ("", None),
        ("1 2 3", None),
    ],
)
def test_quota(content, quota, tmp_path):
    """Whatever is there, nothing is raised."""
    file = tmp_path / "cpu.max"
    file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)
    assert threads._cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("texts", "quota"),
    [(("-1", "100000"), None), (("50000\n", "100000\n"), 0.5), (("many", "100000"), None), (("1", "no"), None)],
)
def test_quota_of_the_first_version(texts, quota, tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, text in zip(("quota", "period"), texts, strict=True):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(text)
    assert threads._cpu_quota(tmp_path) == quota
    assert threads._cpu_quota(tmp_path / "nothing") is None


def test_a_quota_bounds_the_threads(monkeypatch):
    monkeypatch.setattr(threads.numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for quota, count in ((None, 8), (0.5, 1), (2.5, 3), (100.0, 8)):
        monkeypatch.setattr(threads, "_cpu_quota", lambda quota=quota: quota)
        assert threads.available() == count


def test_threads_know_no_planner_and_no_profile():
    """Nor does anything that they import."""
    package = Path(nbfftconv.__file__).parent
    seen, rest = set(), {"threads"}
    while rest:
        name = rest.pop()
        seen.add(name)
        tree = ast.parse((package / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nbfftconv"):
                inner = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                rest |= {each for each in inner if (package / f"{each}.py").exists()} - seen
    assert "jit" in seen and "store" in seen
    assert not seen & {"profile", "planner", "plan", "machine", "autotune", "implementations", "config"}


def test_counts_are_asked_for_once_and_when_they_are_needed(monkeypatch):
    asked = []
    monkeypatch.setattr(threads, "_counts", None)
    monkeypatch.setattr(threads, "available", lambda: 4)
    before = threads._measured_counts
    try:
        threads.begin_with(lambda: asked.append(1) or (3, 9))
        assert not asked
        assert threads.get_counts() == threads.get_counts() == (3, 4)
        assert threads.counts_source() == "profile" and len(asked) == 1
        threads.begin_with(lambda: None)
        assert threads.get_counts() == (4, 4)
    finally:
        threads.begin_with(before)


def test_examples(restore_paths):
    for module in (config, memory, paths, profile):
        assert doctest.testmod(module).failed == 0
