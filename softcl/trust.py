"""A kernel trains nobody before it was right once on this machine.

Before its first use in a process, a GPU kernel that was chosen for the user (``backend="auto"``,
``--fused``, the enqueue, the views) is tried on a small problem and compared with PyTorch's result.
The trial runs in a process of its own, so that one that hangs, crashes or spoils the device's
context does no harm. That it was right is kept on disk, under what it depends on: the versions of
softcl, torch, triton and the driver, and the GPU's name. It takes a few seconds the first time, and
nothing after.

A kernel that failed is passed over with one warning that names the reason. Nothing is tried while a
CUDA graph is captured. ``SOFTCL_TRUST=1`` in the environment takes every kernel untried,
``XDG_CACHE_HOME`` moves the file of verdicts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from softcl.files import cache_folder

SECONDS = 300.0  # that a trial may take: compilation included
_verdicts: dict[str, str] = {}  # of this process: what was tried -> why it failed; "" if it did not


def reason_against(trial: str, subject: str, device: torch.device, **facts) -> str | None:
    """Why a kernel is not to be used on ``device``, or None.

    Args:
        trial: "module:function", called as function(device=str, **facts) in another process; it
            raises where the kernel is wrong.
        subject: what is tried, in a few words: "backend triton", "the enqueue".
        facts: what the verdict depends on besides the machine; numbers and words.
    """
    if os.environ.get("SOFTCL_TRUST") == "1" or device.type != "cuda":
        return None
    key = json.dumps([trial, facts, machine(device)], sort_keys=True)
    if key not in _verdicts:
        if torch.cuda.is_current_stream_capturing():
            return None
        stored = kept(VERDICTS).get(key)
        _verdicts[key] = _try_and_store(key, trial, device, facts) if stored is None else stored
        if _verdicts[key]:
            warnings.warn(
                f"{subject} is not used on {device}: {_verdicts[key]}; "
                "`python -m softcl.doctor` tells more",
                RuntimeWarning,
                stacklevel=3,
            )
    return _verdicts[key] or None


def machine(device: torch.device) -> str:
    """What a finding depends on besides the call: the GPU, and the versions of what runs on it."""
    return json.dumps({"device": _name_of(device), **_versions()}, sort_keys=True)


@functools.cache
def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def _versions() -> dict[str, str]:
    import softcl

    driver = ""
    with contextlib.suppress(AttributeError):  # a build without CUDA
        driver = str(torch._C._cuda_getDriverVersion())
    triton = "absent"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    return {
        "softcl": softcl.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "driver": driver,
    }


# ------------------------------------------------------------------------------------------- trials


def _try_and_store(key: str, trial: str, device: torch.device, facts: dict) -> str:
    """The verdict of a trial. Of processes that want the same one, the first makes it."""
    try:
        from filelock import FileLock  # comes with torch

        file = _file(VERDICTS)
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock", timeout=2 * SECONDS)
        with lock:
            verdict = kept(VERDICTS).get(key)
            if verdict is None:
                verdict = _try(trial, device, facts)
                # What failed may have wanted memory or time: the next process tries again.
                if not verdict:
                    keep(VERDICTS, key, verdict)
            return verdict
    except OSError:  # no home, a full or read-only disk: the verdict is this process's alone
        return _try(trial, device, facts)


def _try(trial: str, device: torch.device, facts: dict) -> str:
    """Why the trial failed, in one line; "" if it did not."""
    words = json.dumps({"trial": trial, "device": str(device), "facts": facts})
    try:
        found = subprocess.run(
            [sys.executable, "-c", "from softcl import trust; trust.main()", words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment(),
        )
    except subprocess.TimeoutExpired:
        return f"it did not come back within {SECONDS:.0f} s"
    return "" if found.returncode == 0 else last_line(found)


def last_line(failed: subprocess.CompletedProcess[str]) -> str:
    """What a process that failed said last."""
    lines = [line for line in failed.stderr.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"its process ended with status {failed.returncode}"
    return last[:300]


def environment() -> dict[str, str]:
    """With this package's folder on the path, wherever the process was started."""
    folder = str(Path(__file__).resolve().parents[1])
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def main() -> None:
    wanted = json.loads(sys.argv[1])
    module, function = wanted["trial"].split(":")
    getattr(importlib.import_module(module), function)(device=wanted["device"], **wanted["facts"])


# ----------------------------------------------------------------------------------------- findings

VERDICTS = "verdicts.json"


def _file(name: str) -> Path:
    return cache_folder() / name


def kept(name: str) -> dict[str, Any]:
    """The findings in a file of the cache; none where it is absent, damaged or not ours."""
    try:
        found = json.loads(_file(name).read_text())
    except (OSError, ValueError, RuntimeError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(name: str, key: str, finding: Any) -> None:
    """Add a finding to a file of the cache.

    Raises:
        OSError: it cannot be written.
    """
    file = _file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({**kept(name), key: finding}, indent=1))
    temporary.replace(file)
