"""What a benchmark ran on: the processor or GPU, its cores, the versions of the packages."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def device_name(device: str) -> str:
    """The processor's name for "cpu"; for "cuda" the GPU's with its driver's version."""
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            lines = subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.splitlines()
            return "{}, driver {}".format(*lines[0].split(", "))
        except (OSError, subprocess.CalledProcessError, IndexError):
            import torch

            return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Python's version and those of `packages`; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment(device: str, threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """What the files of a run record about the machine."""
    return {
        "device": device,
        "device_name": device_name(device),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": versions(packages),
    }
