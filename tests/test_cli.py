"""The command line: its commands, exit codes and messages; what it removes from the cache folder, what not."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nbfftconv
from nbfftconv import cache, jit, paths, profile, store, tune
from nbfftconv.cli import main

POSIX = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are POSIX's")
OTHER = "0123456789abcdef"  # a stamp


def run(*arguments, **environment):
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = [sys.executable, "-m", "nbfftconv", *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder."""
    path = tmp_path / "cache"
    monkeypatch.setenv("NBFFTCONV_CACHE_DIR", str(path))
    path.mkdir(mode=0o700)
    return path


def write(folder: Path, *names: str) -> list[Path]:
    """Write files of 1000 bytes."""
    made = [folder / name for name in names]
    for path in made:
        for parent in (path.parent.parent, path.parent):
            if folder in parent.parents:
                parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(bytes(1000))
    return made


def ours(folder: Path) -> dict[str, list[Path]]:
    """Write a file or two of each kind."""
    code, other = f"kernels/{jit.stamp()}", f"kernels/{OTHER}"
    return {
        "machine code": write(folder, f"{code}/{'a' * 64}.kernel", f"{code}/{'b' * 64}.kernel"),
        "machine code of other versions": write(folder, f"{other}/{'a' * 64}.kernel", f"{other}/.{'0' * 16}.tmp"),
        "wisdom": write(folder, "fftw-wisdom.json", "fftw-wisdom.json.lock"),
        "machine": write(folder, "machine-0123abcd.json", "machine-0123abcd.json.lock"),
        "profile": write(folder, "profile-0123abcd.json", "profile-0123abcd.json.ignored"),
        "unfinished": write(folder, f".{'1' * 16}.tmp"),
    }


def foreign(folder: Path) -> list[Path]:
    """Write what the package has not written, beside what it has."""
    names = (
        "notes.txt", "profile.json", "machine-0123abcd.json.bak", "wisdom.json", "kernels/mine.kernel",
        f"kernels/{OTHER}/notes.txt", f"kernels/{OTHER}/{'a' * 63}.kernel", f"kernels/precious/{'a' * 64}.kernel",
        f"kernels/{OTHER}/{'A' * 64}.kernel", f"{'a' * 64}.kernel",
    )  # fmt: skip
    return write(folder, *names)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


# Commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["train"], "train"),
        (["cache"], "ACTION"),
        (["cache", "burn"], "burn"),
        (["cache", "size", "--keep-profile"], "--keep-profile"),
        (["demo", "--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["demo", "--epochs", "many"], "invalid int value: 'many'"),
        (["demo", "--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["tune"], "LAYER"),
        (["tune", "k31", "--rounds", "0"], "--rounds"),
        (["info", "more"], "more"),
    ],
)
def test_arguments_that_are_no_good(arguments, word, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo"], ["info"], ["cache"], ["cache", "clear"], ["cache", "prune"], ["tune"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: nbfftconv {' '.join(command)} " in capsys.readouterr().out


def test_help_imports_what_it_needs():
    """No pictures, no demo, and what is measured is not."""
    code = """
import sys
from nbfftconv.cli import main
before = set(sys.modules)
try:
    main(["--help"])
except SystemExit:
    heavy = {"matplotlib", "rich", "mlxtend", "nbfftconv.tune", "nbfftconv.demo", "nbfftconv.cache"}
    sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command in done.stdout for command in ("demo", "info", "cache", "tune"))


def test_the_command_that_is_installed():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nnbfftconv = "nbfftconv.cli:main"\n' in text
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"nbfftconv {nbfftconv.__version__}\n")


def test_info(folder, capsys):
    write(folder, "fftw-wisdom.json")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in (nbfftconv.__version__, np.__version__, "llvmlite", store.fingerprint().partition(",")[0], "registers"):
        assert text in printed
    assert re.search(r"^cache size +1 file, 0\.0 MiB$", printed, re.MULTILINE)
    assert re.search(rf"^cache directory +{re.escape(str(folder))} +environment", printed, re.MULTILINE)
    assert re.search(rf"^threads +{nbfftconv.get_num_threads()} ", printed, re.MULTILINE)


def test_errors_of_the_system_are_messages(tmp_path, capsys, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "results")

    monkeypatch.setattr(cache, "size", refuse)
    assert main(["cache", "size"]) == 1
    assert capsys.readouterr().err == "nbfftconv: error: [Errno 13] Permission denied: 'results'\n"


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "size", interrupt)
    assert main(["cache", "size"]) == 130
    assert capsys.readouterr().err == "nbfftconv: interrupted\n"


@POSIX
def test_a_reader_that_is_gone(folder):
    read, write_end = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "nbfftconv", "info"]
    done = subprocess.run(command, env=environment, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


# The cache -------------------------------------------------------------------------------------------


def test_path(folder, capsys):
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_size(folder, capsys):
    expected = {kind: len(made) for kind, made in ours(folder).items()}
    foreign(folder)
    assert {kind: amount.files for kind, amount in cache.size().items()} == expected
    assert {amount.nbytes for amount in cache.size().values()} == {1000, 2000}
    assert main(["cache", "size"]) == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == [*cache.KINDS, "in all"]
    assert lines["in all"].startswith(f"{sum(expected.values())} files, ")


def test_clear_removes_ours_and_nothing_else(folder, capsys):
    made = ours(folder)
    others = foreign(folder)
    assert main(["cache", "clear"]) == 0
    assert files(folder) == set(others)
    assert f"removed {sum(map(len, made.values()))} files" in capsys.readouterr().out
    assert not (folder / "kernels" / jit.stamp()).exists() and (folder / "kernels" / OTHER).exists()
    assert main(["cache", "clear"]) == 0
    assert "removed 0 files" in capsys.readouterr().out


def test_clear_leaves_an_empty_folder(folder):
    ours(folder)
    main(["cache", "clear"])
    assert folder.is_dir() and not list(folder.iterdir())


def test_clear_can_keep_the_profile(folder):
    made = ours(folder)
    assert main(["cache", "clear", "--keep-profile"]) == 0
    assert files(folder) == set(made["profile"])


def test_prune_removes_code_of_other_versions(folder, capsys):
    made, others = ours(folder), foreign(folder)
    empty = folder / "kernels" / ("f" * 16)
    empty.mkdir(mode=0o700)
    assert main(["cache", "prune"]) == 0
    gone = made.pop("machine code of other versions")
    assert files(folder) == {*others, *(path for paths in made.values() for path in paths)}
    assert not empty.exists()
    assert f"removed {len(gone)} files" in capsys.readouterr().out


def test_prune_knows_its_own_version(folder, monkeypatch, capsys):
    made = ours(folder)
    monkeypatch.setattr(jit, "_STAMP", None)
    assert main(["cache", "prune"]) == 1
    assert "error" in capsys.readouterr().err
    assert files(folder) == {path for paths in made.values() for path in paths}


@pytest.mark.parametrize("action", ["path", "size", "clear", "prune"])
def test_no_folder_yet(tmp_path, monkeypatch, action):
    monkeypatch.setenv("NBFFTCONV_CACHE_DIR", str(tmp_path / "none"))
    assert main(["cache", action]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["path", "size", "clear", "prune"])
def test_no_home(monkeypatch, action, capsys):
    monkeypatch.setenv("NBFFTCONV_CACHE_DIR", "~nobody-of-this-name")
    assert main(["cache", action]) == 1
    assert "no home" in capsys.readouterr().err


@POSIX
@pytest.mark.parametrize("action", ["size", "clear", "prune"])
@pytest.mark.parametrize("inner", ["", "kernels", f"kernels/{OTHER}"])
def test_a_folder_that_others_may_write(folder, action, inner, capsys):
    """What is in it may be anybody's: nothing there is counted or removed."""
    made = ours(folder)
    (folder / inner).chmod(0o777)
    assert main(["cache", action]) == 1
    assert "not used as a cache" in capsys.readouterr().err
    assert {path for path in files(folder) if folder / inner in path.parents} >= {
        path for paths in made.values() for path in paths if folder / inner in path.parents
    }


@POSIX
def test_links_are_not_followed(folder, tmp_path):
    """Neither to files nor to folders; and they stay, as the package has made none."""
    (target,) = write(tmp_path, "precious")
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (inside,) = write(tmp_path / "elsewhere", f"{'a' * 64}.kernel")
    link = folder / "fftw-wisdom.json"
    link.symlink_to(target)
    assert main(["cache", "clear"]) == 0
    assert link.is_symlink() and target.exists() and inside.exists()
    (folder / "machine-0123abcd.json").mkdir()
    assert main(["cache", "clear"]) == 0
    assert (folder / "machine-0123abcd.json").is_dir()


def test_a_file_in_place_of_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBFFTCONV_CACHE_DIR", str(tmp_path / "file"))
    write(tmp_path, "file")
    assert main(["cache", "clear"]) == 0
    assert (tmp_path / "file").exists()


def test_what_the_package_writes_is_known(folder, monkeypatch):
    """Every file of a computation, of a plan and of a profile has a kind."""
    monkeypatch.delenv("NBFFTCONV_PROFILE", raising=False)
    monkeypatch.setattr(profile, "_profiles", {})

    @jit.njit()
    def add(value):
        return value + 1

    assert add(1) == 2
    profile.remember(threads=(1, 1))
    nbfftconv.machine.Document.of_machine("machine").replace_of_machine("format", {})
    with nbfftconv.transforms.fftw._shared_wisdom():
        pass
    found = cache.size()
    assert found["machine code"].files == 1 and found["machine"].files == 1
    assert found["wisdom"].files == found["profile"].files == 2  # and a lock
    assert sum(amount.files for amount in found.values()) == len(files(folder))
    assert paths.cache_directory() == folder


# Tuning ----------------------------------------------------------------------------------------------


def test_layers_of_tune_are_those_of_the_benchmarks():
    place = Path(__file__).parents[1] / "perf" / "layers.py"
    spec = importlib.util.spec_from_file_location("perf_layers", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which dataclasses look for
    spec.loader.exec_module(module)
    del sys.modules[spec.name]
    assert list(tune.LAYERS) == [layer.name for layer in module.LAYERS]
    for layer in module.LAYERS:
        (found,) = tune.parse_layers(layer.name)
        assert found.name == layer.name
        plan = nbfftconv.plan_conv2d(**found.arguments)
        assert plan == nbfftconv.plan_conv2d(
            layer.input_size, layer.weight_size, padding=layer.padding, groups=layer.groups
        )


def test_a_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_info:
        main(["tune", "k31", "--plot", "plot.png"])
    assert exit_info.value.code == 2
    assert "matplotlib" in capsys.readouterr().err
