"""How gunicorn runs the service: the network is loaded once, then workers are forked that share its memory.

``gunicorn -c examples/service/gunicorn.conf.py``, from anywhere. ``WEB_CONCURRENCY`` is the number of workers, which
share the cores.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from nbfftconv.threads import available

_HERE = Path(__file__).resolve().parent

# workers find the package `service`; before prometheus_client is imported, where their metrics are added up
sys.path.insert(0, str(_HERE.parent))
_metrics = None
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    _metrics = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="service-metrics-")

wsgi_app = "service.app:create_app()"
worker_class = "uvicorn_worker.UvicornWorker"
preload_app = True
bind = os.environ.get("SERVICE_BIND", "127.0.0.1:8000")
workers = int(os.environ.get("WEB_CONCURRENCY") or available())
os.environ.setdefault("SERVICE_THREADS", str(max(1, available() // workers)))
# Each worker listens for itself, and the system deals out connections. Of a common socket an event loop accepts all
# that wait, whenever it looks: of connections that are opened at once one worker got all, and kept them.
reuse_port = True
backlog = 2048
graceful_timeout = 30  # more than an upload and what waits in a queue take
timeout = 30
keepalive = 5
control_socket_disable = True  # it would be one file for all services of a user


def child_exit(server: Any, worker: Any) -> None:
    """Take a worker that is gone out of the sums of what is now."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)


def on_exit(server: Any) -> None:
    """Remove the metrics' files."""
    if _metrics is not None:
        shutil.rmtree(_metrics, ignore_errors=True)
