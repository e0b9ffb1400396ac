"""What a figure depends on besides the code: the device, its clock, threads and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import statistics
import subprocess
from pathlib import Path

import torch


def conditions(device: str) -> dict:
    """Of this moment, for a file of results."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        versions |= {"cuda": torch.version.cuda, "triton": version_of("triton")}
    return {
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "clocks_mhz": clocks(device),
        **versions,
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def clocks(device: str) -> float | None:
    """Megahertz now: of the GPU, or the mean of the processor's cores; None where unknown."""
    if device == "cuda":
        return gpu_clock()
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    lines = cpuinfo.read_text().splitlines()
    rates = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return statistics.mean(rates) if rates else None


def gpu_clock() -> float | None:
    """Of the multiprocessors, as the driver's own tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=uuid,clocks.sm", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    for line in lines:
        if uuid in line:
            return float(line.rsplit(",", 1)[1])
    return None
