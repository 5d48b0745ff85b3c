"""What a measurement ran on, to stand beside its figures."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from common import kernels


def machine(*packages: str) -> dict[str, Any]:
    """``{"processor", "cores", "system", "python", "loops", "load", package: version, …}``: `loops` as of
    :mod:`common.kernels`; `load` is that of the last minute."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "loops": "compiled" if kernels.available else "PyTorch",
        "load": round(os.getloadavg()[0], 2),
        **{package: metadata.version(package) for package in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
