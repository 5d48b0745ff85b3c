"""`fedtopk doctor`: what this machine has, and what is missing for which command."""

import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from common import kernels

_PACKAGES = {
    "torch": ("everything", False),
    "opacus": ("accounting", False),
    "dp-accounting": ("accounting", False),
    "cryptography": ("noise", False),
    "flwr": ("flwr run", False),
    "ray": ("flwr run", False),
    "pyarrow": ("parquet files (extra: data)", True),
    "tensorboardX": ("TensorBoard files (extra: tensorboard)", True),
    "matplotlib": ("pictures of compare and paper (extra: pictures)", True),
    "gymnasium": ("a world as an environment (extra: environment)", True),
    "stable-baselines3": ("actors as logging policies (extra: environment)", True),
    "nicegui": ("charts of the dashboard (extra: dashboard)", True),
    "prometheus-client": ("figures of the dashboard for Prometheus (extra: dashboard)", True),
}


def examine() -> list[dict[str, Any]]:
    """One finding per requirement: ``{"what", "found", "needed_for", "ok", "optional"}``."""
    findings = [_finding("python", platform.python_version(), "everything", True)]
    findings.append(_finding("cores", str(len(os.sched_getaffinity(0))), "speed", True))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    findings.append(_finding("free disk here", f"{free:.1f} GiB", "run folders", free > 1))
    writable = os.access(tempfile.gettempdir(), os.W_OK)
    findings.append(_finding("temporary folder", tempfile.gettempdir(), "fetching data", writable))
    loops = "compiled" if kernels.available else "PyTorch's: no C compiler at installation, or no AVX2"
    findings.append(_finding("inner loops", loops, "a faster simulate", kernels.available, optional=True))
    for package, (needed_for, optional) in _PACKAGES.items():
        try:
            findings.append(_finding(package, metadata.version(package), needed_for, True, optional))
        except metadata.PackageNotFoundError:
            findings.append(_finding(package, "not installed", needed_for, False, optional))
    return findings


def _finding(what: str, found: str, needed_for: str, ok: bool, optional: bool = False) -> dict[str, Any]:
    return {"what": what, "found": found, "needed_for": needed_for, "ok": ok, "optional": optional}
