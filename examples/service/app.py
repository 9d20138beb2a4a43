"""The ASGI application: routes, limits of uploads, and how a request becomes a job and an answer.

`create_app` loads the network, so that a server that preloads has it before it forks; threads begin with `_lifespan`,
in each worker.
"""

import asyncio
import contextlib
import logging
import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from . import images, metrics
from .batching import Batcher, Full, Job
from .images import Refusal
from .network import Network
from .settings import Settings, from_environment

KINDS = {"png": "image/png", "npy": "application/octet-stream", "features": "image/png"}
_PAGE = Path(__file__).parent / "static" / "index.html"
#: Seconds after which a client that was turned away may try again.
_RETRY_AFTER = 1
#: So many times the bytes that are taken are read, and thrown away: a client that is cut off sees no answer.
_DISCARDED = 4
_log = logging.getLogger("uvicorn.error")


def create_app() -> Starlette:
    """Return the application, with its network loaded and warm; what is set is in the environment."""
    settings = from_environment()
    # each connection is an open file, and clients may open many that send nothing
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    service = _Service(settings, Network(settings))
    routes = [
        Route("/", service.page),
        Route("/infer", service.infer, methods=["POST"]),
        Route("/info", service.info),
        Route("/healthz", service.is_alive),
        Route("/readyz", service.is_ready),
        Route("/metrics", service.metrics),
    ]
    return Starlette(routes=routes, lifespan=service.lifespan)


class _Service:
    """What the routes have in common: the network, and, once the server runs, the queue."""

    def __init__(self, settings: Settings, network: Network) -> None:
        self._settings, self._network = settings, network
        self._batcher: Batcher | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Begin threads, if this process computes what the one that loaded the network did; end them at last."""
        self._network.check()
        settings = self._settings
        batcher = Batcher(self._compute, self._network.most, settings.threads, settings.queue, settings.batch_wait)
        metrics.WAITING.set(0)
        metrics.WORKERS.set(1)
        self._batcher = batcher
        try:
            yield
        finally:
            self._batcher = None
            await anyio.to_thread.run_sync(batcher.stop)
            metrics.WORKERS.set(0)

    async def page(self, _: Request) -> Response:
        """Answer with the page."""
        return FileResponse(_PAGE)

    async def info(self, _: Request) -> Response:
        """Answer with what is served, and its limits."""
        limits = {"body_bytes": self._settings.body_bytes, "threads": self._settings.threads}
        return JSONResponse(self._network.describe() | limits)

    async def is_alive(self, _: Request) -> Response:
        """Answer that the event loop does."""
        return PlainTextResponse("ok\n")

    async def is_ready(self, _: Request) -> Response:
        """Answer whether an image would be taken now."""
        is_ready = self._batcher is not None and self._batcher.is_working()
        return PlainTextResponse("ready\n" if is_ready else "not ready\n", 200 if is_ready else 503)

    async def metrics(self, _: Request) -> Response:
        """Answer with the metrics of all workers."""
        return Response(await anyio.to_thread.run_sync(metrics.text), media_type=metrics.CONTENT_TYPE)

    async def infer(self, request: Request) -> Response:
        """Answer with what the network makes of an image; the body is the image's file."""
        try:
            response = await self._infer(request)
        except ClientDisconnect:
            response = Response(status_code=400)
        except Refusal as refusal:
            response = JSONResponse({"error": refusal.message}, refusal.status)
            if refusal.status == 503:
                response.headers["Retry-After"] = str(_RETRY_AFTER)
            elif refusal.status in (408, 413):  # there may be more to come that nobody reads
                response.headers["Connection"] = "close"
        except Exception:
            _log.exception("a request was not answered")
            response = JSONResponse({"error": "the service has failed; its log says how"}, 500)
        metrics.REQUESTS.labels(str(response.status_code)).inc()
        return response

    async def _infer(self, request: Request) -> Response:
        kind = request.query_params.get("format", "png")
        if kind not in KINDS or (kind == "features" and not self._network.has_features):
            raise Refusal(422, f"format must be one of {', '.join(KINDS)}, and features if the network has any")
        body = await self._body(request)
        begin = time.perf_counter()
        size = images.size_of(body)
        job = Job(body, size, self._network.shape_for(size), kind)
        try:
            if self._batcher is None:
                raise Full
            self._batcher.put(job)
        except Full:
            raise Refusal(503, "too many images are waiting") from None
        metrics.WAITING.set(len(self._batcher))
        answer = await asyncio.wrap_future(job.future)
        metrics.SECONDS.observe(time.perf_counter() - begin)
        metrics.PIXELS.inc(size[0] * size[1])
        waited, computed = 1e3 * (job.begun - job.arrived), 1e3 * (job.ended - job.begun)
        timing = f"queue;dur={waited:.2f}, compute;dur={computed:.2f}, batch;desc={job.batch}"
        return Response(answer, media_type=KINDS[kind], headers={"Server-Timing": timing})

    async def _body(self, request: Request) -> bytes:
        """Return what is uploaded, as far as it is not too much and does not take too long."""
        most = self._settings.body_bytes
        too_much = Refusal(413, f"the body has more than {most} bytes")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > most:
            waits = request.headers.get("expect", "").lower() == "100-continue"
            if waits or int(announced) > _DISCARDED * most:
                raise too_much
        chunks, total = bytearray(), 0
        try:
            with anyio.fail_after(self._settings.body_seconds):
                async for chunk in request.stream():
                    total += len(chunk)
                    if total <= most:
                        chunks += chunk
                    elif total > _DISCARDED * most:
                        break
        except TimeoutError:
            raise Refusal(408, f"the upload took longer than {self._settings.body_seconds} seconds") from None
        if total > most:
            raise too_much
        return bytes(chunks)

    def _compute(self, jobs: list[Job]) -> None:
        """Answer jobs of one shape; in a thread of the queue."""
        network = self._network
        if self._batcher is not None:
            metrics.WAITING.set(len(self._batcher))
        arrays, scales, wanted = [], [], []
        for job in jobs:
            try:
                array, scale = network.fill(images.decode(job.body, network.channels))
            except Refusal as refusal:
                job.future.set_exception(refusal)
                continue
            arrays.append(array)
            scales.append(scale)
            wanted.append(job)
        if not wanted:
            return
        outputs, batches = network.run(arrays, any(job.kind == "features" for job in wanted))
        of_images = np.repeat(batches, batches)
        for job, each, scale, count in zip(wanted, outputs, scales, of_images, strict=True):
            answer = network.answer(job.kind, each, job.size, scale)
            job.batch, job.ended = int(count), time.perf_counter()
            job.future.set_result(answer)
        for count in batches:
            metrics.BATCH.observe(count)
        metrics.COMPUTE.observe(time.perf_counter() - wanted[0].begun)
