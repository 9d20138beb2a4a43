"""What Prometheus is told: of one process, or, with ``PROMETHEUS_MULTIPROC_DIR`` set, of all workers in one answer."""

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"

REQUESTS = Counter("service_requests", "Requests for an answer of the network, by HTTP status.", ["status"])
SECONDS = Histogram("service_request_seconds", "From the end of an upload to the answer.")
COMPUTE = Histogram("service_compute_seconds", "Of decoding, the network and encoding, by batches.")
BATCH = Histogram("service_batch_images", "Images of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64))
PIXELS = Counter("service_pixels", "Pixels of images that were answered.")
WAITING = Gauge("service_queue_images", "Images that wait.", multiprocess_mode="livesum")
WORKERS = Gauge("service_workers", "Processes that serve.", multiprocess_mode="livesum")

CONTENT_TYPE = CONTENT_TYPE_LATEST


def text() -> bytes:
    """Return all metrics."""
    registry = REGISTRY
    if MULTIPROCESS in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
    return bytes(generate_latest(registry))
