"""The service of examples/service: real servers on loopback, under load, with bad images, killed workers, slow clients.

A load test of a minute, and how much faster it is than ONNX Runtime alone, is perf/load_service.py.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

for _module in (
    "starlette",
    "uvicorn",
    "uvicorn_worker",
    "gunicorn",
    "onnxruntime",
    "onnx",
    "PIL",
    "prometheus_client",
):
    pytest.importorskip(_module)
if not Path("/proc/self/smaps_rollup").exists():
    pytest.skip("looks at processes as Linux has them", allow_module_level=True)

import onnx  # noqa: E402
from PIL import Image  # noqa: E402
from service_server import (  # noqa: E402
    EXAMPLES,
    Connection,
    Question,
    Server,
    answers_alone,
    ask,
    digest,
    pictures,
    png,
    serving,
)

sys.path.insert(0, str(EXAMPLES))
from service import images, settings  # noqa: E402
from service.batching import Batcher, Full, Job  # noqa: E402
from service.images import Refusal  # noqa: E402
from service.make_model import make_model  # noqa: E402
from service.network import ModelError, Network  # noqa: E402

SIDES = (32, 64)
SIZES = [(64, 64), (1, 1), (32, 32), (33, 20), (64, 40), (7, 64), (50, 50), (32, 64), (20, 30)]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, object]:
    """Settings of a small network, of which some convolutions are computed here."""
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(make_model(blocks=1), path)
    return {"model": path, "sides": ",".join(map(str, SIDES))}


@pytest.fixture(scope="module")
def questions(given) -> list[Question]:
    """Requests of mixed sizes, with what a process of one thread answers."""
    kinds = ["png", "npy", "png", "features"]
    asked = [(kinds[index % 4], body) for index, body in enumerate(pictures(SIZES * 2))]
    answers = answers_alone(asked, **given)
    return [Question(*each, digest(answer)) for each, answer in zip(asked, answers, strict=True)]


@pytest.fixture(scope="module")
def forked(given, questions, tmp_path_factory):
    """Gunicorn with two workers; `questions` first, which compiles."""
    with serving(tmp_path_factory.mktemp("gunicorn") / "log", 2, **given, body_seconds=2) as server:
        yield server


def post(server: Server, body: bytes, path: str = "/infer"):
    return asyncio.run(_post(server.port, path, body))


async def _post(port: int, path: str, body: bytes):
    connection = Connection(port)
    try:
        return await connection.post(path, body)
    finally:
        connection.close()


def header_of(width: int, height: int) -> bytes:
    """Return a PNG that says that it is large, and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# Under load


def test_answers_under_load_are_those_of_one_thread(forked, questions):
    load = asyncio.run(ask(forked.port, questions, connections=32, seconds=6))
    assert load.wrong == load.broken == load.refused == 0, load
    assert load.answered > 40 and set(load.statuses) == {200}
    assert forked.metric("service_batch_images_sum") >= load.answered
    if max(json.loads(forked.get("/info"))["batches"].values()) > 1:  # of the same bits, which depends on the plans
        assert forked.metric("service_batch_images_count") < forked.metric("service_batch_images_sum")
    assert forked.metric("service_workers") == 2


def test_memory_stays(forked, questions):
    before = forked.memory()
    asyncio.run(ask(forked.port, questions, connections=32, seconds=5))
    for first, last in zip(before, forked.memory(), strict=True):
        assert last < first + 24 * 2**20


def test_kernels_are_shared(tmp_path):
    """What a worker has of its own, once it has met all sizes, is much less than the kernels that it computes with."""
    model = model_of(
        """(float[N, 1, H, W] x) => (float[N, 1, H, W] y) {
            head = Constant <value_ints = [192, 1, 9, 9]> ()
            body = Constant <value_ints = [192, 192, 9, 9]> ()
            tail = Constant <value_ints = [1, 192, 9, 9]> ()
            a = ConstantOfShape <value: tensor = float[1] {0.01}> (head)
            b = ConstantOfShape <value: tensor = float[1] {0.0001}> (body)
            c = ConstantOfShape <value: tensor = float[1] {0.01}> (tail)
            first = Conv <pads = [4, 4, 4, 4]> (x, a)
            second = Conv <pads = [4, 4, 4, 4]> (first, b)
            y = Conv <pads = [4, 4, 4, 4]> (second, c)
        }"""
    )
    onnx.save(model, tmp_path / "model.onnx")
    bodies = pictures([(height, width) for height in SIDES for width in SIDES], channels=1)
    with serving(tmp_path / "log", 2, model=tmp_path / "model.onnx", sides="32,64", batch=1) as server:
        for _ in range(4):
            assert {post(server, body).status for body in bodies} == {200}
        kernels = json.loads(server.get("/info"))["kernel_bytes"]
        assert kernels > 60 * 2**20
        assert max(server.memory("Private_Dirty")) < kernels / 2


def test_a_killed_worker_is_replaced(forked, questions):
    before = forked.pids()

    async def ask_and_kill():
        asking = asyncio.create_task(ask(forked.port, questions, connections=16, seconds=4))
        await asyncio.sleep(1.5)
        os.kill(before[0], signal.SIGKILL)
        return await asking

    load = asyncio.run(ask_and_kill())
    assert load.wrong == 0 and load.answered > 20
    assert load.broken <= 16  # no connection fails more than once
    assert set(load.statuses) == {200}
    forked.wait_until(lambda: len(forked.pids()) == 2 and before[0] not in forked.pids(), 10)
    assert before[1] in forked.pids()
    forked.wait_until(lambda: forked.metric("service_workers") == 2, 10)


def test_a_full_queue_says_when_to_come_back(given, questions, tmp_path):
    with serving(tmp_path / "log", 2, **given, queue=1) as server:
        load = asyncio.run(ask(server.port, questions, connections=32, seconds=3))
        assert load.wrong == load.broken == 0
        assert load.refused > 0 and load.answered > 5
        assert set(load.statuses) == {200, 503}


@pytest.mark.parametrize("workers", [0, 2], ids=["uvicorn", "gunicorn"])
def test_sigterm_finishes_what_is_under_way(workers, given, questions, tmp_path):
    server = Server(tmp_path / "log", workers, **given)

    chosen = next(question for question in questions if question.kind == "png")

    async def ask_and_stop():
        connections = [Connection(server.port) for _ in range(40)]

        def ask_all():
            return [asyncio.ensure_future(each.post("/infer", chosen.body)) for each in connections]

        await asyncio.gather(*ask_all())  # all connections are accepted
        asked = ask_all()
        await asyncio.sleep(0.1)
        are_done = sum(each.done() for each in asked)
        server.process.send_signal(signal.SIGTERM)
        return are_done, await asyncio.gather(*asked)

    try:
        load = asyncio.run(ask(server.port, questions, connections=4, seconds=30, most=60))
        assert load.answered == 60
        are_done, found = asyncio.run(ask_and_stop())
        assert are_done < 40
        assert [answer.status for answer in found] == [200] * 40
        assert {digest(answer.body) for answer in found} == {chosen.digest}
    finally:
        status = server.stop()
    assert status in (0, -signal.SIGTERM), server.log.read_text()  # uvicorn ends by the signal that it was sent
    assert server.status("/healthz") == 0


# What should not be sent


def test_bad_images(forked):
    (body,) = pictures([(40, 40)])
    jpeg = pictures([(64, 64)] * 3)[2]
    for bad, status, says in (
        (b"", 422, "empty"),
        (b"hello", 422, "no image"),
        (b"GIF89a" + bytes(100), 422, "no image"),
        (os.urandom(5000), 422, "no image"),
        (body[:20], 422, "no image"),
        (body[: len(body) // 2], 422, "damaged or cut off"),
        (jpeg[: len(jpeg) // 2], 422, "damaged or cut off"),
        (header_of(65, 10), 413, "65 × 10 pixels; at most 64 × 64"),
        (header_of(10_000, 5_000), 413, "10000 × 5000 pixels"),
        (header_of(2**31 - 1, 2**31 - 1), 413, "at most 64 × 64"),
        (header_of(60, 60), 422, "damaged or cut off"),
        (bytes(9 * 2**20), 413, "8388608 bytes"),
    ):
        answer = post(forked, bad)
        assert answer.status == status and says in answer.body.decode(), (bad[:20], answer)
    assert post(forked, body, "/infer?format=gif").status == 422
    assert post(forked, body).status == 200


def test_a_bomb_is_not_decoded(forked):
    """Of 50 megapixels, in some 50 KB."""
    body = png(np.zeros((5000, 10_000), np.uint8))
    assert len(body) < 100_000
    answer = post(forked, body)
    assert answer.status == 413
    assert max(forked.memory()) < 2**30


def test_mutilated_images_leave_it_serving(forked):
    rng, files = random.Random(2), pictures([(40, 40)] * 3)
    for _ in range(60):
        body = bytearray(rng.choice(files))
        for _ in range(rng.randint(1, 20)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        assert post(forked, bytes(body)).status in (200, 413, 422)


def test_one_pixel(forked):
    answer = post(forked, png(np.full((1, 1, 3), 200, np.uint8)))
    assert Image.open(io.BytesIO(answer.body)).size == (2, 2)


def test_a_thousand_connections_that_send_nothing(forked, questions):
    idle = []
    try:
        for number in range(1000):
            connection = socket.create_connection(("127.0.0.1", forked.port))
            if number % 2:
                connection.sendall(b"POST /infer HTTP/1.1\r\nHost: a\r\n")
            idle.append(connection)
        load = asyncio.run(ask(forked.port, questions, connections=8, seconds=10, most=100))
        assert load.answered == 100
    finally:
        for connection in idle:
            connection.close()


def test_an_upload_that_does_not_end(forked):
    with socket.create_connection(("127.0.0.1", forked.port)) as connection:
        connection.settimeout(20)
        connection.sendall(b"POST /infer HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_an_upload_without_a_length(forked):
    """In chunks, of more bytes than are taken."""
    with socket.create_connection(("127.0.0.1", forked.port)) as connection:
        connection.settimeout(20)
        connection.sendall(b"POST /infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
        for _ in range(9):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_an_upload_that_is_far_too_large(forked):
    """It is not read at all."""
    with socket.create_connection(("127.0.0.1", forked.port)) as connection:
        connection.settimeout(20)
        connection.sendall(b"POST /infer HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_asks_before_it_sends(forked):
    with socket.create_connection(("127.0.0.1", forked.port)) as connection:
        connection.settimeout(20)
        head = "POST /infer HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n"
        connection.sendall(head.format(9 * 2**20).encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_leaves(forked):
    (body,) = pictures([(64, 64)])
    head = f"POST /infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (head, head + body[:100], head + body):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", forked.port)) as connection:
                connection.sendall(sent)
    assert post(forked, body).status == 200


# What else it says


def test_information(forked):
    assert forked.get("/healthz") == b"ok\n" and forked.get("/readyz") == b"ready\n"
    assert json.loads(forked.get("/info"))["convolutions_here"] > 0
    assert b"<!doctype html>" in forked.get("/").lower()[:100]
    assert forked.status("/nothing") == 404
    assert forked.metric("service_requests_total") > 0


def test_settings_that_are_wrong(given):
    for name, value in (
        ("model", "/nowhere.onnx"), ("engine", "torch"), ("sides", "64,x"), ("sides", "0"), ("values", "z"),
        ("queue", "-1"), ("threads", "many"), ("batch_wait", "100"),
    ):  # fmt: skip
        with pytest.raises(settings.SettingError, match=f"SERVICE_{name.upper()}: must be"):
            settings.from_environment({f"SERVICE_{name.upper()}": value})
    found = settings.from_environment({"SERVICE_SIDES": "96, 32,96", "SERVICE_BATCH_WAIT": "0", "SERVICE_QUEUE": " "})
    assert found.sides == (32, 96) and found.batch_wait == 0 and found.queue == 64


# In this process


def network_of(model: onnx.ModelProto, tmp_path: Path, **given: object) -> Network:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return Network(settings.Settings(model=path, engine="onnxruntime", **given))


def model_of(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> net {text}')


def test_both_engines_agree(given, tmp_path):
    """On the image filled up to its shape; what is answered is cut back to the image."""
    (body,) = pictures([(30, 50)])
    network = Network(settings.Settings(model=given["model"], engine="onnxruntime", sides=(32, 64)))
    pixels = np.load(io.BytesIO(network.answer_alone(body, "npy")))
    assert pixels.shape == (60, 100, 3) and pixels.dtype == np.float32
    seen = np.asarray(Image.open(io.BytesIO(network.answer_alone(body))))
    assert np.array_equal(seen, np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))
    large = np.asarray(Image.open(io.BytesIO(body)).resize((100, 60), Image.Resampling.BICUBIC)) / 255
    assert np.abs(large - pixels).mean() < 0.05  # it is the picture, enlarged
    assert Image.open(io.BytesIO(network.answer_alone(body, "features"))).size == (3 * 50 + 2, 4 * 30 + 3)
    (answer,) = answers_alone([("npy", body)], **given)
    assert np.allclose(np.load(io.BytesIO(answer)), pixels, rtol=0, atol=1e-5)


@pytest.mark.parametrize("values", settings.VALUES)
def test_values_and_maps(values, tmp_path):
    """A network that changes nothing gives the image back; a map is stretched."""
    model = model_of("(float[N, 1, H, W] x) => (float[N, 1, H, W] y) { y = Identity (x) }")
    body = pictures([(20, 30)], channels=1)[0]
    given = np.asarray(Image.open(io.BytesIO(body)))
    network = network_of(model, tmp_path, sides=(32,), values=values)
    assert np.array_equal(Image.open(io.BytesIO(network.answer_alone(body))), given)
    assert network.describe()["features"] is False
    network = network_of(model, tmp_path, sides=(32,), values=values, output="map")
    seen = np.asarray(Image.open(io.BytesIO(network.answer_alone(body))))
    assert seen.min() == 0 and seen.max() == 255


def test_a_map_smaller_than_the_image(tmp_path):
    model = model_of(
        """(float[N, 3, 64, 64] x) => (float[N, 1, 16, 16] y) {
            m = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (x)
            y = ReduceMean <axes = [1]> (m)
        }"""
    )
    network = network_of(model, tmp_path, output="map")
    body = pictures([(33, 64)])[0]
    assert Image.open(io.BytesIO(network.answer_alone(body))).size == (16, 9)
    with pytest.raises(Refusal, match="at most 64 × 64"):
        network.shape_for((65, 2))


def test_feature_maps_are_those_of_the_first_convolution(tmp_path):
    model = model_of(
        """(float[N, 1, H, W] x) => (float[N, 1, H, W] y) {
            size = Constant <value_ints = [1, 1, 3, 3]> ()
            w = ConstantOfShape <value: tensor = float[1] {0.1}> (size)
            a = Conv <pads = [1, 1, 1, 1]> (x, w)
            b = Relu (a)
            y = Conv <pads = [1, 1, 1, 1]> (b, w)
        }"""
    )
    network = network_of(model, tmp_path, sides=(32,))
    assert network.describe()["features"]
    body = pictures([(20, 30)], channels=1)[0]
    assert Image.open(io.BytesIO(network.answer_alone(body, "features"))).size == (30, 20)


def test_batches_have_the_bits_of_their_images(given):
    network = Network(settings.Settings(model=given["model"], engine="onnxruntime", sides=(32,), batch=4))
    arrays = [network.fill(images.decode(body, 3))[0] for body in pictures([(32, 32), (20, 32), (9, 9)] * 2 + [(1, 1)])]
    found, batches = network.run(arrays, with_features=True)
    assert sum(batches) == 7 and batches[0] == network.most((32, 32))
    for array, together in zip(arrays, found, strict=True):
        (alone,), _ = network.run([array], with_features=True)
        assert alone.keys() == together.keys() == {"output", "features"}
        assert all(np.array_equal(alone[name], together[name]) for name in alone)


@pytest.mark.parametrize(
    "text, says",
    [
        ("(float[N, 5, H, W] x) => (float[N, 5, H, W] y) { y = Relu (x) }", "1 or 3 channels; this one takes 5"),
        ("(float[4, 3, H, W] x) => (float[4, 3, H, W] y) { y = Relu (x) }", "batches of 1, or of any size"),
        ("(float[N, 3] x) => (float[N, 3] y) { y = Relu (x) }", "one batch of images"),
        (
            "(float[N, 3, H, W] x) => (float[N, 3, 1] y) { y = ReduceMax <axes = [3], keepdims = 0> (x) }",
            "first output",
        ),
    ],
)
def test_models_that_cannot_be_served(text, says, tmp_path):
    with pytest.raises(ModelError, match=says):
        network_of(model_of(text), tmp_path, sides=(32,))


def test_sixteen_bits():
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    assert np.allclose(images.decode(png(pixels), 1), pixels / 65535)
    assert np.array_equal(images.decode(png(pixels), 3)[1:], images.decode(png(pixels), 1).repeat(2, 0))
    assert images.decode(png(pixels.astype(np.uint8)), 3).shape == (3, 3, 4)


def test_a_queue_collects_jobs_of_a_shape():
    seen, is_free = [], threading.Event()

    def compute(jobs: list[Job]) -> None:
        is_free.wait(10)
        seen.append([job.size for job in jobs])
        for job in jobs:
            job.future.set_result(b"")

    batcher = Batcher(compute, lambda shape: 4, threads=1, limit=8, wait=0.05)
    first = Job(b"", (0, 0), (9, 9), "png")
    batcher.put(first)
    while len(batcher):  # taken
        time.sleep(0.01)
    jobs = [Job(b"", (n, n), (1, 1) if n % 2 else (2, 2), "png") for n in range(8)]
    for job in jobs:
        batcher.put(job)
    with pytest.raises(Full):
        batcher.put(Job(b"", (9, 9), (1, 1), "png"))
    assert not batcher.is_working()
    jobs[2].future.cancel()
    is_free.set()
    batcher.stop()
    assert seen == [[(0, 0)], [(0, 0), (4, 4), (6, 6)], [(1, 1), (3, 3), (5, 5), (7, 7)]]
    assert all(job.future.done() for job in (first, *jobs))
    with pytest.raises(Full):
        batcher.put(first)


def test_a_batch_that_fails_is_not_the_end():
    def compute(jobs: list[Job]) -> None:
        if jobs[0].body == b"bad":
            raise MemoryError("none")
        jobs[0].future.set_result(b"good")

    batcher = Batcher(compute, lambda shape: 1, threads=1, limit=8, wait=0)
    bad, good = (Job(body, (1, 1), (1, 1), "png") for body in (b"bad", b"good"))
    batcher.put(bad)
    batcher.put(good)
    with pytest.raises(MemoryError):
        bad.future.result(10)
    assert good.future.result(10) == b"good"
    batcher.stop()


# The page


@pytest.fixture
def browser(tmp_path):
    """Chromium without a window, and without anything that it would ask other sites for."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = "background-networking", "component-update", "default-apps", "dev-shm-usage", "gpu", "quic", "sync"
    for argument in ("headless", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in quiet)):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path / 'browser'}")
    options.add_argument("--window-size=1180,1000")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def test_the_page(forked, browser, tmp_path):
    """A sample, a file that is too large, and one that is no picture."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def text(name: str) -> str:
        return browser.find_element(By.ID, name).text

    def size(name: str) -> list[int]:
        return browser.execute_script(
            "const it = document.getElementById(arguments[0]); return [it.naturalWidth, it.naturalHeight]", name
        )

    def shown() -> str:
        return browser.execute_script("return document.body.dataset.shown")

    wait = WebDriverWait(browser, 60)
    browser.get(forked.url("/"))
    wait.until(lambda _: "Engine: nbfftconv, " in text("about"))
    browser.find_element(By.ID, "sample").click()
    wait.until(lambda _: shown() == "1")
    assert size("before") == [64, 64] and size("after") == [128, 128] and size("features") == [3 * 64 + 2, 4 * 64 + 3]
    assert text("sent") == "64 × 64" and text("answered") == "128 × 128" and text("batch") == "1"

    (tmp_path / "large.png").write_bytes(pictures([(300, 600)])[0])
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "large.png"))
    wait.until(lambda _: shown() == "2")
    assert size("before") == [64, 32] and text("sent") == "64 × 32, made smaller"

    browser.execute_script(
        "const slider = document.getElementById('slider'); slider.value = 25; slider.dispatchEvent(new Event('input'))"
    )
    assert browser.find_element(By.ID, "divider").get_attribute("style") == "left: 25%;"

    (tmp_path / "no picture.png").write_bytes(b"hello")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "no picture.png"))
    wait.until(lambda _: "no image that can be read" in text("error"))
    problems = [entry for entry in browser.get_log("browser") if "422" not in entry["message"]]
    assert not problems
