"""Runs the scenarios of process_worker.py, or of another worker, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("process_worker.py")
#: Results of process_worker.py that are enough where nothing is compiled: by FFTW, by a codelet, direct.
FEW = tuple(f"{name}, float32, forward" for name in ("one tile", "codelets in stages", "direct"))
TIMEOUT = 300  # seconds; only a hang takes so long


def run_scenario(
    name: str, *arguments: Any, worker: Path = WORKER, timeout: float = TIMEOUT, **environment: str | None
) -> Any:
    """Return what the scenario printed; environment variables that are None are unset."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment  # imports what we import
    variables = {key: value for key, value in variables.items() if value is not None}
    command = [sys.executable, str(worker), name, *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)
