"""The service of examples/service under load, with its faults; and how much faster it is than on ONNX Runtime alone.

Under load: two preforked workers and 32 connections that ask for images of mixed sizes, all the time. A third into it a
worker is killed, and at the end the server is told to stop while all connections wait. No answer may be wrong, and none
may be missing but those that the killed worker had under way; memory must not grow in the second half.

Throughput: of EDSR, with the weights of examples/service/make_model.py, and of Topaz-Denoise's fcnn, whose package pip
fetches (see `trained_networks`; it needs PyTorch). A server on this package's engine and one on onnxruntime alone take
turns; the ratio is that of their medians.

The exit status is 1 if anything is not as it has to be.
"""

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rounds import table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import onnx
import service_server as client
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(client.EXAMPLES))
from service.make_model import make_model

WORKERS, CONNECTIONS = 2, 32
#: Connections that ask for what takes long.
FEW_CONNECTIONS = 8
#: Bytes that a worker's memory may rise in the second half.
GROWTH = 16 * 2**20
#: Turns of each engine.
TURNS = 3
ENGINES = "nbfftconv", "onnxruntime"


class Served(NamedTuple):
    """A network, its settings, sizes of images with so many channels, and the least ratio."""

    name: str
    model: onnx.ModelProto
    settings: dict[str, str]
    sizes: list[tuple[int, int]]
    channels: int
    least: float


def fcnn() -> onnx.ModelProto | str:
    """Return Topaz-Denoise's network of three layers of 11 × 11 as ONNX; or why it is not to be had."""
    try:
        import trained_networks
        from torch import nn
    except ImportError as error:
        return str(error)
    if problem := trained_networks.fetch(trained_networks.TOPAZ):
        return problem
    nodes, weights, given = [], [], "image"
    for index, layer in enumerate(trained_networks.make("topaz fcnn").model.net):
        made = f"value{index}"
        if isinstance(layer, nn.Conv2d):
            names = [f"weight{index}", f"bias{index}"]
            for name, values in zip(names, (layer.weight, layer.bias), strict=True):
                weights.append(numpy_helper.from_array(values.numpy(force=True), name))
            nodes.append(helper.make_node("Conv", [given, *names], [made], pads=2 * list(layer.padding)))
        else:
            nodes.append(helper.make_node("LeakyRelu", [given], [made], alpha=layer.negative_slope))
        given = made
    sizes = ["N", 1, "H", "W"]
    graph = helper.make_graph(
        nodes,
        "fcnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info(given, TensorProto.FLOAT, sizes)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def networks() -> Iterator[Served]:
    """Yield what throughput is measured of."""
    edsr_sizes = [(180, 320), (192, 192), (160, 300), (320, 180), (192, 320)]
    yield Served("EDSR", make_model(blocks=16, adds_picture=False), {"sides": "192,320"}, edsr_sizes, 3, 1.5)
    model = fcnn()
    if isinstance(model, str):
        print(f"left out, topaz fcnn: {model}")
        return
    sizes = [(192, 192), (128, 192), (190, 180), (256, 192), (128, 128)]
    yield Served("topaz fcnn", model, {"sides": "128,192,256", "values": "standard"}, sizes, 1, 4.0)


def questions(sizes: list[tuple[int, int]], channels: int, **settings: str) -> list[client.Question]:
    """Return requests for pictures of those sizes, with what one thread answers."""
    asked = [("npy" if index % 2 else "png", body) for index, body in enumerate(client.pictures(sizes, channels))]
    answers = client.answers_alone(asked, **settings)
    return [client.Question(*each, client.digest(answer)) for each, answer in zip(asked, answers, strict=True)]


async def under_load(server: client.Server, asked: list[client.Question], seconds: float) -> list[str]:
    """Return what went wrong."""
    problems, begin = [], time.monotonic()
    asking = asyncio.create_task(client.ask(server.port, asked, CONNECTIONS, seconds))
    await asyncio.sleep(seconds / 3)
    killed, kept = server.pids()
    os.kill(killed, signal.SIGKILL)
    await asyncio.sleep(seconds / 6)
    if len(server.pids()) != WORKERS or killed in server.pids() or kept not in server.pids():
        problems.append(f"worker {killed} was killed of {killed} and {kept}; now there are {server.pids()}")
    used = [server.memory()]
    while time.monotonic() < begin + seconds:
        await asyncio.sleep(min(1.0, max(0.01, begin + seconds - time.monotonic())))
        used.append(server.memory())
    load = await asking
    quarter = max(1, len(used) // 4)
    for first, last in zip(np.max(used[:quarter], axis=0), np.max(used[-quarter:], axis=0), strict=True):
        print(f"memory of a worker: {first / 2**20:.0f} MiB half-way, {last / 2**20:.0f} MiB at the end")
        if last > first + GROWTH:
            problems.append("memory grows")
    waits = np.percentile(load.seconds, [50, 95, 99]) * 1e3
    print(
        f"{load.answered} answers in {seconds:g} s, half of them within {waits[0]:.0f} ms, 95 % within {waits[1]:.0f}, "
        f"99 % within {waits[2]:.0f}; {load.refused} were told to come back; {load.broken} were under way when "
        f"a worker was killed; {load.wrong} wrong"
    )
    if load.wrong or load.broken > CONNECTIONS or set(load.statuses) - {200, 503}:
        problems.append(f"statuses {dict(load.statuses)}, {load.wrong} wrong answers, {load.broken} broken connections")
    return problems


async def stopped_under_load(server: client.Server, asked: list[client.Question]) -> list[str]:
    """Return what went wrong."""
    connections = [client.Connection(server.port) for _ in range(CONNECTIONS)]
    question = asked[0]

    def ask_all() -> list["asyncio.Future[client.Answer]"]:
        path = f"/infer?format={question.kind}"
        return [asyncio.ensure_future(each.post(path, question.body)) for each in connections]

    await asyncio.gather(*ask_all())  # all are accepted
    waiting = ask_all()
    await asyncio.sleep(0.1)
    under_way = sum(not each.done() for each in waiting)
    server.process.send_signal(signal.SIGTERM)
    found = await asyncio.gather(*waiting, return_exceptions=True)
    good = sum(isinstance(each, client.Answer) and client.digest(each.body) == question.digest for each in found)
    print(f"told to stop with {under_way} requests under way: {good} of {CONNECTIONS} answered")
    return [] if good == CONNECTIONS else [f"{CONNECTIONS - good} of {CONNECTIONS} got no answer, or a wrong one"]


def endurance(folder: Path, seconds: float) -> list[str]:
    """Let a server have a hard time, and return what went wrong."""
    onnx.save(make_model(blocks=1), folder / "small.onnx")
    settings = {"model": str(folder / "small.onnx"), "sides": "32,64,96"}
    sizes = [(64, 64), (1, 1), (32, 32), (33, 20), (64, 40), (7, 64), (50, 50), (96, 96), (20, 30), (96, 31)]
    asked = questions(sizes, 3, **settings)
    with client.serving(folder / "endurance.log", WORKERS, **settings) as server:
        problems = asyncio.run(under_load(server, asked, seconds))
        return problems + asyncio.run(stopped_under_load(server, asked))


def throughput(folder: Path, served: Served, seconds: float) -> tuple[list[str], list[str]]:
    """Return a row of the table, and what went wrong."""
    path = folder / f"{served.name}.onnx"
    onnx.save(served.model, path)
    servers, asked, problems = {}, {}, []
    rates: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    try:
        for engine in ENGINES:
            settings = served.settings | {"model": str(path), "engine": engine}
            asked[engine] = questions(served.sizes, served.channels, **settings)
            servers[engine] = client.Server(folder / f"{engine}.log", WORKERS, **settings)
        for _ in range(TURNS):
            for engine, server in servers.items():
                begin = time.monotonic()
                load = asyncio.run(client.ask(server.port, asked[engine], FEW_CONNECTIONS, seconds / (2 * TURNS)))
                rates[engine].append(load.answered / (time.monotonic() - begin))
                if load.wrong or load.broken:
                    problems.append(f"{served.name} on {engine}: {load.wrong} wrong, {load.broken} without an answer")
    finally:
        for server in servers.values():
            server.stop()
    if problems:
        return [served.name, "-", "-", "-", f"{served.least}"], problems
    ours, others = (statistics.median(rates[engine]) for engine in ENGINES)
    if ours < served.least * others:
        problems.append(f"{served.name}: {ours / others:.2f} times the throughput, less than {served.least}")
    return [served.name, f"{ours:.1f}", f"{others:.1f}", f"{ours / others:.2f}", f"{served.least}"], problems


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description="The service under load, and its throughput on both engines.")
    parser.add_argument("--seconds", type=float, default=60, help="of the load, and of each network's throughput")
    parser.add_argument("--only", choices=["endurance", "throughput"])
    given = parser.parse_args()
    problems, rows = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.only != "throughput":
            problems += endurance(folder, given.seconds)
        if given.only != "endurance":
            for served in networks():
                row, found = throughput(folder, served, given.seconds)
                rows.append(row)
                problems += found
            print(table(["network", "nbfftconv, images/s", "onnxruntime, images/s", "ratio", "at least"], rows))
    for problem in problems:
        print(f"wrong: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
