"""Starts examples/service on free ports of this machine, makes pictures for it, and asks it from many connections.

For test_service.py and perf/load_service.py. The client is a few lines on sockets, since it shares the cores with what
it asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
#: Seconds until a server has to be ready: on a cold start it compiles.
START = 300
#: Seconds until one that is told to stop has to be gone.
STOP = 60


def environment(**settings: object) -> dict[str, str]:
    """Return the variables of a process that imports what this one does; settings are `SERVICE_` and their names."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "PROMETHEUS_"))}
    paths = {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    return kept | paths | {f"SERVICE_{name.upper()}": str(value) for name, value in settings.items()}


class Server:
    """A server that is ready, with its log in a file.

    Parameters
    ----------
    log : Path
    workers : int
        Of gunicorn; 0 for uvicorn, which has one process.
    settings : object
        Of the service.
    """

    def __init__(self, log: Path, workers: int, **settings: object) -> None:
        self.log, self.workers = log, workers
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        variables = environment(bind=f"127.0.0.1:{self.port}", **settings) | {"WEB_CONCURRENCY": str(workers or 1)}
        if workers:
            arguments = ["gunicorn", "-c", str(EXAMPLES / "service" / "gunicorn.conf.py")]
        else:
            place = ["--app-dir", str(EXAMPLES), "--port", str(self.port), "--timeout-graceful-shutdown", "30"]
            arguments = ["uvicorn", "--factory", "service.app:create_app", *place]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments], env=variables, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            self.wait_until(lambda: self.status("/readyz") == 200, START)
            self.wait_until(lambda: self.metric("service_workers") == max(1, workers), START)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def wait_until(self, is_so, seconds: float) -> None:
        """Look again and again; raise TimeoutError, with the log, if it does not come true."""
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end or self.process.poll() is not None:
                raise TimeoutError(f"status {self.process.poll()}; its log:\n{self.log.read_text()}")
            time.sleep(0.05)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url(path), timeout=30) as answer:
            return answer.read()

    def status(self, path: str) -> int:
        """Return the status of an answer; 0 if there is none."""
        try:
            with urllib.request.urlopen(self.url(path), timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics").decode(), re.M)
        return sum(map(float, found))

    def pids(self) -> list[int]:
        """Return the processes that serve."""
        if not self.workers:
            return [self.process.pid]
        pid = self.process.pid
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def memory(self, field: str = "Rss") -> list[int]:
        """Return bytes of memory of each process that serves."""
        found = []
        for pid in self.pids():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            found.append(sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")))
        return found

    def stop(self) -> int:
        """Ask it to stop, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def serving(log: Path, workers: int, **settings: object) -> Iterator[Server]:
    """Let a server run meanwhile."""
    server = Server(log, workers, **settings)
    try:
        yield server
    finally:
        server.stop()


# Pictures and their answers


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Return uint8 as a file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def pictures(sizes: Sequence[tuple[int, int]], channels: int = 3) -> list[bytes]:
    """Return pictures of waves and noise, of those heights and widths; every third one is JPEG."""
    rng, files = np.random.default_rng(5), []
    for index, (height, width) in enumerate(sizes):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x * rng.uniform(0.02, 0.3) + y * rng.uniform(0.02, 0.3)) for _ in range(channels)]
        pixels = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, channels))
        pixels = pixels.clip(0, 255).astype(np.uint8)
        files.append(png(pixels[..., 0] if channels == 1 else pixels, "JPEG" if index % 3 == 2 else "PNG"))
    return files


_ALONE = """
import json, sys
from service.network import Network
from service.settings import from_environment
network = Network(from_environment())
print(json.dumps([network.answer_alone(bytes.fromhex(body), kind).hex() for kind, body in json.load(sys.stdin)]))
"""


def answers_alone(asked: Sequence[tuple[str, bytes]], **settings: object) -> list[bytes]:
    """Return the answers of a process that computes them one after the other, on one thread."""
    given = json.dumps([(kind, body.hex()) for kind, body in asked])
    command, variables = [sys.executable, "-c", _ALONE], environment(**settings)
    done = subprocess.run(command, env=variables, input=given, capture_output=True, text=True, timeout=START)
    assert done.returncode == 0, done.stderr
    return list(map(bytes.fromhex, json.loads(done.stdout)))


def digest(answer: bytes) -> str:
    """Return a hash of an answer."""
    return hashlib.sha256(answer).hexdigest()


# A client


class Answer(NamedTuple):
    """Status, headers with names in small letters, and the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connection:
    """A connection that is used for one request after the other, and made anew if the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, unless it is."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        return self._streams

    async def post(self, path: str, body: bytes) -> Answer:
        """Return the answer; raise OSError or IncompleteReadError if there is none."""
        reader, writer = await self.open()
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            answer = Answer(int(first.split()[1]), headers, await reader.readexactly(int(headers["content-length"])))
        except BaseException:
            self.close()
            raise
        if headers.get("connection") == "close":
            self.close()
        return answer

    def close(self) -> None:
        """Close it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Load:
    """What a load test has seen.

    Attributes
    ----------
    answered, wrong, refused, broken : int
        Requests with the right answer; with another one, with 503, and with none.
    statuses : Counter
        Of all answers.
    seconds : list of float
        That requests took which were answered.
    """

    answered: int = 0
    wrong: int = 0
    refused: int = 0
    broken: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


class Question(NamedTuple):
    """A request, and the hash of its answer."""

    kind: str
    body: bytes
    digest: str


async def ask(port: int, questions: Sequence[Question], connections: int, seconds: float, most: int = 10**9) -> Load:
    """Ask over so many connections, all the time, until that many seconds or requests are over."""
    load, end, orders = Load(), time.monotonic() + seconds, np.random.default_rng(1).spawn(connections)
    left = most

    async def keep_asking(rng: np.random.Generator) -> None:
        nonlocal left
        connection = Connection(port)
        while time.monotonic() < end and left > 0:
            left -= 1
            question = questions[rng.integers(len(questions))]
            begin = time.monotonic()
            try:
                answer = await connection.post(f"/infer?format={question.kind}", question.body)
            except (OSError, asyncio.IncompleteReadError):
                load.broken += 1
                continue
            load.statuses[answer.status] += 1
            if answer.status == 503:
                load.refused += 1
                await asyncio.sleep(float(answer.headers["retry-after"]) / 10)
            elif answer.status == 200 and digest(answer.body) == question.digest:
                load.answered += 1
                load.seconds.append(time.monotonic() - begin)
            else:
                load.wrong += 1
        connection.close()

    await asyncio.gather(*(keep_asking(rng) for rng in orders))
    return load
