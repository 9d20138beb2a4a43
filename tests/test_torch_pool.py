"""PyTorch's pool of threads: stages run there, within its limits, in forked and in spawned processes."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
nt = pytest.importorskip("nbfftconv.torch")
from nbfftconv import threads  # noqa: E402
from nbfftconv.torch import pool  # noqa: E402

needs_the_pool = pytest.mark.skipif(threads._host_pool is None, reason="PyTorch has another kind of pool")


class Images(torch.utils.data.Dataset):
    """Convolves in the processes that load data."""

    def __init__(self, x, w):
        self.x, self.w = x, w

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return nt.conv2d(self.x, self.w)


X, W = torch.randn(2, 32, 40, 40), torch.randn(32, 32, 3, 3)


def results(count):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return nt.conv2d(X, W, padding=1)
    finally:
        torch.set_num_threads(before)


@needs_the_pool
def test_limits_of_pytorch_hold(monkeypatch, restore_threads):
    asked, run = [], threads.HostPool.run

    def note(self, table, count, threads, nanoseconds):
        asked.append(threads)
        run(self, table, count, threads, nanoseconds)

    monkeypatch.setattr(threads.HostPool, "run", note)
    threads.set_num_threads(4)
    monkeypatch.setattr(threads.numba.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(threads, "_WORTH_WAKING", 0)
    found = [results(count) for count in (1, 2, 3)]
    assert set(asked) == {2, 3}  # one thread needs no pool
    assert all(torch.equal(each, found[0]) for each in found)


@needs_the_pool
def test_rounds(monkeypatch, restore_threads):
    """With rounds of no time, each thread does one item a round; the results are the same."""
    threads.set_num_threads(2)
    monkeypatch.setattr(threads.numba.config, "NUMBA_NUM_THREADS", 2)
    monkeypatch.setattr(threads, "_WORTH_WAKING", 0)
    expected, rounds, run = results(2), [], threads.HostPool.run

    def count(self, table, count, threads, nanoseconds):
        rounds.append(nanoseconds)
        run(self, table, count, threads, nanoseconds)

    monkeypatch.setattr(threads, "_ROUND", 0)
    monkeypatch.setattr(threads.HostPool, "run", count)
    assert torch.equal(results(2), expected)
    assert len(rounds) > 3
    assert set(rounds) == {0}


@needs_the_pool
def test_any_number_of_threads_at_once():
    expected = results(1)
    with ThreadPoolExecutor(6) as executor:
        for found in executor.map(lambda _: nt.conv2d(X, W, padding=1), range(24)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_processes_that_load_data(context):
    torch.manual_seed(0)
    x, w = torch.randn(8, 30, 30), torch.randn(8, 8, 3, 3)
    expected = nt.conv2d(x, w)
    loader = torch.utils.data.DataLoader(Images(x, w), num_workers=2, multiprocessing_context=context, timeout=120)
    for batch in loader:
        torch.testing.assert_close(batch[0], expected)


FORK = """
import os, sys
{first}
import torch, nbfftconv.torch as nt
x, w = torch.ones(2, 32, 40, 40), torch.ones(32, 32, 3, 3)
expected = nt.conv2d(x, w)
torch.mm(torch.ones(400, 400), torch.ones(400, 400))
child = os.fork()
if child == 0:
    found = nt.conv2d(x, w)  # to compare them by PyTorch would wait for its parent's threads
    os._exit(0 if (found.numpy() == expected.numpy()).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("first", ["", "import numpy, nbfftconv; nbfftconv.conv2d(*numpy.ones((2, 1, 64, 9, 9)))"])
def test_a_forked_process_computes(first):
    subprocess.run([sys.executable, "-c", FORK.format(first=first)], check=True, timeout=120)


def test_there_may_be_no_such_pool(monkeypatch):
    monkeypatch.setattr(pool, "run_in", lambda pool: pytest.fail("there is none"))
    monkeypatch.setattr(torch, "__file__", "/nowhere/torch/__init__.py")
    assert not pool.share()
